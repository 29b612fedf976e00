"""Loading into memory one has, on devices, lazily, and in part."""

import mmap
from dataclasses import replace

import numpy as np
import pytest
from anystate import Config, Point, picture, states
from hypothesis import given
from test_tree import SLOW, needs_torch

import deltackpt
from deltackpt import delta, loader
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import CorruptError, FormatError, InvalidInputError, NotFoundError
from deltackpt.manifest import Manifest
from deltackpt.restore import resolve
from deltackpt.run import Run
from deltackpt.store import Store, open_store

try:
    import torch
except ImportError:
    torch = None


class Counting(MemoryBackend):
    """Counts the bytes that are read."""

    def __init__(self):
        super().__init__()
        self.read_size = 0

    def read(self, name, offset=0, size=None):
        data = super().read(name, offset, size)
        self.read_size += len(data)
        return data

    def read_into(self, name, offset, buffers):
        self.read_size += sum(memoryview(b).nbytes for b in buffers)
        super().read_into(name, offset, buffers)

    def map(self, name):
        data = super().map(name)
        self.read_size += len(data)
        return data


def saved(state, backend=None):
    backend = backend or MemoryBackend()
    Run(open_store(backend, create=True), "main").save(state, step=1)
    return backend


def opened(backend):
    """The run as a new process finds it."""
    return Run(Store(backend), "main")


@SLOW
@given(states())
def test_any_state_goes_through_a_store(state):
    assert picture(opened(saved(state)).load()) == picture(state)


@SLOW
@given(states())
def test_any_state_is_loaded_into_one_like_it(state):
    backend = saved(state)
    into = opened(backend).load()
    zeroed = [x for x in leaves_of(into) if zero(x)]
    try:
        back = opened(backend).load(into=into)
    except InvalidInputError as error:
        assert "overlap" in error.message or "two of this path" in error.message  # noqa: PT017
        return
    assert picture(back) == picture(state)
    back_ids = {id(x) for x in leaves_of(back)}
    assert all(id(x) in back_ids for x in zeroed)


def leaves_of(x):
    if isinstance(x, np.ndarray) or (torch is not None and isinstance(x, torch.Tensor)):
        yield x
    elif isinstance(x, dict):
        for v in [*x.values(), *(getattr(x, "__dict__", None) or {}).values()]:
            yield from leaves_of(v)
    elif isinstance(x, list | tuple):
        for v in x:
            yield from leaves_of(v)
    elif hasattr(x, "__dataclass_fields__"):
        for name in x.__dataclass_fields__:
            yield from leaves_of(getattr(x, name))


def zero(x):
    if isinstance(x, np.ndarray):
        x.view(np.dtype((np.void, x.itemsize)))[...] = b"\0" * x.itemsize
    else:
        ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
        x.detach().view(ints[x.element_size()]).zero_()
    return True


@SLOW
@given(states())
def test_any_state_is_read_lazily_array_by_array(state):
    lazy = opened(saved(state)).load(lazy=True)
    for there, x in zip(leaves_of(lazy_loaded(lazy)), leaves_of(state), strict=True):
        assert picture(there)[0][1:3] == picture(x)[0][1:3]
        assert deltackpt.arrays.bytes_of(there) == deltackpt.arrays.bytes_of(x)


def lazy_loaded(x):
    """A state with every lazy array read, nested loosely."""
    if isinstance(x, deltackpt.LazyArray):
        return x.load()
    if isinstance(x, dict):
        return [lazy_loaded(v) for v in [*x.values(), *(getattr(x, "__dict__", None) or {}).values()]]
    if hasattr(x, "__dataclass_fields__"):
        return [lazy_loaded(getattr(x, name)) for name in x.__dataclass_fields__]
    return [lazy_loaded(v) for v in x] if isinstance(x, list | tuple) else x


@pytest.fixture(scope="module")
def large():
    """A matrix of 64 MiB beside a small one, in a store that counts."""
    rng = np.random.default_rng(0)
    state = {
        "w": rng.standard_normal((8192, 2048), np.float32),
        "small": rng.standard_normal(100_000, np.float32),
        "lr": 0.1,
    }
    return state, saved(state, Counting())


