"""Differences of a chunk to its base, element by element: compiled where it can be, NumPy elsewhere.

Owns   the checks in front of the delta part of `_kernels.c`, and each kernel's NumPy twin (`*_ref`).
Never  does I/O, decides what is a delta, or knows what a chunk is.

An element becomes an integer that is near where the number is near (its *map*), the base's is subtracted,
wrapping, and the result zigzagged, so that small steps of either sign are small numbers.  Integers only:
NaN payloads, -0.0 and denormals come back as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from deltackpt import kernels
from deltackpt.errors import InvalidInputError
from deltackpt.types import U8

_native = kernels.native()

#: Maps: integers as they are; floats in the order of their values; floats with the sign beside the mantissa.
INTEGER, SUB, RSUB = 0, 1, 2
#: Casts: none, or the base's elements narrowed to the nearest, ties to even.
NO_CAST, F32_BF16, F32_F16, F64_F32 = 0, 1, 2, 3
#: (bytes of the base's element, bytes of the chunk's)
CAST_WIDTHS = {F32_BF16: (4, 2), F32_F16: (4, 2), F64_F32: (8, 4)}
#: A scale is between these: what is scaled stays far from infinity and from the denormals.
SCALE_MIN, SCALE_MAX = 2.0**-6, 2.0
_WIDTHS = (1, 2, 4, 8)
#: A length is a class if one in so many differences has it.
_RARE = 32
#: Classes that share a byte, by how many there are.
_DIGITS = {2: 8, 3: 5, 4: 4, 5: 3}
N_CLASSES_MAX = 5

#: Differences by class: the length of its planes, and how many are of it; ascending.
Classes: TypeAlias = dict[int, int]


class Form(NamedTuple):
    """How a chunk's elements are compared with the base's.

    Parameters
    ----------
    itemsize : {1, 2, 4, 8}
        Bytes of the chunk's elements.
    map : {INTEGER, SUB, RSUB}
    cast : int
        A key of `CAST_WIDTHS`, or NO_CAST.
    scale : float
        What the base's elements are multiplied by, a float32 between SCALE_MIN and SCALE_MAX, as floats of
        their width (2 bytes as bfloat16): moments that decay are foreseen by it.  1.0: not at all.
    """

    itemsize: int
    map: int
    cast: int = NO_CAST
    scale: float = 1.0

    @property
    def base_itemsize(self) -> int:
        """Bytes of an element of the base."""
        return CAST_WIDTHS[self.cast][0] if self.cast else self.itemsize

    def check(self) -> None:
        """Raise `InvalidInputError` unless all of it is in range."""
        ok = self.itemsize in _WIDTHS and self.map in (INTEGER, SUB, RSUB)
        if self.cast != NO_CAST:
            ok = ok and self.cast in CAST_WIDTHS and CAST_WIDTHS[self.cast][1] == self.itemsize
        if not ok or not SCALE_MIN < np.float32(self.scale) < SCALE_MAX:
            raise InvalidInputError(f"difference: {self} is out of range")


def lengths_ref(data: U8, base: U8, form: Form) -> list[int]:
    """Return how many of the differences have each length: their bytes but for zeros at the top.

    A part of `group_all_ref`: how many are of 0, 1, ..., `form.itemsize` bytes.

    Examples
    --------
    >>> data, base = (np.array(x, "<f4").view(np.uint8) for x in ([1.0, 2.0], [1.0000001, 2.0]))
    >>> lengths_ref(data, base, Form(4, SUB))
    [1, 1, 0, 0, 0]
    """
    found: list[int] = np.bincount(
        _lengths_of(_differences(data, base, form)), minlength=form.itemsize + 1
    ).tolist()
    return found


def classes(counts: Sequence[int]) -> Classes:
    """Return into which classes differences are best grouped, given how many there are of each length.

    A length that fewer than one in 32 have is no class of its own: those are stored with a byte more.  It
    would make the digits of all longer, by up to half a bit.

    Examples
    --------
    >>> classes([0, 10, 500, 490, 0])
    {2: 510, 3: 490}
    >>> classes([0, 0, 0, 0, 0])
    {0: 0}
    """
    n = sum(counts)
    longest = max((length for length, count in enumerate(counts) if count), default=0)
    for rare in (_RARE, 16, 8, 4):  # above a fourth are three at most, and the longest
        found: Classes = {}
        waiting = 0
        for length, count in enumerate(counts[: longest + 1]):
            waiting += count
            if length == longest or waiting * rare > n:
                found[length] = waiting
                waiting = 0
        if len(found) <= N_CLASSES_MAX:
            break
    return found


def plane_sizes(of: Classes) -> list[int]:
    """Return the bytes of each plane that differences are grouped into, in order.

    Examples
    --------
    >>> plane_sizes({1: 10, 3: 4})
    [2, 10, 4, 4, 4]
    """
    digits = -(-sum(of.values()) // _DIGITS[len(of)]) if len(of) > 1 else 0
    return [*([digits] if len(of) > 1 else []), *(n for length, n in of.items() for _ in range(length))]


class Pair(NamedTuple):
    """Elements and those they are compared with.

    Parameters
    ----------
    data : ndarray of uint8, shape (n * form.itemsize,)
    base : ndarray of uint8, shape (n * form.base_itemsize,)
    form : Form
    out : ndarray of uint8
        Room for the planes: (1 + 1 / 8) bytes for each of `data` and 8 more are always enough.
    n_few : int
        If at most so many elements differ (cast but not scaled) nothing is written; -1: never.
    """

    data: U8
    base: U8
    form: Form
    out: U8
    n_few: int = -1


class Grouped(NamedTuple):
    """Differences as `group_all` wrote them.

    Parameters
    ----------
    of : dict
        The `classes`.
    bits : list of float
        `kernels.entropy` of each plane.
    data_bits : float
        That of the data.
    """

    of: Classes
    bits: list[float]
    data_bits: float


def group_all(pairs: Sequence[Pair]) -> list[Grouped | int]:
    """Write the zigzagged differences of each pair into its `out`: which class each is of, then their bytes.

    If there are several classes, first comes the number of each difference's class, the first class being
    0, several to a byte: digits of a number to the base of how many classes there are, the first the lowest.
    Then the planes of each class: byte 0 of each of its differences, byte 1, up to its length.  The sizes
    are those of `plane_sizes`.

    Returns
    -------
    list of Grouped or int
        The number of elements that differ where they are few: see `Pair.n_few`.

    Raises
    ------
    InvalidInputError
        If sizes do not fit, a form is out of range, or the data is changed meanwhile.

    Notes
    -----
    One call for many: a thread that lets go of the interpreter's lock for every chunk, 25 to 100 us apart,
    gains nothing from a second core.

    Examples
    --------
    >>> data, base = np.array([7, 7, 9, 7], np.uint8), np.full(4, 7, np.uint8)
    >>> out = np.zeros(4, np.uint8)
    >>> pair = Pair(data, base, Form(1, INTEGER), out)
    >>> grouped, n = group_all([pair, pair._replace(n_few=1)])
    >>> grouped.of, grouped.bits, n
    ({0: 3, 1: 1}, [0.0, 0.0], 1)
    >>> out
    array([4, 4, 0, 0], dtype=uint8)
    """
    for pair in pairs:
        _check(pair.data, pair.base, pair.form)
    if _native is None or not pairs:
        return group_all_ref(pairs)
    items = tuple(
        (data, base, out, form.itemsize, form.map, form.cast, form.scale, n_few)
        for data, base, form, out, n_few in pairs
    )
    try:
        found = _native.delta_group(items, kernels.logs(kernels.N_SAMPLES), kernels.N_SAMPLES)
    except ValueError as e:
        raise InvalidInputError(f"difference: {e}") from e
    return [one if isinstance(one, int) else Grouped._make(one) for one in found]


def group_all_ref(pairs: Sequence[Pair]) -> list[Grouped | int]:
    """The NumPy twin of `group_all`."""
    found: list[Grouped | int] = []
    for data, base, form, out, n_few in pairs:
        changed = count_changed_ref(data, base, form)
        if changed <= n_few:
            found.append(changed)
            continue
        of = classes(lengths_ref(data, base, form))
        ends = list(accumulate(sizes := plane_sizes(of), initial=0))
        if ends[-1] > out.size:
            raise InvalidInputError(f"difference: {out.size} bytes for {of}")
        group_ref(data, base, form, of, out[: ends[-1]])
        planes = [out[end - size : end] for size, end in zip(sizes, ends[1:], strict=True)]
        *bits, data_bits = kernels.entropies_ref([*planes, data])
        found.append(Grouped(of, bits, data_bits))
    return found


def group_ref(data: U8, base: U8, form: Form, of: Classes, out: U8) -> None:
    """Write the planes of differences, given their classes: a part of `group_all_ref`."""
    differences = _differences(data, base, form)
    class_of = np.searchsorted(np.array(list(of)), _lengths_of(differences))
    if np.bincount(class_of, minlength=len(of)).tolist() != list(of.values()):
        raise InvalidInputError(f"difference: the classes are not {of}")
    parts = []
    if len(of) > 1:
        per = _DIGITS[len(of)]
        digits = np.zeros(-(-len(class_of) // per) * per, np.int64)
        digits[: len(class_of)] = class_of
        parts.append((digits.reshape(-1, per) * len(of) ** np.arange(per)).sum(axis=1).astype(np.uint8))
    for number, length in enumerate(of):
        some = differences[class_of == number].view(np.uint8).reshape(-1, form.itemsize)
        parts += [some[:, k] for k in range(length)]
    np.concatenate([np.empty(0, np.uint8), *parts], out=out)


class Planed(NamedTuple):
    """Differences by class, and what they are to be added to.

    Parameters
    ----------
    planes : sequence of ndarray of uint8 or None
        Of `plane_sizes` each.  None: all zeros.
    base : ndarray of uint8, shape (n * form.base_itemsize,)
    form : Form
    of : dict
        As of `Grouped`.
    out : ndarray of uint8, shape (n * form.itemsize,)
    """

    planes: Sequence[U8 | None]
    base: U8
    form: Form
    of: Classes
    out: U8


def ungroup_all(planed: Sequence[Planed]) -> list[bool]:
    """Undo `group_all`: fill each `out` from the planes of the differences, and the base.

    In their order, and all in one call: the base of one may be the `out` of another before it.

    Returns
    -------
    list of bool
        False if the first plane does not name exactly as many of each class; `out` is then of no use.

    Raises
    ------
    InvalidInputError
        If sizes do not fit or a form is out of range.
    """
    for one in planed:
        _check(one.out, one.base, one.form)
        _check_classes(one.of, one.out.size // one.form.itemsize, one.form)
        sizes = plane_sizes(one.of)
        if len(one.planes) != len(sizes) or any(
            p is not None and p.size != size for p, size in zip(one.planes, sizes, strict=True)
        ):
            raise InvalidInputError(f"difference: {len(one.planes)} planes do not give {one.of}")
    if _native is None or not planed:
        return [ungroup_ref(*one) for one in planed]
    items = tuple(
        (tuple(planes), base, out, form.itemsize, form.map, form.cast, form.scale, of)
        for planes, base, form, of, out in planed
    )
    fits: list[bool] = _native.delta_ungroup(items)
    return fits


def ungroup_ref(planes: Sequence[U8 | None], base: U8, form: Form, of: Classes, out: U8) -> bool:
    """The NumPy twin of `ungroup_all`, of one."""
    n = out.size // form.itemsize
    given = iter(planes)
    class_of = np.zeros(n, np.int64)
    if len(of) > 1 and (digits := next(given)) is not None:
        each = digits[:, None].astype(np.int64) // len(of) ** np.arange(_DIGITS[len(of)]) % len(of)
        class_of = each.ravel()[:n]
    if np.bincount(class_of, minlength=len(of)).tolist() != list(of.values()):
        return False
    differences = np.zeros((n, form.itemsize), np.uint8)
    for number, length in enumerate(of):
        at = np.flatnonzero(class_of == number)
        for k in range(length):
            plane = next(given)
            if plane is not None:
                differences[at, k] = plane
    _apply(differences.reshape(-1).view(_uint(form.itemsize)), _prepared(base, form), form, out)
    return True


def count_changed(data: U8, base: U8, form: Form) -> int:
    """Return how many elements differ from the base's, cast but not scaled."""
    _check(data, base, form)
    if _native is None:
        return count_changed_ref(data, base, form)
    n: int = _native.count_changed(data, base, form.itemsize, form.cast)
    return n


