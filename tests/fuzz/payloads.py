"""Payloads and kernel arguments at random: made, changed, cut and invented; decoders.py tries them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from coded import n_changed, payload_of

from deltackpt import codecs, differences, kernels
from deltackpt.codecs import Base, Kind, Mode
from deltackpt.differences import CAST_WIDTHS, Form, Pair
from deltackpt.errors import FormatError, InvalidInputError
from deltackpt.types import U8


class Source:
    """Random bytes and choices."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def between(self, low: int, high: int) -> int:
        """At least `low`, less than `high`."""
        return int(self.rng.integers(low, high))

    def once_in(self, n: int) -> bool:
        return not self.rng.integers(n)

    def choice(self, some: Any) -> int:
        return int(self.rng.choice(some))

    def noise(self, size: int) -> U8:
        return self.rng.integers(0, 256, size, np.uint8)

    def cast(self, itemsize: int) -> int:
        """None, or one that makes elements of this size."""
        return self.choice([0, *(cast for cast, (_, narrow) in CAST_WIDTHS.items() if narrow == itemsize)])

    def some_bytes(self, size: int) -> U8:
        """Noise, runs, or floats of one order of magnitude."""
        kind = self.below(4)
        if kind == 0:
            return self.noise(size)
        if kind == 1:
            return np.repeat(self.noise(size // 16 + 1), 16)[:size].copy()
        floats = self.rng.standard_normal(size // 4 + 1) * 10.0 ** self.between(-44, 38)
        return floats.astype("<f4").view(np.uint8)[:size].copy()

    def near(self, base: U8) -> U8:
        """The same, but for some bytes."""
        data = base.copy()
        if data.size:
            at = self.rng.integers(0, data.size, self.below(data.size + 1) // self.between(1, 40))
            data[at] += self.rng.integers(0, 4, at.size, np.uint8)
        return data

    def hostile(self, payload: U8) -> U8:
        """The same, changed, cut or longer."""
        bad = payload.copy()
        for _ in range(self.below(4)):
            if bad.size:
                # Heads and tables more often than what they describe.
                bad[self.below(min(bad.size, 64 if self.below(2) else bad.size))] = self.below(256)
        if self.once_in(4):
            bad = bad[: self.below(bad.size + 1)].copy()
        if self.once_in(8):
            bad = np.concatenate([bad, self.some_bytes(self.between(1, 40))])
        return bad

    def off(self, buffer: U8, width: int = 1) -> U8:
        """Memory of its own, mostly as large as it should be."""
        size = buffer.size
        if self.once_in(6):
            size = max(0, size + self.choice([-9, -8, -width, -1, 1, width, 8, 9, 255]))
        out = np.zeros(size, np.uint8)
        out[: buffer.size] = buffer[:size]
        return out


# -- decoders


def decode_one(source: Source) -> bool:
    """Decode a payload, which must come back, and a hostile one; whether that was taken."""
    itemsize = source.choice(codecs.ITEMSIZES)
    kind = Kind(itemsize, bool(source.below(2)))
    size = source.below(60 if source.once_in(4) else 5000)
    cast = source.cast(itemsize)
    wide = CAST_WIDTHS[cast][0] if cast else itemsize
    offset = source.below(3) * wide
    base = source.some_bytes(offset + size // itemsize * wide + source.below(2) * 9)
    codec = source.choice(list(codecs.NAMES))
    same = codecs.cast(base[: size // itemsize * wide], cast) if cast else base[offset : offset + size]
    data = source.near(same) if same.size == size and not source.once_in(4) else source.some_bytes(size)
    given = None
    if codec in codecs.DELTAS:
        given, delta = base, Base(base, offset, cast)
        scale = float(np.float32(source.rng.uniform(0.02, 1.99))) if source.once_in(3) else 1.0
        if n_changed(data, kind, delta) > size // itemsize // 2:
            codec = codecs.dense.NUMBER
        payload = np.array(payload_of(codec, data, kind, delta, Mode(source.below(3), scale)))
    else:
        payload = np.array(payload_of(codec, data, kind))
    out = np.empty(size, np.uint8)
    codecs.decode(codec, payload, itemsize, out, "made", given)
    if not np.array_equal(out, data):
        raise SystemExit(f"{codecs.NAMES[codec]} does not give {size} bytes of {kind} back")
    bad = source.some_bytes(source.below(200)) if source.once_in(8) else source.hostile(payload)
    out = np.empty(source.below(5000) if source.once_in(4) else size, np.uint8)
    if given is not None and source.once_in(4):
        given = base[: source.below(base.size + 1)].copy()
    try:
        codecs.decode(codec, bad, itemsize, out, "bad", given)
    except FormatError:
        return False
    return True


# -- kernels


@dataclass
class Arguments:
    """What fits each other: data and base, and what kernels make of them.

    Sizes all at random would end at the first check; each of the others must be what saves a call.
    """

    width: int
    bitmap: bool
    cast: int
    map: int
    scale: float
    data: U8
    base: U8
    places: U8
    packed: U8
    grouped: U8
    planes: list[U8]
    of: dict[int, int]

    @classmethod
    def fitting(cls, source: Source) -> Arguments:
        width, n, bitmap = source.choice(codecs.ITEMSIZES), source.below(2500), bool(source.below(2))
        cast, map_, scale = source.cast(width), source.below(3), float(source.rng.choice([1.0, 0.5]))
        base = source.some_bytes(n * (CAST_WIDTHS[cast][0] if cast else width))
        same = codecs.cast(base, cast) if cast else base
        data = source.some_bytes(n * width) if source.once_in(4) else source.near(same)
        n_differ = n_changed(data, Kind(width, True), Base(base, 0, cast))
        places = np.empty((n + 7) // 8 if bitmap else n_differ + n // 255, np.uint8)
        packed = np.empty(n_differ * width, np.uint8)
        form = Form(width, map_, cast)
        n_places = differences.take(data, base, form, bitmap=bitmap, places=places, packed=packed)
        room = np.empty(data.size + data.size // 8 + 8, np.uint8)
        [found] = differences.group_all([Pair(data, base, form._replace(scale=scale), room)])
        sizes = differences.plane_sizes(found.of)
        grouped = room[: sum(sizes)].copy()
        planes = np.split(grouped, np.cumsum(sizes)[:-1]) if sizes else []
        places = places[:n_places].copy()
        return cls(
            width, bitmap, cast, map_, scale, data, base, places, packed, grouped, planes, dict(found.of)
        )

    @property
    def n(self) -> int:
        return self.data.size // self.width

    @property
    def out(self) -> U8:
        return np.empty(self.data.size, np.uint8)

    @property
    def form(self) -> tuple[int, int, int, float]:
        return self.width, self.map, self.cast, self.scale


def _group(native: Any, a: Arguments, source: Source) -> None:
    pairs = tuple(
        (*(source.off(x, a.width) for x in (a.data, a.base, a.grouped)), *a.form, source.between(-2, a.n + 2))
        for _ in range(source.below(4))
    )
    native.delta_group(pairs, kernels.logs(300), source.between(-1, 302))


def _group_other_numbers(native: Any, a: Arguments, source: Source) -> None:
    pair = (a.data, a.base, a.out, source.between(-1, 10), a.map, 9 - a.cast, a.scale, -1)
    native.delta_group((pair,), kernels.logs(9), 9)


def _ungroup(native: Any, a: Arguments, source: Source) -> None:
    def one() -> tuple[Any, ...]:
        planes, base, out = tuple(map(source.off, a.planes)), source.off(a.base), source.off(a.out)
        return planes, base, out, *a.form, a.of

    native.delta_ungroup(tuple(one() for _ in range(source.below(4))))


def _ungroup_hostile(native: Any, a: Arguments, source: Source) -> None:
    good = (tuple(a.planes), a.base, a.out, *a.form, a.of)
    bad = (tuple(map(source.hostile, a.planes)), a.base, source.off(a.out), *a.form, a.of)
    native.delta_ungroup((good, bad))


def _ungroup_hostile_digits(native: Any, a: Arguments, source: Source) -> None:
    digits = source.hostile(a.planes[0]) if a.planes else None
    native.delta_ungroup((((digits, *a.planes[1:]), a.base, a.out, *a.form, a.of),))


def _ungroup_other_classes(native: Any, a: Arguments, source: Source) -> None:
    of = {length + source.between(-1, 2): count + source.between(-1, 2) for length, count in a.of.items()}
    native.delta_ungroup(((tuple(a.planes), a.base, a.out, *a.form, of),))


def _ungroup_many_planes(native: Any, a: Arguments, source: Source) -> None:
    native.delta_ungroup((((None,) * 40, a.base, a.out, *a.form, {8: a.n}),))


def _take(native: Any, a: Arguments, source: Source) -> None:
    buffers = (source.off(x, a.width) for x in (a.data, a.base, a.places, a.packed))
    native.sparse_take(*buffers, a.width, a.map, a.cast, a.bitmap)


def _put(native: Any, a: Arguments, source: Source) -> None:
    buffers = (source.off(x, a.width) for x in (a.base, a.out, a.places, a.packed))
    native.sparse_put(*buffers, a.width, a.map, a.cast, a.bitmap)


def _put_hostile(native: Any, a: Arguments, source: Source) -> None:
    places, bitmap = source.hostile(a.places), bool(source.below(2))
    native.sparse_put(a.base, source.off(a.out), places, source.off(a.packed), *a.form[:3], bitmap)


def _put_other_numbers(native: Any, a: Arguments, source: Source) -> None:
    native.sparse_put(a.base, a.out, a.places, a.packed, a.width, source.between(-2, 6), -1, a.bitmap)


def _split(native: Any, a: Arguments, source: Source) -> None:
    native.split_planes(source.off(a.data, a.width), source.off(a.out, a.width), a.width, a.bitmap)


def _join(native: Any, a: Arguments, source: Source) -> None:
    native.join_planes(source.off(a.data, a.width), source.off(a.out, a.width), a.width, a.bitmap)


def _split_all(native: Any, a: Arguments, source: Source) -> None:
    pairs = tuple((source.off(a.data), source.off(a.out), a.width, a.bitmap) for _ in range(2))
    native.split_all(pairs, kernels.logs(300), source.between(-1, 302))


def _entropies(native: Any, a: Arguments, source: Source) -> None:
    table = np.zeros(source.between(1, 400), np.int64)
    native.entropies((a.data, a.base, a.data[:0]), table, source.below(400))


def _entropies_of_too_many(native: Any, a: Arguments, source: Source) -> None:
    native.entropies((a.data,), np.zeros(1, np.int64), sys.maxsize)


def _cut(native: Any, a: Arguments, source: Source) -> None:
    ends = np.empty(8 * source.between(1, 2 + a.data.size // 64), np.uint8)
    threshold = source.choice([0, 1 << 30, (1 << 32) - 1])
    native.cut(source.off(a.data), source.off(ends), source.choice([2, 4, 8]), 64, 128, threshold)


def _move(native: Any, a: Arguments, source: Source) -> None:
    first = (source.off(a.data), source.between(-1, 10), source.off(a.data))
    native.move((first, (a.data, 1, a.data[1:])))


def _are_equal(native: Any, a: Arguments, source: Source) -> None:
    native.are_equal((source.off(a.data), a.base), (source.off(a.data), source.off(a.base)))


CALLS: list[Callable[[Any, Arguments, Source], None]] = [
    _group,
    _group_other_numbers,
    _ungroup,
    _ungroup_hostile,
    _ungroup_hostile_digits,
    _ungroup_other_classes,
    _ungroup_many_planes,
    _take,
    _put,
    _put_hostile,
    _put_other_numbers,
    _split,
    _join,
    _split_all,
    _entropies,
    _entropies_of_too_many,
    _cut,
    _move,
    _are_equal,
]


def call_one(native: Any, source: Source) -> None:
    """Call a kernel with arguments that fit, but for one or another."""
    arguments = Arguments.fitting(source)
    with suppress(ValueError, InvalidInputError):
        CALLS[source.below(len(CALLS))](native, arguments, source)
