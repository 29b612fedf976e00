"""Container files: round trips with the real libraries, and files that lie."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt import dtypes
from deltackpt.errors import FormatError, InvalidInputError, NotFoundError, StorageError
from deltackpt.files import _TO_SAFETENSORS, TensorSpec, create_file, read_state, write_pt
from deltackpt.types import DTYPE_SIZES, NOT_IN_NUMPY, NOT_IN_TORCH, U8

NUMPY_DTYPES = sorted(DTYPE_SIZES.keys() - NOT_IN_NUMPY)
SAFETENSORS_DTYPES = sorted(_TO_SAFETENSORS)
SHAPES = [(), (0,), (3,), (2, 0, 5), (4, 5)]


def some_bytes(spec: TensorSpec) -> U8:
    rng = np.random.default_rng(len(spec.name) + spec.size)
    return rng.integers(0, 2 if spec.dtype == "bool" else 256, spec.size, dtype=np.uint8)


def specs_of(dtypes: list[str]) -> list[TensorSpec]:
    return [TensorSpec(f"{dtype}.{shape}", dtype, shape) for dtype in dtypes for shape in SHAPES]


def write(path: Path, specs: list[TensorSpec], structure: str | None = None) -> None:
    with create_file(path, specs, structure) as out:
        for spec in specs:
            out.buffer(spec.name)[:] = some_bytes(spec)
            out.done(spec.name)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ---------------------------------------------------------------- round trips


def test_every_dtype_and_shape_comes_back_from_safetensors(tmp_path):
    specs = specs_of(SAFETENSORS_DTYPES)
    write(tmp_path / "x.safetensors", specs)
    state = read_state(tmp_path / "x.safetensors")
    assert list(state) == [spec.name for spec in specs]
    for spec in specs:
        tensor = state[spec.name]
        assert (tensor.dtype, tensor.shape) == (spec.dtype, spec.shape)
        assert tensor.framework == ("torch" if spec.dtype in NOT_IN_NUMPY else "numpy")
        assert np.array_equal(tensor.data, some_bytes(spec))


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    torch_files = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    specs = specs_of([dtype for dtype in SAFETENSORS_DTYPES if _TO_SAFETENSORS[dtype] in torch_files._TYPES])
    write(tmp_path / "x.safetensors", specs, '{"step": 7}')
    loaded = torch_files.load_file(tmp_path / "x.safetensors")
    for spec in specs:
        tensor = loaded[spec.name]
        assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{spec.dtype}", spec.shape)
        if spec.size:
            assert np.array_equal(tensor.reshape(-1).view(torch.uint8).numpy(), some_bytes(spec))
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"deltackpt": '{"step": 7}'}


def test_what_the_safetensors_library_writes_is_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    arrays = {f"{dtype}": np.arange(6).reshape(2, 3).astype(dtype) for dtype in ("bool", "float16", "int64")}
    library.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    state = read_state(tmp_path / "x.safetensors")
    assert state.keys() == arrays.keys()
    for name, array in arrays.items():
        assert state[name].shape == array.shape
        assert bytes(state[name].data) == array.tobytes()


def test_every_numpy_dtype_and_shape_goes_through_npz(tmp_path):
    specs = specs_of(NUMPY_DTYPES)
    write(tmp_path / "x.npz", specs, '{"step": 7}')
    by_numpy, state = np.load(tmp_path / "x.npz", allow_pickle=False), read_state(tmp_path / "x.npz")
    assert by_numpy["deltackpt.json"] == b'{"step": 7}'
    assert list(state) == [spec.name for spec in specs]
    for spec in specs:
        for array in (by_numpy[spec.name], state[spec.name]):
            assert (array.dtype, array.shape) == (spec.dtype, spec.shape)
            assert array.tobytes() == some_bytes(spec).tobytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path, save):
    arrays = {
        "zeros": np.zeros((500, 500)),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "s": np.array(3),
    }
    save(tmp_path / "x.npz", big=np.arange(3, dtype=">f4"), **arrays)
    state = read_state(tmp_path / "x.npz")
    assert np.array_equal(state.pop("big"), np.arange(3, dtype=">f4"))
    assert state.keys() == arrays.keys()
    assert all(np.array_equal(state[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("dtype", [">f4", "<U4", "|S3", "<M8[s]", "<f16"])
def test_dtypes_that_have_only_a_spelling_go_through_npz(tmp_path, dtype):
    array = np.frombuffer(np.arange(48, dtype=np.uint8) % 2, dtype)[:2]
    np.savez(tmp_path / "x.npz", x=array)
    back = read_state(tmp_path / "x.npz")["x"]
    assert (back.dtype, back.tobytes()) == (array.dtype, array.tobytes())
    name = dtypes.name_of(array.dtype)
    with create_file(tmp_path / "y.npz", [TensorSpec("x", name, (2,))]) as out:
        out.buffer("x")[:] = np.frombuffer(array.tobytes(), np.uint8)
        out.done("x")
    assert np.load(tmp_path / "y.npz")["x"].tobytes() == array.tobytes()


def test_a_state_goes_through_pt_with_its_nesting_and_every_dtype(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {
        name: torch.zeros(shape, dtype=getattr(torch, name))
        for name in DTYPE_SIZES.keys() - NOT_IN_TORCH - {"float4_e2m1fn_x2", "complex32"}
        for shape in SHAPES
    }
    state = {"t": tensors, "n": [1, 2.5, None, True, "s", b"\x00b", (1, 1 << 100)], 5: {}}
    write_pt(tmp_path / "x.pt", state)
    loaded = read_state(tmp_path / "x.pt")
    assert loaded["n"] == state["n"]
    assert loaded[5] == {}
    assert all(torch.equal(loaded["t"][name], tensor) for name, tensor in tensors.items())
    assert all(loaded["t"][name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_arrays_go_into_pt_as_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {name: np.arange(4).reshape(2, 2).astype(name) for name in NUMPY_DTYPES}
    frozen = np.arange(3.0)
    frozen.flags.writeable = False
    arrays |= {
        "zero-d": np.array(7),
        "frozen": frozen,
        "strided": np.arange(9)[::-2],
        "big": np.ones(2, ">i4"),
    }
    write_pt(tmp_path / "x.pt", {"a": arrays, "scalar": np.float32(3)})
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(np.array_equal(loaded["a"][name].numpy(), array) for name, array in arrays.items())
    assert loaded["scalar"].dtype == torch.float32


def test_a_pt_of_the_old_stream_format_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.arange(3)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state(tmp_path / "x.bin")["x"], torch.arange(3))


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_buffers_may_be_filled_from_many_threads(tmp_path, suffix):
    specs = [TensorSpec(str(i), "int32", (i,)) for i in range(50)]
    path = tmp_path / f"x{suffix}"

    def fill(spec: TensorSpec) -> None:
        out.buffer(spec.name)[:] = some_bytes(spec)
        out.done(spec.name)

    with create_file(path, specs) as out, ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, specs))
    state = read_state(path)
    for spec in specs:
        data = state[spec.name].data if suffix == ".safetensors" else state[spec.name]
        assert bytes(data) == bytes(some_bytes(spec))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_no_tensors_make_a_readable_file(tmp_path, suffix):
    write(tmp_path / f"x{suffix}", [], "{}")
    assert read_state(tmp_path / f"x{suffix}") == {}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_the_same_tensors_make_the_same_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        write(tmp_path / f"{name}{suffix}", specs_of(["float32"]), "{}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")

    def write_and_stop() -> None:
        with create_file(path, specs_of(["int8"])) as out:
            out.buffer("int8.(3,)")[:] = 1
            out.done("int8.(3,)")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_tensor_never_filled_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")

    def write_one_of_two() -> None:
        with create_file(path, [TensorSpec("x", "int8", (1,)), TensorSpec("y", "int8", (1,))]) as out:
            out.buffer("x")[:] = 1
            out.done("x")

    with pytest.raises(InvalidInputError, match="'y' was never filled"):
        write_one_of_two()
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == [path.name]


def test_an_object_that_torch_cannot_pickle_leaves_the_old_file(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "x.pt").write_bytes(b"old")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_pt(tmp_path / "x.pt", {"f": lambda: None})
    assert (tmp_path / "x.pt").read_bytes() == b"old"
    assert names_in(tmp_path) == ["x.pt"]


def test_a_written_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write(tmp_path / "x.npz", [])
    assert (tmp_path / "x.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"x\.safetensors"):
        write(tmp_path / "x.safetensors", [TensorSpec("x", "int8", (1 << 61,))])
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("x.npz", "bfloat16", "'w' is bfloat16.*write .safetensors"),
        ("x.npz", "float8_e4m3fn", "'w' is float8_e4m3fn.*write .safetensors"),
        ("x.safetensors", "complex128", "'w' is complex128.*write .npz"),
        ("x.h5", "int8", "use one of .safetensors, .npz"),
    ],
)
def test_what_a_container_cannot_hold_is_refused_with_a_way_out(tmp_path, name, dtype, message):
    with pytest.raises(InvalidInputError, match=message):
        write(tmp_path / name, [TensorSpec("w", dtype, (1,))])
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["__metadata__", "a\0b", "\ud800", "x" * 70_000])
def test_a_name_that_would_not_come_back_is_refused(tmp_path, name):
    for suffix in (".safetensors", ".npz"):
        with pytest.raises(InvalidInputError, match="cannot hold this name"):
            write(tmp_path / f"x{suffix}", [TensorSpec(name, "int8", ())])


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="'x' is there twice"):
        write(tmp_path / "x.npz", [TensorSpec("x", "int8", ())] * 2)


def test_a_missing_directory_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="no such directory"):
        write(tmp_path / "no" / "x.npz", [])


# ---------------------------------------------------------------- files that lie


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"x\.npz: no such file"):
        read_state(tmp_path / "x.npz")


def test_an_unknown_extension_lists_the_known_ones(tmp_path):
    with pytest.raises(InvalidInputError, match=r"\.safetensors, \.npz, \.pt, \.pth, \.bin"):
        read_state(tmp_path / "x.h5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\x10" + bytes(7), "header size is 16"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "header size is 1099511627776"),
        (safetensors_bytes(b"{"), "not JSON"),
        (safetensors_bytes(b"\xff{}"), "not JSON"),
        (safetensors_bytes(b"[" * 100_000), "not JSON"),
        (safetensors_bytes(b'{"a": {}, "a": {}}'), "stands twice"),
        (safetensors_bytes([]), "expected an object"),
        (safetensors_bytes({"x": 3}), "'x': entry needs"),
        (safetensors_bytes({"x": {}}), "'x': entry needs"),
        (safetensors_bytes({"x": entry("F6_E2M3")}, b"abcd"), "'x': dtype is 'F6_E2M3'"),
        (safetensors_bytes({"x": entry([])}, b"abcd"), "'x': dtype is"),
        (safetensors_bytes({"x": entry(shape=(-4,))}, b"abcd"), "'x': shape"),
        (safetensors_bytes({"x": entry(shape=(-2, -2))}, b"abcd"), "'x': shape"),
        (safetensors_bytes({"x": entry(shape=(4.0,))}, b"abcd"), "'x': shape"),
        (safetensors_bytes({"x": entry(shape=4)}, b"abcd"), "'x': shape"),
        (safetensors_bytes({"x": entry(shape=(1,) * 33)}, b"abcd"), "'x': shape"),
        (safetensors_bytes({"x": entry(shape=(0, 1 << 62, 1 << 62), offsets=(0, 0))}), "'x': shape"),
        (safetensors_bytes({"x": entry(offsets=(0, 4, 4))}, b"abcd"), "'x': data_offsets"),
        (safetensors_bytes({"x": entry(offsets=(-4, 0))}, b"abcd"), "'x': data_offsets"),
        (safetensors_bytes({"x": entry(offsets=(4, 0))}, b"abcd"), "'x': data_offsets"),
        (safetensors_bytes({"x": entry("F32", (4,))}, b"abcd"), "make 16 bytes"),
        (safetensors_bytes({"x": entry()}, b"abc"), "'x'.*holds 3 bytes"),
        (safetensors_bytes({"x": entry()}, b"abcde"), "'x'.*holds 5 bytes"),
        (safetensors_bytes({}, b"abcde"), "holds 5 bytes"),
        (safetensors_bytes({"x": entry(), "y": entry()}, b"abcd"), "'y' starts at 0, expected 4"),
        (
            safetensors_bytes({"x": entry(), "y": entry(offsets=(6, 10))}, bytes(10)),
            "'y' starts at 6, expected 4",
        ),
    ],
)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        read_state(path)
    assert str(path) in str(caught.value)


def npz(path: Path, member: bytes, name: str = "x.npy", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, member)
    return path


def npy(descr: object, shape: object, data: bytes) -> bytes:
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_an_object_array_is_refused_and_not_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", good=np.ones(2), bad=np.array([Bomb(tmp_path / "boom")], dtype=object))
    with pytest.raises(InvalidInputError, match=r"x\.npz: member 'bad\.npy': dtype is object"):
        read_state(tmp_path / "x.npz")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (b"", "not an npy header"),
        (b"hello world", "not an npy header"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "npy version"),
        (npy("<f4", (1 << 40,), b"abcd"), "makes 4398046511104 bytes"),
        (npy("<f4", (-1, -1), b"abcd"), "shape"),
        (npy("<f4", (2,), b"abcd"), "makes 8 bytes"),
        (npy("<f4", (0, 1 << 62, 1 << 62), b""), "shape"),
        (npy("<f4", (1,) * 33, b"abcd"), "shape"),
        (npy("<f4", ("a",), b"abcd"), "not an npy header"),
        (npy("nonsense", (1,), b"abcd"), "not an npy header"),
    ],
)
def test_an_npz_member_that_lies_is_refused(tmp_path, member, message):
    with pytest.raises(FormatError, match=rf"member 'x\.npy'.*{message}"):
        read_state(npz(tmp_path / "x.npz", member))


@pytest.mark.parametrize("descr", ["|O", [("a", "<f4")]])
def test_an_npz_of_anything_but_numbers_is_invalid_input(tmp_path, descr):
    with pytest.raises(InvalidInputError, match=r"member 'x\.npy': dtype"):
        read_state(npz(tmp_path / "x.npz", npy(descr, (0,), b"")))


def test_a_zip_member_that_is_no_array_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match=r"member 'readme\.txt' is no array"):
        read_state(npz(tmp_path / "x.npz", b"hello", "readme.txt"))


def test_an_unusual_zip_compression_is_refused(tmp_path):
    with pytest.raises(FormatError, match="compression method is 14"):
        read_state(npz(tmp_path / "x.npz", npy("<f4", (1,), b"abcd"), method=zipfile.ZIP_LZMA))


def patched(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def test_a_declared_size_that_the_file_cannot_hold_is_refused(tmp_path):
    member = npy("<f4", (1000,), bytes(4000))
    size = len(member).to_bytes(4, "little")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = npz(tmp_path / "x.npz", member, method=method)
        with pytest.raises(FormatError, match=r"cannot make|take"):
            read_state(patched(path, size, (0x7FFFFFFF).to_bytes(4, "little")))


def test_a_damaged_npz_array_is_found_by_its_crc(tmp_path):
    path = npz(tmp_path / "x.npz", npy("<f4", (2,), b"abcdefgh"))
    with pytest.raises(FormatError, match="CRC"):
        read_state(patched(path, b"abcdefgh", b"abcdefgx"))


def test_two_npz_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("x.npy", b"")
    with pytest.raises(FormatError, match="same name"):
        read_state(tmp_path / "x.npz")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bomb_in_a_pt_is_refused_and_does_not_go_off(tmp_path):
    torch = pytest.importorskip("torch")
    for modern in (True, False):
        torch.save({"x": Bomb(tmp_path / "boom")}, tmp_path / "x.pt", _use_new_zipfile_serialization=modern)
        with pytest.raises(InvalidInputError, match="without running code"):
            read_state(tmp_path / "x.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(InvalidInputError, match="without running code"):
        read_state(tmp_path / "plain.pth")
    assert not (tmp_path / "boom").exists()


def truncations(path: Path) -> st.SearchStrategy[bytes]:
    content = path.read_bytes()
    cut = st.integers(0, len(content) - 1).map(lambda n: content[:n])
    flip = st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)).map(
        lambda at: content[: at[0]] + bytes([content[at[0]] ^ at[1]]) + content[at[0] + 1 :]
    )
    return cut | flip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "x.pt"])
def test_damaged_files_parse_or_raise_our_errors(tmp_path, name):
    path, hurt = tmp_path / name, tmp_path / f"hurt-{name}"
    if name == "x.pt":
        torch = pytest.importorskip("torch")
        write_pt(path, {"a": torch.arange(5), "b": [1, "s"]})
    else:
        write(path, specs_of(["float32", "int8"]), "{}")

    @settings(max_examples=150, deadline=None)
    @given(truncations(path))
    def check(content: bytes) -> None:
        hurt.write_bytes(content)
        with contextlib.suppress(FormatError, InvalidInputError):
            read_state(hurt)

    check()


def test_a_zip_directory_that_points_outside_the_file_is_a_format_error(tmp_path):
    write(tmp_path / "x.npz", specs_of(["int8"]))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 15] ^= 0x80  # the directory's size, which zipfile counts back from the end
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(FormatError, match="not a readable npz"):
        read_state(tmp_path / "x.npz")