def count_changed_ref(data: U8, base: U8, form: Form) -> int:
    """The NumPy twin of `count_changed`."""
    same = data.view(_uint(form.itemsize)) == _prepared(base, form._replace(scale=1.0))
    return int(same.size - np.count_nonzero(same))


def take(data: U8, base: U8, form: Form, *, bitmap: bool, places: U8, packed: U8) -> int:
    """Write the differences of the changed elements alone into `packed`, and where they are into `places`.

    Parameters
    ----------
    data, base : ndarray of uint8
        As of `Pair`.
    form : Form
        Its scale must be 1.0.
    bitmap : bool
        Places as one bit an element, the lowest bit first; else as one byte an element that changed, the
        number of elements before it that did not, where 255 stands for 255 of them and goes on.
    places : ndarray of uint8
        Room for (n + 7) // 8 bytes, or for n_changed + n // 255.
    packed : ndarray of uint8, shape (n_changed * form.itemsize,)

    Returns
    -------
    int
        Bytes of `places` that are used.

    Raises
    ------
    InvalidInputError
        If sizes do not fit, or `packed` is not exactly as large as it must be.

    Examples
    --------
    >>> data, base = np.array([7, 7, 9, 7], np.uint8), np.full(4, 7, np.uint8)
    >>> places, packed = np.empty(8, np.uint8), np.empty(1, np.uint8)
    >>> take(data, base, Form(1, INTEGER), bitmap=False, places=places, packed=packed)
    1
    >>> places[:1].tolist(), packed.tolist()
    ([2], [4])
    """
    _check(data, base, form)
    if form.scale != 1.0:
        raise InvalidInputError("difference: what is sparse is not scaled")
    if _native is None:
        return take_ref(data, base, form, bitmap=bitmap, places=places, packed=packed)
    try:
        n: int = _native.sparse_take(data, base, places, packed, form.itemsize, form.map, form.cast, bitmap)
    except ValueError as e:
        raise InvalidInputError(f"difference: {e}") from e
    return n


