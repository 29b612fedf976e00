"""Arithmetic on byte buffers: chunk ends, byte planes, entropy, many buffers compared or moved in one call;
compiled where it can be, NumPy elsewhere.

Owns   the checks in front of `_kernels.c`, and each kernel's NumPy twin (`*_ref`): slower, equal bit for bit,
       and its specification.  ``DELTACKPT_KERNELS=numpy`` in the environment makes the twins answer.
Never  does I/O, decides how a chunk is stored, or knows what a tensor is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from deltackpt.errors import InvalidInputError
from deltackpt.types import U8

I64: TypeAlias = npt.NDArray[np.int64]
U32: TypeAlias = npt.NDArray[np.uint32]


def _load_native() -> Any:
    """The compiled module, or None where it was not built or is not wanted."""
    wanted = os.environ.get("DELTACKPT_KERNELS", "")
    if wanted not in ("", "numpy"):
        raise InvalidInputError(
            f"environment: DELTACKPT_KERNELS is {wanted!r}, expected 'numpy' or nothing",
            hint="unset DELTACKPT_KERNELS",
        )
    if wanted == "numpy":
        return None
    try:
        return import_module("deltackpt._kernels")
    except ImportError:
        return None


_native = _load_native()

#: Whether the compiled kernels answer.
NATIVE: bool = _native is not None


def describe() -> str:
    """Which kernels answer here, for reports.

    Examples
    --------
    >>> describe().startswith("C kernels" if NATIVE else "NumPy twin")
    True
    """
    if _native is None:
        return "NumPy twin (no compiled kernels)"
    isa: str = _native.isa()
    return f"C kernels, {isa}" if isa else "C kernels"


def native() -> Any:
    """Return the compiled module, None where the NumPy twins answer."""
    return _native


def check_bytes(where: str, data: U8) -> None:
    """Raise `InvalidInputError` unless `data` is contiguous uint8 of one dimension."""
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.ndim != 1
        or not data.flags.c_contiguous
    ):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InvalidInputError(
            f"{where}: got {found}, expected contiguous uint8 of one dimension",
            hint="pass np.ascontiguousarray(array).reshape(-1).view(np.uint8)",
        )


# ---- cut: content-defined chunk ends ----

# Frozen: other constants are other boundaries, and new saves would stop meeting old chunks.
# C1, C2 and FOLD are the first three 32-bit primes of xxHash (odd, bits well spread).  K has its top bit set:
# a run of zeros hashes to K, which is under no threshold up to 2**31.  With this K, none of 6,000 usual
# constants (repeated bytes, small integers, powers of two and of ten in every float width) is a hit up to
# 2**32 / 4000.
_C1 = np.uint32(0x9E3779B1)
_C2 = np.uint32(0x85EBCA77)
_FOLD = np.uint32(0xC2B2AE3D)
_K = np.uint32(0xA5C3965A)

_N_BEFORE = 3  # elements before the one that is tested and that its hash depends on
_BLOCK = 32768  # elements hashed at a time by the twin: four temporaries, 512 KiB in all, stay in L2


def cut(data: U8, align: int, min_size: int, max_size: int, threshold: int) -> I64:
    """Ends of the chunks that the content itself suggests: equal content is cut alike wherever it lies.

    Parameters
    ----------
    data : ndarray of uint8, shape (size,)
        Contiguous; any alignment in memory.
    align : {2, 4, 8}
        Bytes of an element; ends fall between elements.  Bytes behind the last whole element are in the last
        chunk.
    min_size, max_size : int
        No chunk but the last is smaller, none is larger; both are rounded inwards to elements.
    threshold : int, 0 <= threshold < 2**32
        An element ends a chunk with probability ``threshold / 2**32``, so chunks are ``min_size`` plus
        ``align * 2**32 / threshold`` bytes on average, a little less for `max_size`.

    Returns
    -------
    ndarray of int64, shape (n_chunks,)
        End offsets in bytes, ascending, the last one ``data.size``; none for empty data.

    Raises
    ------
    InvalidInputError
        If an argument is outside what is said above, or no whole element fits the sizes.

    Notes
    -----
    Elements are little-endian and become 32-bit words: ``x = u16``, ``x = u32``, or ``x = low + high * FOLD``
    of the halves of a ``u64``.  With all arithmetic modulo 2**32::

        a[i] = x[i] * C1 + rotl(x[i-1], 11)
        h[i] = ((a[i] ^ rotl(a[i-2], 15)) * C2) ^ K          x[-1], x[-2], x[-3] = 0

    A chunk that starts at element ``s`` ends after the first element ``i >= s + min - 1`` with
    ``h[i] < threshold``, or after `max` elements, or with the data.  The four words of ``h[i]`` are those
    before the end, whatever chunk they are in: an end depends on content and on the end before it, never on
    an offset.

    No table look-up and no carried state, unlike Gear (Xia et al., FastCDC, USENIX ATC 2016): every lane of a
    vector hashes on its own.  Zeros are cut at `max_size` only.  Of all other constant words a share of
    ``threshold / 2**32`` hashes under the threshold and is cut at every `min_size` instead: smaller chunks,
    all equal, still correct.  Data with fewer distinct windows of four elements than ``2**32 / threshold``,
    such as random 0 and 1, may have no hit at all and is then cut at `max_size`.

    Examples
    --------
    >>> cut(np.zeros(1000, np.uint8), 4, 100, 400, 1 << 24)
    array([ 400,  800, 1000])
    """
    min_n, _ = _check_cut(data, align, min_size, max_size, threshold)
    if _native is None:
        return cut_ref(data, align, min_size, max_size, threshold)
    ends = np.empty(data.size // (min_n * align) + 1, np.int64)
    n_ends: int = _native.cut(data, ends, align, min_size, max_size, threshold)
    return ends[:n_ends].copy()


def cut_ref(data: U8, align: int, min_size: int, max_size: int, threshold: int) -> I64:
    """The NumPy twin of `cut`."""
    min_n, max_n = _check_cut(data, align, min_size, max_size, threshold)
    n = data.size // align
    hits = _cut_hits(data, align, threshold) if n >= min_n else np.empty(0, np.int64)
    ends: list[int] = []
    start = 0
    while start * align < data.size and (not ends or ends[-1] < data.size):
        ends.append(_chunk_end(hits, start, n, min_n, max_n, align, data.size))
        start = ends[-1] // align
    return np.array(ends, np.int64)


def _check_cut(data: U8, align: int, min_size: int, max_size: int, threshold: int) -> tuple[int, int]:
    """The smallest and the largest chunk in elements."""
    check_bytes("cut: data", data)
    if align not in (2, 4, 8):
        raise InvalidInputError(f"cut: align is {align}, expected 2, 4 or 8")
    min_n, max_n = -(-min_size // align), max_size // align
    if not 1 <= min_n <= max_n or max_size >= 1 << 62:
        raise InvalidInputError(
            f"cut: sizes are {min_size} to {max_size}, "
            f"expected 1 <= min <= max with a multiple of {align} between them",
        )
    if not 0 <= threshold < 1 << 32:
        raise InvalidInputError(f"cut: threshold is {threshold}, expected 0 <= threshold < 2**32")
    return min_n, max_n


def _chunk_end(hits: I64, start: int, n: int, min_n: int, max_n: int, align: int, size: int) -> int:
    """End offset of the chunk that starts at element `start`; `hits` are all elements under the threshold."""
    if n - start < min_n:
        return size
    stop = min(n, start + max_n)
    place = int(np.searchsorted(hits, start + min_n - 1))
    if place < hits.size and hits[place] < stop:
        return (int(hits[place]) + 1) * align
    return stop * align if stop == start + max_n else size


def _cut_hits(data: U8, align: int, threshold: int) -> I64:
    """Elements whose hash is under the threshold, ascending."""
    n = data.size // align
    width = min(n, _BLOCK)
    words = np.zeros(width + _N_BEFORE, np.uint32)  # zeros stand for the elements before the data
    scratch = np.empty((3, words.size), np.uint32)
    hits = []
    for start in range(0, n, width):
        stop = min(n, start + width)
        m = stop - start
        _load_words(data[start * align : stop * align], align, words[_N_BEFORE : _N_BEFORE + m])
        hashes = _hash_words(words[: _N_BEFORE + m], scratch)
        hits.append(np.flatnonzero(hashes < np.uint32(threshold)) + start)
        words[:_N_BEFORE] = words[m : m + _N_BEFORE].copy()
    return np.concatenate(hits).astype(np.int64, copy=False)


def _load_words(data: U8, align: int, out: U32) -> None:
    if align == 8:
        halves = data.view("<u4")
        np.multiply(halves[1::2], _FOLD, out=out)
        np.add(out, halves[::2], out=out)
    else:
        np.copyto(out, data.view(f"<u{align}"))


def _hash_words(words: U32, scratch: U32) -> U32:
    """Hash at every word but the first three; `scratch`, of shape (3, words.size) or wider, is used up."""
    m = words.size
    pair, left, right = scratch[0, : m - 1], scratch[1, : m - 1], scratch[2, : m - 1]
    np.multiply(words[1:], _C1, out=pair)
    np.left_shift(words[:-1], np.uint32(11), out=left)
    np.add(pair, left, out=pair)  # the halves of a rotation share no bit: adding both adds the rotation
    np.right_shift(words[:-1], np.uint32(32 - 11), out=right)
    np.add(pair, right, out=pair)
    left, right = left[: m - 3], right[: m - 3]
    np.left_shift(pair[:-2], np.uint32(15), out=left)
    np.right_shift(pair[:-2], np.uint32(32 - 15), out=right)
    np.bitwise_or(left, right, out=left)
    np.bitwise_xor(left, pair[2:], out=left)
    np.multiply(left, _C2, out=left)
    np.bitwise_xor(left, _K, out=left)
    return left


# ---- byte planes ----

_WIDTHS = (1, 2, 4, 8)


def split_planes(data: U8, itemsize: int, rotate: bool, out: U8 | None = None) -> U8:
    """Gather byte ``k`` of every element together, so that bytes of one kind compress together.

    Parameters
    ----------
    data : ndarray of uint8, shape (n * itemsize,)
        Little-endian elements.
    itemsize : {1, 2, 4, 8}
        Bytes of an element.
    rotate : bool
        First rotate every element left by one bit: a float's sign moves next to its mantissa, and the top
        byte is exponent alone.
    out : ndarray of uint8, shape (n * itemsize,), optional
        Where to; shares no memory with `data`.  Fresh memory costs more than the work.

    Returns
    -------
    ndarray of uint8, shape (n * itemsize,)
        Plane 0 (the low bytes), then plane 1, and so on, `n` bytes each.

    Raises
    ------
    InvalidInputError
        If `itemsize` is another, or does not divide ``data.size``.

    Notes
    -----
    Byte shuffle as in Blosc (Alted, CiSE 12(2), 2010).  Bits move and are never read as numbers, so NaN
    payloads survive.

    Examples
    --------
    >>> split_planes(np.array([1, 2, 3, 4], np.uint8), 2, rotate=False)
    array([1, 3, 2, 4], dtype=uint8)
    """
    if _native is None:
        return split_planes_ref(data, itemsize, rotate, out)
    planes = _split_out(data, itemsize, out)
    _native.split_planes(data, planes, itemsize, rotate)
    return planes


def split_planes_ref(data: U8, itemsize: int, rotate: bool, out: U8 | None = None) -> U8:
    """The NumPy twin of `split_planes`."""
    planes = _split_out(data, itemsize, out)
    if rotate:
        elements = data.view(f"<u{itemsize}")
        data = ((elements << 1) | (elements >> (8 * itemsize - 1))).view(np.uint8)
    planes.reshape(itemsize, -1)[...] = data.reshape(-1, itemsize).T
    return planes


def join_planes(planes: U8, itemsize: int, rotate: bool, out: U8) -> None:
    """Undo `split_planes`, into `out`.

    Parameters
    ----------
    planes : ndarray of uint8, shape (n * itemsize,)
        What `split_planes` gave.
    itemsize, rotate
        What it was given.
    out : ndarray of uint8, shape (n * itemsize,)
        Writable; shares no memory with `planes`.

    Raises
    ------
    InvalidInputError
        If the sizes differ, `itemsize` does not divide them, or `out` is read-only or overlaps `planes`.

    Examples
    --------
    >>> out = np.empty(4, np.uint8)
    >>> join_planes(np.array([1, 3, 2, 4], np.uint8), 2, rotate=False, out=out)
    >>> out
    array([1, 2, 3, 4], dtype=uint8)
    """
    if _native is None:
        join_planes_ref(planes, itemsize, rotate, out)
        return
    _check_join(planes, itemsize, out)
    _native.join_planes(planes, out, itemsize, rotate)


def join_planes_ref(planes: U8, itemsize: int, rotate: bool, out: U8) -> None:
    """The NumPy twin of `join_planes`."""
    _check_join(planes, itemsize, out)
    for k, plane in enumerate(planes.reshape(itemsize, -1)):
        out[k::itemsize] = plane  # one transposed assignment takes up to 6 times as long
    if rotate:
        elements = out.view(f"<u{itemsize}")
        sign = elements << (8 * itemsize - 1)
        elements >>= 1
        elements |= sign


def _split_out(data: U8, itemsize: int, out: U8 | None) -> U8:
    _check_planes("split_planes: data", data, itemsize)
    if out is None:
        return np.empty_like(data)
    check_bytes("split_planes: out", out)
    if out.size != data.size or np.may_share_memory(out, data):
        raise InvalidInputError(
            f"split_planes: out has {out.size} bytes, expected {data.size} apart from data"
        )
    return out


def _check_planes(where: str, data: U8, itemsize: int) -> None:
    check_bytes(where, data)
    if itemsize not in _WIDTHS:
        raise InvalidInputError(f"{where}: itemsize is {itemsize}, expected 1, 2, 4 or 8")
    if data.size % itemsize:
        raise InvalidInputError(f"{where}: size is {data.size}, expected a multiple of {itemsize}")


def _check_join(planes: U8, itemsize: int, out: U8) -> None:
    _check_planes("join_planes: planes", planes, itemsize)
    check_bytes("join_planes: out", out)
    if out.size != planes.size:
        raise InvalidInputError(f"join_planes: out has {out.size} bytes, expected {planes.size}")
    if not out.flags.writeable:
        raise InvalidInputError("join_planes: out is read-only, expected writable")
    if np.may_share_memory(planes, out):
        raise InvalidInputError("join_planes: out overlaps planes, expected memory of its own")


# ---- entropy ----


#: Bytes of a sample: 4096 read noise as about 7.95 bits.
N_SAMPLES = 4096


def entropy(data: U8, n_samples: int = N_SAMPLES) -> float:
    """Bits per byte that an order-0 coder would need, judged by a sample: 8.0 is noise, 0.0 is one value.

    Parameters
    ----------
    data : ndarray of uint8, shape (size,)
        Bytes of one kind, e.g. a byte plane.
    n_samples : int, default 4096
        Bytes looked at, at most.  4096 of them read noise as about 7.95: a finite sample hides a little.

    Returns
    -------
    float
        0.0 to 8.0; 0.0 for empty data.  The same on every call.

    Raises
    ------
    InvalidInputError
        If `n_samples` is less than 1.

    Notes
    -----
    The sample is every `step`-th byte; `step` is odd, so that rows of 2**k elements do not give one column
    only.  Counts by a table of ``c * log2(c)`` in whole numbers, so that C and NumPy sum to the same bit.

    Examples
    --------
    >>> entropy(np.arange(256, dtype=np.uint8))
    8.0
    """
    return entropies([data], n_samples)[0]


def entropy_ref(data: U8, n_samples: int = N_SAMPLES) -> float:
    """The NumPy twin of `entropy`."""
    return entropies_ref([data], n_samples)[0]


def entropies(planes: Sequence[U8], n_samples: int = N_SAMPLES) -> list[float]:
    """The `entropy` of each of several planes.

    Examples
    --------
    >>> entropies([np.array([7, 7, 7], np.uint8), np.array([1, 2, 3, 4], np.uint8)])
    [0.0, 2.0]
    """
    _check_sample(planes, n_samples)
    if _native is None:
        return entropies_ref(planes, n_samples)
    found: list[float] = _native.entropies(tuple(planes), logs(_n_most(planes, n_samples)), n_samples)
    return found


def entropies_ref(planes: Sequence[U8], n_samples: int = N_SAMPLES) -> list[float]:
    """The NumPy twin of `entropies`."""
    _check_sample(planes, n_samples)
    table = logs(_n_most(planes, n_samples))
    found = []
    for plane in planes:
        step = max(1, (plane.size // n_samples - 1) | 1)
        sample = plane[::step][:n_samples]
        rest = int(table[sample.size] - table[np.bincount(sample, minlength=256)].sum())
        found.append(rest / (sample.size * 2.0**32) if sample.size else 0.0)
    return found


def _check_sample(planes: Sequence[U8], n_samples: int) -> None:
    if n_samples < 1:
        raise InvalidInputError(f"entropy: n_samples is {n_samples}, expected 1 or more")
    for plane in planes:
        check_bytes("entropy: data", plane)


def _n_most(planes: Sequence[U8], n_samples: int) -> int:
    """Return a number that no sample is larger than, the same for all that are small."""
    return (
        N_SAMPLES
        if n_samples <= N_SAMPLES
        else min(n_samples, max((plane.size for plane in planes), default=0))
    )


@lru_cache(maxsize=2)
def logs(n_most: int) -> I64:
    """``c * log2(c)`` of counts up to `n_most`, in 2**-32: what the compiled kernels take entropies by."""
    counts = np.arange(n_most + 1)
    table: I64 = np.rint(counts * np.log2(np.maximum(counts, 1)) * 2.0**32).astype(np.int64)
    return table


# ---- many buffers ----


class Splitting(NamedTuple):
    """What `split_planes` is given."""

    data: U8
    itemsize: int
    rotate: bool
    out: U8


def split_all(splits: Sequence[Splitting]) -> list[list[float]]:
    """Do `split_planes` of each, all in one call, and return the `entropy` of each plane.

    Examples
    --------
    >>> out = np.empty(4, np.uint8)
    >>> split_all([Splitting(np.array([1, 2, 1, 4], np.uint8), 2, False, out)])
    [[0.0, 1.0]]
    >>> out.tolist()
    [1, 1, 2, 4]
    """
    if _native is None or not splits:
        return split_all_ref(splits)
    items = tuple((data, _split_out(data, width, out), width, rotate) for data, width, rotate, out in splits)
    bits: list[list[float]] = _native.split_all(items, logs(N_SAMPLES), N_SAMPLES)
    return bits


def split_all_ref(splits: Sequence[Splitting]) -> list[list[float]]:
    """The NumPy twin of `split_all`."""
    return [entropies_ref(list(split_planes_ref(*one).reshape(one.itemsize, -1))) for one in splits]


#: Bytes of any kind: arrays, and what codecs of other libraries return.
Bytes: TypeAlias = Any


class Move(NamedTuple):
    """Bytes to be copied: those of `source` to `offset` in `out`."""

    out: U8
    offset: int
    source: Bytes


def are_equal(pairs: Sequence[tuple[Bytes, Bytes]]) -> list[bool]:
    """Return which pairs of buffers are the same bytes, all compared in one call.

    A thread that lets go of the interpreter's lock for each waits for it longer than comparing takes.

    Examples
    --------
    >>> are_equal([(b"abc", np.frombuffer(b"abc", np.uint8)), (b"a", b"b"), (b"a", b"ab")])
    [True, False, False]
    """
    if _native is None or not pairs:
        return are_equal_ref(pairs)
    left, right = zip(*pairs, strict=True)
    found: list[bool] = _native.are_equal(left, right)
    return found


def are_equal_ref(pairs: Sequence[tuple[Bytes, Bytes]]) -> list[bool]:
    """The NumPy twin of `are_equal`."""
    return [bytes(a) == bytes(b) for a, b in pairs]


def move(moves: Sequence[Move]) -> None:
    """Copy bytes, one after another and all in one call; what is copied may overlap where it goes.

    Raises
    ------
    InvalidInputError
        If something does not fit where it is to go; what is before it may be copied by then.

    Examples
    --------
    >>> out = np.array([1, 2, 3, 4], np.uint8)
    >>> move([Move(out, 0, out[1:]), Move(out, 3, b"x")])
    >>> out.tolist()
    [2, 3, 4, 120]
    """
    if _native is None or not moves:
        move_ref(moves)
        return
    try:
        _native.move(tuple(moves))
    except ValueError as e:
        raise InvalidInputError(f"{e}") from e


def move_ref(moves: Sequence[Move]) -> None:
    """The NumPy twin of `move`."""
    for out, offset, source in moves:
        data = np.frombuffer(source, np.uint8)
        if offset < 0 or offset + data.size > out.size:
            raise InvalidInputError("move: what is moved does not fit where it is to go")
        out[offset : offset + data.size] = data
