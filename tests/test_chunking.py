"""Cuts that never drift, keep their average, and find the same content again."""

from __future__ import annotations

import doctest
import hashlib
import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from deltackpt import chunking
from deltackpt.chunking import Chunker
from deltackpt.errors import FormatError, InvalidInputError, UnsupportedVersionError
from deltackpt.format import CHUNK_SIZE_MAX
from deltackpt.types import U8

SMALL = Chunker(min_size=4096, avg_size=16384, max_size=65536)  # the defaults, 16 times smaller


def frozen_bytes(size: int) -> U8:
    """Noise from integer arithmetic alone (splitmix64), with a run of zeros and one of a constant."""
    z = np.arange(1, size // 8 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    data = (z ^ (z >> np.uint64(31))).astype("<u8").view(np.uint8)
    data[size // 2 : size // 8 * 7] = 0
    data[size // 4 : size // 4 + size // 16] = 0x3F
    return data


def float32_noise(n: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(n) * 0.02).astype(np.float32)


def bfloat16_bytes(n: int, seed: int = 0) -> U8:
    return (float32_noise(n, seed).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def chunks(data: U8, itemsize: int, chunker: Chunker) -> dict[bytes, int]:
    """Size by digest."""
    found, start = {}, 0
    for end in chunker.cuts(data, itemsize).tolist():
        found[hashlib.blake2b(data[start:end].tobytes(), digest_size=16).digest()] = end - start
        start = end
    return found


def flat_shards(data: U8, n_shards: int, itemsize: int, chunker: Chunker) -> dict[bytes, int]:
    """Chunks of the tensor saved as `n_shards` equal flat pieces."""
    n = data.size // itemsize
    bounds = [n * k // n_shards * itemsize for k in range(n_shards + 1)]
    found: dict[bytes, int] = {}
    for start, end in pairwise(bounds):
        found |= chunks(data[start:end], itemsize, chunker)
    return found


def new_share(now: dict[bytes, int], before: dict[bytes, int]) -> float:
    """Share of the bytes of `now` that are in no chunk of `before`."""
    return sum(size for digest, size in now.items() if digest not in before) / sum(now.values())


# Frozen (house rule 14): if one of these moves, new saves stop matching old chunks.  Never regenerate.
FROZEN = {
    2: [
        271942,
        677578,
        836838,
        961596,
        1485872,
        1838136,
        2886712,
        3688588,
        3865028,
        3949852,
        4158152,
        4194304,
    ],
    4: [606504, 966920, 1316896, 1575604, 1862532, 2911108, 3850284, 4194304],
    8: [126392, 518328, 657912, 1328856, 1422224, 1493344, 1566080, 1709608, 2758184, 3723200, 4194304],
}
FROZEN |= {1: FROZEN[4], 16: FROZEN[8]}
FROZEN_TINY = [4, 12, 24, 56, 60, 108, 116, 120, 132, 136, 200, 228, 232, 256]


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_boundaries_never_drift(itemsize: int):
    assert Chunker().cuts(frozen_bytes(4 << 20), itemsize).tolist() == FROZEN[itemsize]


def test_the_first_words_are_hashed_after_zeros():
    # Sizes below the window of four words: only then does what stands before the data matter.
    tiny = Chunker(min_size=4, avg_size=20, max_size=64)
    assert tiny.cuts(frozen_bytes(256), 4).tolist() == FROZEN_TINY


def test_zeros_are_cut_at_the_maximum_only():
    for itemsize in (1, 2, 4, 8, 16):
        assert Chunker().cuts(np.zeros(5 << 19, np.uint8), itemsize).tolist() == [1 << 20, 2 << 20, 5 << 19]


@pytest.mark.parametrize(
    ("data", "itemsize"),
    [
        (float32_noise(4 << 20).view(np.uint8), 4),
        (bfloat16_bytes(8 << 20), 2),
        (frozen_bytes(16 << 20)[: 8 << 20], 8),
    ],
    ids=["float32", "bfloat16", "8-byte noise"],
)
def test_the_average_is_what_was_asked_for(data: U8, itemsize: int):
    spread = SMALL.avg_size - SMALL.min_size
    expected = SMALL.min_size + spread * (1 - math.exp(-(SMALL.max_size - SMALL.min_size) / spread))
    # Sizes scatter by `spread`: the mean of the 500 chunks of 8 MiB is within 4 % in two cases of three.
    assert data.size / SMALL.cuts(data, itemsize).size == pytest.approx(expected, rel=0.12)


def test_small_data_is_one_chunk_and_empty_data_none():
    noise = frozen_bytes(65536)
    assert Chunker().cuts(noise, 4).tolist() == [65536]
    assert Chunker().cuts(noise[:3], 4).tolist() == [3]
    assert Chunker().cuts(noise[:0], 4).tolist() == []


@pytest.mark.parametrize(("before", "now"), [(2, 3), (3, 4), (4, 3)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_resharding_a_flat_tensor_gives_few_new_bytes(before: int, now: int, itemsize: int):
    data = float32_noise(2 << 20).view(np.uint8) if itemsize == 4 else bfloat16_bytes(4 << 20)
    old, new = (flat_shards(data, n, itemsize, SMALL) for n in (before, now))
    assert new_share(new, old) < 0.03  # a chunk or two for each of at most three new shard ends, of 512


def test_rows_inserted_into_an_embedding_give_few_new_bytes():
    table = float32_noise(30_000 * 64).reshape(30_000, 64)
    grown = np.insert(table, [5_000, 5_000, 17_001], float32_noise(3 * 64, seed=1).reshape(3, 64), axis=0)
    old, new = (chunks(t.reshape(-1).view(np.uint8), 4, SMALL) for t in (table, grown))
    assert new_share(new, old) < 0.02


def test_equal_tensors_are_cut_alike_inside_a_fused_one():
    q, k, v = (float32_noise(1 << 18, seed=s).view(np.uint8) for s in range(3))
    apart = chunks(q, 4, SMALL) | chunks(k, 4, SMALL) | chunks(v, 4, SMALL)
    assert new_share(chunks(np.concatenate([q, k, v]), 4, SMALL), apart) < 0.05


@pytest.mark.parametrize(
    "sizes", [(0, 64, 64), (64, 79, 128), (64, 256, 255), (64, 256, CHUNK_SIZE_MAX + 1), (64.0, 256, 512)]
)
def test_sizes_that_make_no_chunker_are_refused(sizes: tuple[int, int, int]):
    with pytest.raises(InvalidInputError, match="chunker: sizes are"):
        Chunker(*sizes)


def test_the_narrowest_chunker_still_leaves_zeros_uncut():
    for itemsize in (2, 4, 8):
        assert Chunker(8, 24, 64).cuts(np.zeros(256, np.uint8), itemsize).tolist() == [64, 128, 192, 256]


def test_another_element_size_is_refused():
    with pytest.raises(InvalidInputError, match="itemsize is 3"):
        Chunker().cuts(np.zeros(8, np.uint8), 3)


def test_the_descriptor_gives_the_chunker_back():
    assert Chunker.from_json(SMALL.to_json()) == SMALL
    assert Chunker().to_json() == {
        "name": "word-v1",
        "min_size": 65536,
        "avg_size": 262144,
        "max_size": 1048576,
    }


def test_an_unknown_rule_needs_an_upgrade():
    with pytest.raises(UnsupportedVersionError, match="'word-v2'"):
        Chunker.from_json({"name": "word-v2", "window": 9})


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"name": 1},
        {"name": "word-v1"},
        {**SMALL.to_json(), "min_size": "64"},
        {**SMALL.to_json(), "min_size": True},
        {**SMALL.to_json(), "max_size": 1 << 40},
        {**SMALL.to_json(), "more": 1},
    ],
)
def test_a_bad_descriptor_is_a_format_error(value: object):
    with pytest.raises(FormatError, match="chunker: "):
        Chunker.from_json(value)


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(chunking).failed == 0