@pytest.mark.parametrize(
    "index",
    [5, (5, 7), (..., 3), slice(100, 4000, 700), (slice(None, None, -900), slice(3, 9)), (None, 3, ...), ...],
)
def test_a_part_is_what_the_index_picks_of_the_whole(large, index):
    state, backend = large
    part = delta.read(backend, 1, "w", index)
    assert np.array_equal(part, state["w"][index])
    assert part.flags.owndata or part.base is None or part.size < state["w"].size
    assert part.flags.writeable


def test_a_row_reads_its_chunks_and_no_others(large):
    state, backend = large
    run = opened(backend)
    run.store.refresh()
    before = backend.read_size
    assert np.array_equal(run.read("latest", "w", 4000), state["w"][4000])
    assert backend.read_size - before < 2 << 20


def test_keys_read_what_they_match(large):
    state, backend = large
    run = opened(backend)
    before = backend.read_size
    assert np.array_equal(run.load(keys="small")["small"], state["small"])
    assert backend.read_size - before < 0.02 * (64 << 20)


def test_lazy_arrays_know_themselves_and_read_what_is_asked(large):
    state, backend = large
    run = opened(backend)
    lazy = run.load(lazy=True)
    before = backend.read_size
    w = lazy["w"]
    assert (w.name, w.dtype, w.shape, w.size, len(w)) == ("w", "float32", (8192, 2048), 64 << 20, 8192)
    assert lazy["lr"] == 0.1
    assert backend.read_size == before
    assert np.array_equal(w[17, ::3], state["w"][17, ::3])
    assert np.array_equal(np.asarray(lazy["small"]), state["small"])
    with pytest.raises(ValueError, match="makes a copy"):
        np.asarray(w, copy=False)
    with pytest.raises(InvalidInputError, match="index of 'w': 9000 is out of range"):
        w[9000]


def test_a_lazy_array_of_a_step_that_was_forgotten_and_collected_is_an_error():
    backend = saved({"w": np.random.default_rng(0).standard_normal(100_000)})
    run = opened(backend)
    lazy = run.load(lazy=True)["w"]
    run.save({"w": 0}, step=2)
    run.forget([1])
    for entry in list(backend.list("packs/")):
        backend.delete(entry.name)
    with pytest.raises(NotFoundError, match="was forgotten while it was read"):
        lazy[0]


def test_a_damaged_chunk_is_told_by_the_part_that_needs_it():
    backend = saved({"w": np.random.default_rng(0).standard_normal((400, 10_000))})
    (entry,) = backend.list("packs/")
    data = bytearray(backend.read(entry.name))
    data[5_000_000:5_000_010] = bytes(10)
    backend.delete(entry.name)
    backend.create_once(entry.name, bytes(data))
    run, n_bad = opened(backend), 0
    for i in range(400):
        try:
            run.read(1, "w", i)
        except CorruptError as error:
            n_bad += 1
            assert "run 'main' step 1: tensor 'w'" in error.message  # noqa: PT017
    assert 0 < n_bad < 15


def test_views_of_one_memory_can_be_read_in_part():
    flat = np.arange(1000, dtype=np.int32)
    backend = saved({"t": flat[:600].reshape(20, 30).T, "flat": flat, "big": np.arange(5, dtype=">i8")})
    assert delta.read(backend, "latest", "t", (3, slice(2, 6))).tolist() == flat[63:183:30].tolist()
    assert delta.read(backend, 1, "big", slice(None, None, -2)).tolist() == [4, 2, 0]
    assert delta.read(backend, 1, "big").dtype == np.dtype(">i8")


def test_a_view_that_reaches_out_of_its_tensor_is_refused_before_anything_is_read():
    backend = saved({"a": np.zeros((3, 3)).T})
    run = opened(backend)
    manifest = run.manifest()
    manifest.structure["map"]["a"]["view"]["offset"] = 8
    for call in (
        lambda: loader.load(run.store, manifest),
        lambda: loader.load(run.store, manifest, lazy=True),
        lambda: loader.load(run.store, manifest, into={"a": np.zeros((3, 3))}),
        lambda: loader.read(run.store, manifest, "a"),
    ):
        with pytest.raises(FormatError, match=r"state\['a'\]: found bytes 8 to 80 of a tensor of 72"):
            call()
    assert isinstance(manifest, Manifest)


