"""Where the tensors of a file lie; whatever the bytes, what is found lies in them and does not overlap."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt import containers
from deltackpt.containers import Span, spans
from deltackpt.storages import storages
from deltackpt.types import DTYPE_SIZES, NOT_IN_TORCH

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


def found(data: bytes) -> list[Span]:
    """The spans, having checked what holds for any."""
    got = spans(np.frombuffer(data, np.uint8))
    ends = [0] + [span.offset + span.size for span in got]
    assert all(end <= span.offset for end, span in zip(ends, got, strict=False))
    assert ends[-1] <= len(data)
    assert all(span.size % DTYPE_SIZES[span.dtype] == 0 for span in got)
    return got


def content(data: bytes, span: Span) -> bytes:
    return data[span.offset : span.offset + span.size]


def safetensors(header: object, n_data: int) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(n_data)


def entry(dtype: object, first: object, stop: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": [], "data_offsets": [first, stop]}


def saved_by_torch(state: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


# -- the three kinds


def test_tensors_of_safetensors_are_found_with_their_dtypes():
    save = pytest.importorskip("safetensors.numpy").save
    state = {"w": np.arange(300, dtype=np.float16), "b": np.arange(99), "tiny": np.ones(2)}
    data = save(state)
    got = {span.name: span for span in found(data)}
    assert {name: span.dtype for name, span in got.items()} == {"w": "float16", "b": "int64"}
    assert all(content(data, span) == state[name].tobytes() for name, span in got.items())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_members_of_npz_are_found_and_if_stored_their_elements(save):
    file = io.BytesIO()
    state = {"w": np.arange(300, dtype=np.float32), "t": np.arange(99).astype("M8[s]"), "tiny": np.ones(2)}
    save(file, **state)
    got = {span.name: span for span in found(file.getvalue())}
    if save is np.savez:
        assert {name: span.dtype for name, span in got.items()} == {"w": "float32", "t": "uint64"}
        assert all(content(file.getvalue(), span) == state[name].tobytes() for name, span in got.items())
    else:
        assert {span.dtype for span in got.values()} == {"uint8"}


@needs_torch
def test_storages_of_torch_are_called_by_the_keys_that_lead_to_them():
    w = torch.arange(300.0)
    state = {
        "model": {"w": w, "tied": w, "view": w[10:20]},
        "optimizer": {"state": {0: {"exp_avg": torch.arange(300.0).bfloat16()}}},
        "list": [torch.arange(300, dtype=torch.int16), (torch.zeros(300, dtype=torch.float8_e4m3fn),)],
        "parameter": torch.nn.Parameter(torch.ones(200, dtype=torch.complex64)),
    }
    for protocol in (2, 4, 5):
        data = saved_by_torch(state, pickle_protocol=protocol)
        got = {span.name: span.dtype for span in found(data) if span.name != "data.pkl"}
        assert got == {
            "model.w": "float32", "optimizer.state.0.exp_avg": "bfloat16", "list.0": "int16",
            "list.1.0": "float8_e4m3fn", "parameter": "complex64",
        }  # fmt: skip
        [span] = [span for span in found(data) if span.name == "model.w"]
        assert content(data, span) == w.numpy().tobytes()


@needs_torch
@pytest.mark.parametrize("name", sorted(DTYPE_SIZES.keys() - NOT_IN_TORCH))
def test_every_dtype_that_torch_saves_is_told(name):
    if not hasattr(torch, name):
        pytest.skip("this torch does not have it")
    tensor = torch.zeros(1024, dtype=torch.uint8).view(getattr(torch, name))
    try:
        data = saved_by_torch(tensor)
    except KeyError:
        pytest.skip("torch does not save it")
    assert [span.dtype for span in found(data) if span.name == "value"] == [name]


class Box:
    """An object with a tensor in it, which must not be made."""

    def __init__(self) -> None:
        self.inner = {"w": torch.arange(100.0)}

    def __setstate__(self, state: object) -> None:
        raise AssertionError("it was made")


@needs_torch
def test_what_is_in_an_object_is_found_and_the_object_is_not_made():
    names = {span.name for span in found(saved_by_torch({"box": Box()}))}
    assert any(name.startswith("box.") and name.endswith("inner.w") for name in names)


@needs_torch
def test_archives_behind_one_another_as_dcp_writes_them_are_all_found():
    data = b"".join(saved_by_torch(torch.full((100,), float(i))) for i in range(4))
    got = [span for span in found(data) if span.dtype == "float32"]
    assert [span.name for span in got] == ["0.value", "1.value", "2.value", "3.value"]
    assert [np.frombuffer(content(data, span), np.float32)[0] for span in got] == [0, 1, 2, 3]


def test_what_lies_between_and_is_large_is_kept_by_itself(monkeypatch):
    monkeypatch.setattr(containers, "_GAP_SIZE_MAX", 5000)
    file = io.BytesIO()
    np.savez(file, **{f"tiny{i}": np.ones(2) for i in range(30)}, w=np.ones(100))
    assert [span.name for span in found(file.getvalue())] == ["between", "w"]


# -- what lies


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        safetensors({"a": entry("F32", 0, 400), "b": entry("F32", 396, 800)}, 800),
        safetensors({"a": entry("F32", 0, 4000)}, 800),
        safetensors({"a": entry("F32", -8, 400)}, 800),
        safetensors({"a": entry("F32", True, 400)}, 800),
        safetensors({"a": entry("F32", 0, 1e300)}, 800),
        safetensors({"a": entry("F32", 0, 2**80)}, 800),
        safetensors({"a": {"dtype": "F32"}}, 800),
        safetensors({"a": []}, 800),
        safetensors({"a": 7}, 800),
        (2**63).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b'{"a":' * 20,
    ],
)
def test_a_container_that_lies_has_no_spans(data):
    assert found(data) == []


def test_a_dtype_that_is_not_known_or_does_not_fit_is_bytes():
    data = safetensors(
        {"a": entry("F4", 0, 400), "b": entry("F64", 400, 801), "c": entry([], 801, 1201)}, 1201
    )
    assert [(span.name, span.dtype) for span in found(data)] == [
        ("a", "uint8"),
        ("b", "uint8"),
        ("c", "uint8"),
    ]


def test_a_deep_header_is_no_recursion_error():
    raw = b'{"a":' + b"[" * 100_000
    assert found(len(raw).to_bytes(8, "little") + raw) == []


def zipped(names: int = 3) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(names):
            archive.writestr(f"a/{i}", bytes([i]) * 300)
    return file.getvalue()


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


@pytest.mark.parametrize("what", ["size", "offset", "directory", "magic", "comment", "local", "zip64"])
def test_a_zip_whose_directory_lies_has_no_spans_or_only_true_ones(what):
    data = zipped()
    entry_at, end_at = data.index(b"PK\x01\x02"), len(data) - 22
    assert len(found(data)) == 3
    lie = {
        "size": patched(data, entry_at + 20, "<I", 1 << 30),
        "offset": patched(data, entry_at + 42, "<I", 1 << 30),
        "directory": patched(data, end_at + 12, "<I", 1 << 30),
        "magic": patched(data, entry_at, "<I", 0),
        "comment": patched(data, end_at + 20, "<H", 5),
        "local": patched(data, 0, "<I", 0x04034B50 + 256),
        "zip64": patched(data, entry_at + 20, "<I", 0xFFFFFFFF),
    }[what]
    assert found(lie) == []


def test_entries_of_one_member_are_refused_before_its_header_is_read(monkeypatch):
    """Else each of them, 50 bytes, would cost the 2 ms that NumPy takes for a header."""
    file = io.BytesIO()
    np.savez(file, w=np.arange(100.0))
    data = file.getvalue()
    first, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    table = data[first:end] * 100
    lie = data[:first] + table + patched(data[end:], 12, "<I", len(table))
    monkeypatch.setattr(containers, "_of_npy", lambda *args: pytest.fail("read"))
    assert found(lie) == []


def test_members_that_share_their_bytes_are_no_spans():
    data = zipped()
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 1)
    assert found(patched(data, second + 42, "<I", 0)) == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_to_a_container_leaves_spans_that_lie_in_it(data):
    kinds = [zipped(), safetensors({"a": entry("F32", 0, 400), "b": entry("I8", 400, 900)}, 900)]
    file = io.BytesIO()
    np.savez(file, w=np.arange(100.0))
    kinds.append(file.getvalue())
    if torch is not None:
        kinds.append(saved_by_torch({"w": torch.arange(100.0), "o": [torch.arange(90)]}))
    whole = bytearray(data.draw(st.sampled_from(kinds)))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    keep = data.draw(st.integers(0, len(whole)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy's, about headers
        found(bytes(whole))
        found(bytes(whole[:keep]))


# -- pickles


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_a_pickle_or_not_at_all(data):
    assert isinstance(storages(data), dict)
    assert isinstance(storages(b"\x80\x02" + data + b"."), dict)


def test_a_pickle_that_holds_itself_or_doubles_is_walked_once():
    part = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x007X\x03\x00\x00\x00cpuK\x01tQt"
    assert storages(b"\x80\x02]q\x00(h\x00" + part + b"e.") == {"7": ("1.0", "float32")}
    doubled = b"\x80\x02" + part + b"".join(b"q%c(h%ch%ct" % (i, i, i) for i in range(100)) + b"."
    assert list(storages(doubled)) == ["7"]


def test_a_pickle_whose_key_is_a_deep_or_a_doubling_tuple_is_no_crash_and_not_waited_for():
    for key in (b")" + b"\x85" * 1_000_000, b")" + b"2\x86" * 200):
        assert storages(b"}" + key + b"Ns.") == {}
        assert storages(b"(" + key + b"Nd.") == {}
        assert storages(key + b"\x8c\x01n\x93.") == {}


def test_objects_made_of_the_same_arguments_share_them():
    args = b"(" + b"N" * 20_000 + b"tq\x00"
    pickled = args + b"cm\nn\nq\x01" + b"h\x01h\x00R" * 2000 + b"."
    tracemalloc.start()
    try:
        storages(pickled)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_pickle_that_would_run_code_is_read_as_data(tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    assert storages(pickle.dumps({"a": Evil()}, 2)) == {}
    assert not (tmp_path / "ran").exists()