def take_ref(data: U8, base: U8, form: Form, *, bitmap: bool, places: U8, packed: U8) -> int:
    """The NumPy twin of `take`."""
    differences = _differences(data, base, form)
    changed = np.flatnonzero(differences)
    if bitmap:
        found = np.packbits(differences != 0, bitorder="little")
    else:
        gaps = np.diff(changed, prepend=-1) - 1
        n_full = gaps // 255
        ends = np.cumsum(n_full + 1)
        found = np.full(int(ends[-1]) if len(ends) else 0, 255, np.uint8)
        found[ends - 1] = gaps % 255
    if packed.size != len(changed) * form.itemsize or found.size > places.size:
        raise InvalidInputError(f"difference: {len(changed)} elements changed, there is room for others")
    packed[:] = differences[changed].view(np.uint8)
    places[: found.size] = found
    return int(found.size)


def put(base: U8, form: Form, *, bitmap: bool, places: U8, packed: U8, out: U8) -> bool:
    """Undo `take`: fill `out` from the base and the differences.

    Returns
    -------
    bool
        False if `places` are not as many as the differences, or lie outside; `out` is then of no use.
    """
    _check(out, base, form)
    if packed.size % form.itemsize or form.scale != 1.0:
        raise InvalidInputError("difference: packed elements are cut, or scaled")
    if _native is None:
        return put_ref(base, form, bitmap=bitmap, places=places, packed=packed, out=out)
    ok: bool = _native.sparse_put(base, out, places, packed, form.itemsize, form.map, form.cast, bitmap)
    return ok