def test_into_need_not_be_complete_if_it_is_not_strict():
    state = {"model": {"w": np.ones(3), "b": np.ones(2)}, "step": 7, "c": Config(lr=Point(np.ones(1), 2))}
    backend = saved(state)
    into = {"model": {"w": np.zeros(3), "new": np.zeros(9)}}
    with pytest.raises(InvalidInputError) as caught:
        delta.load(backend, into=into)
    assert [line.split(":")[0].strip() for line in caught.value.message.splitlines()[1:]] == [
        "into['model']['b']",
        "into['c']['lr']['x']",
        "into['model']['new']",
    ]
    back = delta.load(backend, into=into, strict=False)
    assert into["model"]["w"].tolist() == [1, 1, 1]
    assert into["model"]["new"].tolist() == [0] * 9
    assert back["model"] == {"w": into["model"]["w"]}
    assert back["step"] == 7
    with pytest.raises(InvalidInputError, match=r"into\['model'\]\['w'\]: found float64 \(4,\)"):
        delta.load(backend, into={"model": {"w": np.zeros(4)}}, strict=False)


def test_two_ways_of_loading_at_once_are_refused():
    backend = saved({"w": np.zeros(1)})
    for more in ({"lazy": True}, {"map": "cpu"}):
        with pytest.raises(InvalidInputError, match="found both into and"):
            delta.load(backend, into={"w": np.zeros(1)}, **more)


@needs_torch
def test_tensors_go_where_the_map_says_and_stay_tied():
    w = torch.randn(4, 3)
    state = {"w": w, "tied": w.t(), "p": torch.nn.Parameter(torch.ones(2)), "n": np.zeros(2)}
    backend = saved(state)
    back = delta.load(backend, map="meta")  # the one device besides the CPU that every machine has
    assert [back[k].device.type for k in ("w", "tied", "p")] == ["meta"] * 3
    assert type(back["p"]) is torch.nn.Parameter
    assert type(back["n"]) is np.ndarray
    assert back["tied"].stride() == (1, 3)
    chosen = []
    back = delta.load(backend, map=lambda name, device: chosen.append((name, device)) or "cpu")
    assert chosen == [("w", "cpu"), ("p", "cpu")]
    assert picture(back) == picture(state)
    assert delta.load(backend, map={"cpu": "meta"})["w"].is_meta
    assert delta.load(backend, map={"cuda:0": "meta"})["w"].is_cpu
    assert delta.read(backend, 1, "w", 0, map="meta").is_meta
    assert delta.load(backend, lazy=True, map="meta")["w"][0].is_meta


@needs_torch
def test_a_device_that_is_not_there_is_named():
    backend = saved({"w": torch.zeros(1)})
    for device in ["nonsense", 1.5, "cuda:77"]:
        with pytest.raises(InvalidInputError, match="map: cannot place 'w' on"):
            delta.load(backend, map=device)


@needs_torch
def test_pickles_are_loaded_only_by_who_says_so(tmp_path):
    with pytest.raises(InvalidInputError, match=r"state\['s'\]"):
        delta.save({"s": {1, 2}}, tmp_path, step=1)
    delta.save({"s": {1, 2}, "w": torch.zeros(2)}, tmp_path, step=1, allow_pickle=True)
    with pytest.raises(InvalidInputError, match="was pickled"):
        delta.load(tmp_path)
    assert delta.load(tmp_path, allow_pickle=True)["s"] == {1, 2}
    assert delta.load(tmp_path, keys="w")["w"].tolist() == [0, 0]


