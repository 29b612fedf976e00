"""Shards of a tensor: where those of one number of ranks stood in those of another."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from deltackpt.integrations.shards import _pieces, needed, resharded
from deltackpt.manifest import TensorRow
from deltackpt.memory import Known, Memory
from deltackpt.types import Tensor

COLUMNS, ITEMSIZE = 5, 4


def shard(name, rows, data):
    return Tensor(name, "float32", (rows, COLUMNS), "torch", data)


def remembered(name, rows, data, cuts):
    """A shard as a save before has left it; the ids of its chunks are their bytes."""
    ends = np.array([*cuts, data.size])
    chunks = np.split(data, cuts)
    ids = np.zeros((len(ends), 32), np.uint8)
    ids[:, :8] = [list(hash(chunk.tobytes()).to_bytes(8, "little", signed=True)) for chunk in chunks]
    row = TensorRow(name, "float32", (rows, COLUMNS), "torch", data.size, 0, b"", name.encode())
    chunk_of = {i.tobytes(): chunk for i, chunk in zip(ids, chunks, strict=True)}
    return Known(row, ends, ids, None, None), chunk_of


def partition(n, borders):
    edges = sorted({0, n, *(b for b in borders if b < n)})
    return list(pairwise(edges))


@given(
    st.integers(1, 40_000),
    st.lists(st.integers(1, 40_000), max_size=6),
    st.lists(st.integers(1, 40_000), max_size=6),
    st.lists(st.floats(0.01, 0.99), max_size=4),
)
def test_pieces_are_the_bytes_they_stand_for(n_rows, before, after, cuts):
    row_size = COLUMNS * ITEMSIZE
    data = np.random.default_rng(0).integers(0, 256, n_rows * row_size, np.uint8)
    memory, chunks = Memory(), {}
    for a, b in partition(n_rows, before):
        part = data[a * row_size : b * row_size]
        at = sorted({int(part.size * c) // ITEMSIZE * ITEMSIZE for c in cuts} - {0, part.size})
        known, found = remembered(f"tensors.layer.w.{a},0", b - a, part, at)
        memory.add(known)
        chunks |= found
    new = [
        shard(f"tensors.layer.w.{a},0", b - a, data[a * row_size : b * row_size])
        for a, b in partition(n_rows, after)
    ]
    pieces = resharded(memory, new).pieces
    for tensor in new:
        if tensor.name not in pieces:
            n_at_most = (len(cuts) + 1) * (len(before) + 1)
            assert memory.same_place(tensor) is not None or tensor.size < n_at_most * (16 << 10)
            continue
        p = pieces[tensor.name]
        assert p.ends[-1] == tensor.size
        assert len(p.ends) <= max(1, tensor.size // (16 << 10))
        for start, end, i, offset in zip([0, *p.ends], p.ends, p.ids, p.offsets, strict=False):
            piece = chunks[i.tobytes()][offset : offset + end - start]
            assert np.array_equal(piece, tensor.data[start:end])


def test_what_was_not_there_before_in_whole_has_no_pieces():
    data = np.zeros(100_000 * COLUMNS * ITEMSIZE, np.uint8)
    memory = Memory([remembered("tensors.w.0,0", 60_000, data[: 60_000 * 20], [])[0]])
    new = [
        shard("tensors.w.50000,0", 50_000, data[50_000 * 20 :]),  # ends later
        shard("tensors.v.0,0", 50_000, data[: 50_000 * 20]),  # another tensor
        shard("tensors.w.0,5", 50_000, data[: 50_000 * 20]),  # other columns
        Tensor("tensors.w.0,0", "int32", (50_000, COLUMNS), "torch", data[: 50_000 * 20]),
        Tensor("tensors.w.0", "float32", (250_000,), "torch", data[: 50_000 * 20]),
        Tensor("tensors.w", "float32", (50_000, COLUMNS), "torch", data[: 50_000 * 20]),
    ]
    assert not resharded(memory, new).pieces
    assert list(resharded(memory, [shard("tensors.w.7,0", 50_000, data[7 * 20 : 50_007 * 20])]).pieces) == [
        "tensors.w.7,0"
    ]


def test_a_rank_remembers_its_own_shards_unless_they_are_others():
    data = np.zeros(COLUMNS * ITEMSIZE, np.uint8)
    names = ["tensors.w.0,0", "tensors.w.1,0", "tensors.v.0,0", "tensors.v.1,0", "values.numbers"]
    rows = [remembered(name, 1, data, [])[0].row for name in names]

    def found(**shards):
        tensors = {
            fqn: {key: np.zeros(shape) for key, shape in of.items()}  # of which it is only asked how large
            for fqn, of in shards.items()
        }
        return [row.name for row in needed(rows, {"tensors": tensors})]

    own = (1, COLUMNS)
    assert found(w={"0,0": own}, v={"1,0": own}) == ["tensors.w.0,0", "tensors.v.1,0", "values.numbers"]
    assert found(w={"0,0": own}, new={"0,0": own}) == ["tensors.w.0,0", "values.numbers"]
    assert found(w={"0,0": own}, v={"2,0": own}) == names
    assert found(w={"0,0": (2, COLUMNS)}) == names


def test_what_is_called_as_a_shard_and_is_none_has_no_pieces():
    data = np.zeros(1000 * COLUMNS * ITEMSIZE, np.uint8)
    memory = Memory([remembered("values.history.0,0", 1000, data, [])[0]])
    assert not resharded(memory, [shard("values.history.500,0", 500, data[: data.size // 2])]).pieces


def test_shards_at_offsets_that_no_tensor_has_are_passed_over():
    data = np.zeros(1000 * COLUMNS * ITEMSIZE, np.uint8)
    names = ["tensors.w.0,0", f"tensors.w.{10**18 - 1},0"]
    memory = Memory([remembered(name, 1000, data, [])[0] for name in names])
    new = [shard(f"tensors.w.{row},0", 500, data[: data.size // 2]) for row in (500, 10**18 - 2)]
    assert list(resharded(memory, new).pieces) == ["tensors.w.500,0"]


def test_pieces_are_those_of_the_tensors_given_last():
    data = np.zeros(1000 * COLUMNS * ITEMSIZE, np.uint8)
    memory = Memory([remembered("tensors.w.0,0", 1000, data, [])[0]])
    assert resharded(memory, [shard("tensors.w.500,0", 500, data[: data.size // 2])]).pieces
    assert not resharded(memory, [shard("tensors.w.500,0", 1000, data)]).pieces  # it ends later


class Counted(list):
    """Counts how often an item is looked at."""

    n_looks = 0

    def __getitem__(self, i):
        self.n_looks += 1
        return super().__getitem__(i)

    def __iter__(self):
        for i in range(len(self)):
            yield self[i]


def test_of_a_thousand_shards_those_are_looked_at_that_hold_the_pieces():
    data = np.zeros(16 << 10, np.uint8)
    known = remembered("tensors.w.0", 1, data, [])[0]
    shards = Counted((i * data.size, known) for i in range(1000))
    pieces = _pieces(700 * data.size, 3 * data.size, shards)
    assert pieces.ends.tolist() == [data.size, 2 * data.size, 3 * data.size]
    assert shards.n_looks < 30