def put_ref(base: U8, form: Form, *, bitmap: bool, places: U8, packed: U8, out: U8) -> bool:
    """The NumPy twin of `put`."""
    n = out.size // form.itemsize
    if bitmap:
        if places.size != (n + 7) // 8:
            return False
        at = np.flatnonzero(np.unpackbits(places, bitorder="little"))
    else:
        steps = places.astype(np.int64)
        ends = np.flatnonzero(places != 255)
        at = np.cumsum(steps)[ends] + np.arange(len(ends))
    if len(at) != packed.size // form.itemsize or (len(at) and int(at[-1]) >= n):
        return False
    differences = np.zeros(n, _uint(form.itemsize))
    differences[at] = packed.view(differences.dtype)
    _apply(differences, _prepared(base, form), form, out)
    return True


def cast(data: U8, number: int) -> U8:
    """Return elements narrowed, as bytes.

    Examples
    --------
    >>> cast(np.array([1.0, 1.004], "<f4").view(np.uint8), F32_BF16).view("<u2").tolist()
    [16256, 16257]
    """
    wide, narrow = CAST_WIDTHS[number]
    out = np.empty(data.size // wide * narrow, np.uint8)
    ungroup_all([Planed([], data, Form(narrow, INTEGER, number), {0: data.size // wide}, out)])
    return out


# ---- the arithmetic, in NumPy ----


def _uint(itemsize: int) -> np.dtype[Any]:
    return np.dtype(f"<u{itemsize}")


def _differences(data: U8, base: U8, form: Form) -> npt.NDArray[Any]:
    d = _mapped(data.view(_uint(form.itemsize)), form.map) - _mapped(_prepared(base, form), form.map)
    zigzagged: npt.NDArray[Any] = (d << d.dtype.type(1)) ^ _spread_sign(d)
    return zigzagged


def _apply(differences: npt.NDArray[Any], prepared: npt.NDArray[Any], form: Form, out: U8) -> None:
    one = differences.dtype.type(1)
    steps = (differences >> one) ^ (~(differences & one) + one)
    out.view(differences.dtype)[:] = _unmapped(_mapped(prepared, form.map) + steps, form.map)


def _lengths_of(differences: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    limits = [differences.dtype.type((1 << 8 * k) - 1) for k in range(differences.itemsize)]
    found: npt.NDArray[np.int64] = sum(
        (differences > limit for limit in limits), np.zeros(len(differences), np.int64)
    )
    return found


def _spread_sign(v: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """All ones where the top bit is set, else zeros."""
    return (v.view(f"<i{v.itemsize}") >> (8 * v.itemsize - 1)).view(v.dtype)


def _mapped(v: npt.NDArray[Any], map_: int) -> npt.NDArray[Any]:
    one, top = v.dtype.type(1), v.dtype.type(8 * v.itemsize - 1)
    if map_ == SUB:
        v = v ^ (_spread_sign(v) | (one << top))
    elif map_ == RSUB:
        v = (v << one) | (v >> top)
    return v


def _unmapped(v: npt.NDArray[Any], map_: int) -> npt.NDArray[Any]:
    one, top = v.dtype.type(1), v.dtype.type(8 * v.itemsize - 1)
    if map_ == SUB:
        v = v ^ (~_spread_sign(v) | (one << top))
    elif map_ == RSUB:
        v = (v >> one) | (v << top)
    return v


def _prepared(base: U8, form: Form) -> npt.NDArray[Any]:
    """The base's elements, cast and scaled."""
    v = base.view(_uint(form.base_itemsize))
    if form.cast == F32_BF16:
        v = _bf16_of(v)
    elif form.cast == F32_F16:
        v = _narrowed(v.astype("<u8"), (8, 23), (5, 10)).astype("<u2")
    elif form.cast == F64_F32:
        v = _narrowed(v, (11, 52), (8, 23)).astype("<u4")
    if form.scale == 1.0:
        return v
    if form.itemsize == 2:
        return _bf16_of(_scaled(v.astype("<u4") << np.uint32(16), form.scale))
    return _scaled(v, form.scale) if form.itemsize in (4, 8) else v


def _bf16_of(v: npt.NDArray[Any]) -> npt.NDArray[Any]:
    rounded = (v + np.uint32(0x7FFF) + ((v >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (v & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FC0), rounded).astype("<u2")


def _scaled(v: npt.NDArray[Any], scale: float) -> npt.NDArray[Any]:
    """v * scale rounded to nearest, by integers alone, where both are far from denormals and infinity."""
    mantissa, exponent_max = (23, 255) if v.itemsize == 4 else (52, 2047)
    u = np.uint64
    x, bits = v.astype(u), int(np.float32(scale).view("<u4"))
    exponent = (x >> u(mantissa)) & u(exponent_max)
    man, by = (x & u((1 << mantissa) - 1)) | u(1 << mantissa), u(bits & 0x7FFFFF | 0x800000)
    # The product has up to 77 bits: in two parts of 32 and the rest.
    low, high = (man & u(0xFFFFFFFF)) * by, (man >> u(32)) * by
    high, low = high + (low >> u(32)), low & u(0xFFFFFFFF)
    up = (high >> u(15 if v.itemsize == 4 else 44)) & u(1)
    shift = u(23) + up
    quotient = (high << (u(32) - shift)) | (low >> shift)
    rest, half = low & ((u(1) << shift) - u(1)), u(1) << (shift - u(1))
    quotient = quotient + ((rest > half) | ((rest == half) & ((quotient & u(1)) == u(1))))
    product = ((exponent + u(bits >> 23) - u(128) + up) << u(mantissa)) + quotient
    product = product | (x & u(1 << (8 * v.itemsize - 1)))
    is_far = (exponent >= 9) & (exponent < exponent_max - 1)
    return np.where(is_far, product, x).astype(v.dtype)


def _narrowed(v: npt.NDArray[Any], source: tuple[int, int], target: tuple[int, int]) -> npt.NDArray[Any]:
    """Floats as uint64, given by bits of exponent and mantissa, narrowed to the nearest, ties to even.

    By integers alone, so that no rounding mode and no flushing of denormals matters.  Every NaN becomes the
    quiet positive one.
    """
    (exp_in, man_in), (exp_out, man_out) = source, target
    one = np.uint64(1)
    sign = v >> np.uint64(exp_in + man_in)
    man = v & ((one << np.uint64(man_in)) - one)
    exp = ((v >> np.uint64(man_in)) & ((one << np.uint64(exp_in)) - one)).astype(np.int64)
    top_in, top_out = (1 << exp_in) - 1, (1 << exp_out) - 1
    is_nan, is_inf = (exp == top_in) & (man != 0), (exp == top_in) & (man == 0)
    man = np.where(exp > 0, man | (one << np.uint64(man_in)), man)
    exp = np.maximum(exp, 1) + ((1 << (exp_out - 1)) - (1 << (exp_in - 1)))
    low = np.maximum(1 - exp, 0)
    shift = np.minimum(man_in - man_out + low, man_in + 2).astype(np.uint64)
    exp = np.maximum(exp, 1)
    half = one << (shift - one)
    rest, out = man & ((half << one) - one), man >> shift
    out = out + ((rest > half) | ((rest == half) & ((out & one) == one))).astype(np.uint64)
    out = out + ((exp - 1).astype(np.uint64) << np.uint64(man_out))
    infinity = np.uint64(top_out << man_out)
    out = np.where(is_inf, infinity, np.minimum(out, infinity))
    quiet = infinity | (one << np.uint64(man_out - 1))
    return np.where(is_nan, quiet, out | (sign << np.uint64(exp_out + man_out)))


def _check(data: U8, base: U8, form: Form) -> None:
    form.check()
    n = data.size // form.itemsize
    if data.size % form.itemsize or base.size != n * form.base_itemsize:
        raise InvalidInputError(f"difference: {data.size} bytes against {base.size}, as {form}")
    for array in (data, base):
        kernels.check_bytes("difference", array)


def _check_classes(of: Classes, n: int, form: Form) -> None:
    found = list(of)
    ok = 0 < len(found) <= N_CLASSES_MAX and found == sorted(found)
    ok = ok and found[0] >= 0 and found[-1] <= form.itemsize
    if not ok or sum(of.values()) != n or min(of.values()) < 0:
        raise InvalidInputError(f"difference: {n} elements of {form.itemsize} bytes are not of classes {of}")