def test_one_row_of_a_state_of_8_gib_reads_less_than_4_mib():
    size, width = 8 << 30, 4096
    data = np.frombuffer(mmap.mmap(-1, size), np.float32).reshape(-1, width)
    # A number in every 256 KiB: no two chunks are equal, and the state takes little memory all the same.
    data.reshape(-1, 65536)[:, 0] = np.arange(1, size // (65536 * 4) + 1)
    backend = saved({"w": data, "b": np.ones(3)}, Counting())
    before = backend.read_size
    row = 400_000 // 16 * 16
    found = delta.read(backend, "latest", "w", row)
    assert np.array_equal(found, data[row])
    assert found[0]
    assert backend.read_size - before < 4 << 20


@needs_torch
def test_views_that_torch_could_not_place_from_their_own_start_come_back():
    f = torch.arange(10.0)
    s = torch.arange(16, dtype=torch.uint8)
    for state in (
        {"a": f[1:], "c": torch.view_as_complex(f[2:10].view(4, 2))},
        {"a": s[1:16], "b": s[4:12].view(torch.float32)},
        {"a": f[1:], "d": f.view(torch.float64)[1:]},
    ):
        assert picture(opened(saved(state)).load()) == picture(state)


@needs_torch
def test_a_tensor_whose_storage_was_shrunk_is_refused_and_its_storage_is_left_alone():
    x = torch.arange(3_000_000.0)
    x.untyped_storage().resize_(8)
    with pytest.raises(InvalidInputError, match=r"state\['x'\]: a tensor whose storage was freed"):
        saved({"x": x})
    assert x.untyped_storage().nbytes() == 8


def test_into_arrays_that_overlap_otherwise_than_in_the_snapshot_are_refused_and_left_alone():
    backend = saved({"a": np.arange(4.0), "b": np.arange(10.0, 14.0)})
    buf = np.zeros(6)
    targets = [{"a": buf[:4], "b": buf[2:]}, {"a": buf[:4], "b": buf[:4]}]
    if torch is not None:
        targets.append({"a": buf[:4], "b": torch.from_numpy(buf)[:4]})
    for into in targets:
        with pytest.raises(InvalidInputError, match="share memory otherwise than in the snapshot"):
            delta.load(backend, into=into)
    assert not buf.any()
    flat = np.arange(6.0)
    tied = saved({"flat": flat, "part": flat[2:4], "t": flat.reshape(2, 3).T})
    new = np.zeros(6)
    delta.load(tied, into={"flat": new, "part": new[2:4], "t": new.reshape(2, 3).T})
    assert new.tolist() == flat.tolist()
    with pytest.raises(InvalidInputError, match="share memory"):
        delta.load(tied, into={"flat": new, "part": new[3:5], "t": np.zeros((3, 2))})


def test_what_cannot_be_loaded_is_told_before_the_callers_arrays_are_written(tmp_path):
    w = np.full(4, -1.0)
    backend = MemoryBackend()
    delta.save({"w": np.arange(4.0), "s": {1}}, backend, step=1, allow_pickle=True)
    with pytest.raises(InvalidInputError, match="was pickled"):
        delta.load(backend, into={"w": w})
    assert w.tolist() == [-1] * 4


def test_tied_arrays_are_filled_once():
    w = np.arange(1000.0)
    backend = saved({"embed": w, "head": w}, Counting())
    into = np.zeros(1000)
    assert opened(backend).load(into={"embed": into, "head": into})["head"] is into
    assert into.tolist() == w.tolist()


def test_a_few_columns_of_a_large_matrix_are_stored_as_those_columns():
    big = np.random.default_rng(0).standard_normal((1000, 1000), np.float32)
    state = {"q": big[:, 0], "k": big[:, 1], "again": big[:, 0]}
    backend = MemoryBackend()
    report = delta.save(state, backend, step=1)
    assert report.logical_size == 8000
    back = delta.load(backend)
    assert back["q"] is back["again"]
    assert np.array_equal(back["k"], big[:, 1])


def test_a_lazy_array_is_walked_row_by_row_and_never_searched():
    lazy = delta.load(saved({"w": np.arange(6).reshape(3, 2)}), lazy=True)["w"]
    assert [row.tolist() for row in lazy] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(TypeError):
        _ = 3 in lazy


def test_what_is_gathered_is_read_some_at_a_time(monkeypatch):
    x = np.random.default_rng(0).standard_normal((10, 20_000))
    backend = saved(dict(enumerate(x)), Counting())
    monkeypatch.setattr(loader, "_COPY_SIZE", 300_000)
    for index in (..., slice(None, None, -1)):
        lazy = opened(backend).load(lazy=True)
        before = backend.read_size
        each = loader.gather([(lazy[i], index) for i in range(10)])
        assert backend.read_size == before
        for n, (array, row) in enumerate(zip(each, x, strict=True)):
            assert np.array_equal(array, row[index])
            assert array.flags.writeable
            assert backend.read_size - before < (n + 3) * 170_000
    assert list(loader.gather([])) == []


def test_parts_that_are_small_take_no_more_memory_than_others(monkeypatch):
    x = np.random.default_rng(0).standard_normal((16, 8, 1000))
    backend = saved(dict(enumerate(x)))
    made, parts = [], loader.parts

    def counted(store, wanted):
        found = parts(store, wanted)
        made.append(sum(data.size for data, _ in found))
        return found

    monkeypatch.setattr(loader, "parts", counted)
    monkeypatch.setattr(loader, "_COPY_SIZE", 200_000)
    lazy = opened(backend).load(lazy=True)
    found = list(loader.gather([(lazy[i], j) for i in range(16) for j in range(8)]))
    assert np.array_equal(np.stack(found), x.reshape(128, 1000))
    assert max(made) < 300_000


def test_a_chunk_that_several_parts_lie_in_is_read_once():
    x = np.random.default_rng(0).standard_normal((20_000, 1))
    backend = saved({"x": x, "same": x.copy(), "empty": np.zeros((0, 3))}, Counting())
    lazy = opened(backend).load(lazy=True)
    before = backend.read_size
    picks = [("x", slice(i, None, 7)) for i in range(7)] + [("same", slice(5)), ("empty", slice(0, 0))]
    found = list(loader.gather([(lazy[name], index) for name, index in picks]))
    for array, (name, index) in zip(found, picks, strict=True):
        assert np.array_equal(array, lazy[name].load()[index] if name == "empty" else x[index])
    assert backend.read_size - before < 1.1 * x.nbytes
    found[0][:] = 0  # each is an array of its own
    assert np.array_equal(found[7], x[:5])


def test_a_list_that_is_missing_is_told_by_its_tensor():
    run = opened(saved({"w": np.arange(5)}))
    (row,) = run.manifest().tensors
    lost = replace(row, name="lost", level=1, root=bytes(32))
    with pytest.raises(CorruptError, match=r"tensor 'lost': .*chunk 0000000000000000 is in no pack"):
        resolve(run.store, [row, replace(row, level=1), lost])


@needs_torch
def test_a_lazy_array_of_torchs_own_dtypes_becomes_one_of_numpy():
    x = torch.randn(5).to(torch.bfloat16)
    lazy = delta.load(saved({"x": x}), lazy=True)["x"]
    assert np.asarray(lazy).astype(np.float32).tolist() == x.float().tolist()


def test_a_hostile_view_without_elements_is_read_as_one_or_refused():
    backend = saved({"w": np.zeros(8)})
    run = opened(backend)
    manifest = run.manifest()
    manifest.structure["map"]["w"] = {
        "view": {"tensor": 0, "dtype": "float64", "shape": [0, 1 << 61], "strides": [8, 8], "offset": 0}
    }
    for call in (
        lambda: loader.load(run.store, manifest),
        lambda: loader.read(run.store, manifest, "w"),
    ):
        with pytest.raises(FormatError):
            call()


def test_a_state_that_was_just_saved_can_be_loaded_into_whatever_lies_between_what():
    m = np.arange(100_000.0).reshape(1000, 100)
    for state in (
        {"a": m[:, 0], "b": m[:, 1]},
        {"a": m[:, :50], "b": m[:, 50:]},
        {"a": m, "b": m[:, 1], "c": m.T},
    ):
        backend = saved(state)
        delta.load(backend, into=state)
    backend = saved({"a": np.ones((4, 2)), "b": np.zeros((4, 2))})
    target = np.full((4, 4), 7.0)
    delta.load(backend, into={"a": target[:, :2], "b": target[:, 2:]})
    assert target.tolist() == [[1, 1, 0, 0]] * 4
