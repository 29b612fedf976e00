"""Aliases: which arrays of a state share memory, and the tensors that hold it, each byte once.

Owns   finding overlaps, choosing what is stored for arrays that overlap, and what each of them is of it.
Never  knows names or nesting, or reads memory before it is asked to.

What is stored for one or several arrays of one stretch of memory is

*  the array itself, if it fills the stretch: its memory as it lies there, axes and all, without a copy;
*  a copy of its elements without gaps, if it is alone and leaves gaps, as a slice of something larger does;
*  the stretch, as plain elements of one axis, if there are several and none of them fills it.

A stretch ends where no array spans both sides, so views that meet nowhere, as the parameters in one flat
buffer, are tensors of their own; so are a few columns of a large matrix, which only lie between each other.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from deltackpt.arrays import Facts, memory, packed
from deltackpt.dtypes import carrier
from deltackpt.layout import Layout
from deltackpt.types import U8, WHOLE, Deferred, Tensor, View

#: Bytes of arrays that lie between each other, up to which it is looked whether they share one.
_APART_SIZE_MAX = 16 << 20


class Source(NamedTuple):
    """A tensor to be stored, yet without a name.

    Parameters
    ----------
    owner : int
        The array it is to be named by: the one it is, or the first of those that share it.
    dtype, shape
        As of `Tensor`.
    facts : Facts
        An array whose memory holds it.
    span : (int, int) or None
        The addresses that it lies between, as it is; None if it is that array's elements without gaps.
    arrays : tuple of Facts
        All arrays that it holds.
    """

    owner: int
    dtype: str
    shape: tuple[int, ...]
    facts: Facts
    span: tuple[int, int] | None
    arrays: tuple[Facts, ...]

    def named(self, name: str) -> Tensor | Deferred:
        """Return the tensor; its bytes alias the array's, or are copied when they are needed."""
        facts = self.facts
        if self.span is not None and (facts.is_direct or self.span[0] == self.span[1]):
            return Tensor(name, self.dtype, self.shape, facts.framework, memory(facts, *self.span))
        is_own = not isinstance(facts.array, Deferred) or facts.array.is_own
        return Deferred(name, self.dtype, self.shape, facts.framework, self._taken, is_own)

    def _taken(self) -> U8:
        return packed(self.facts) if self.span is None else memory(self.facts, *self.span)


def gather(arrays: Sequence[Facts]) -> tuple[list[Source], list[tuple[int, View]]]:
    """Return the tensors to be stored, by the first array of each, and what each array is of them.

    Examples
    --------
    >>> import numpy as np
    >>> from deltackpt.arrays import look
    >>> x = np.arange(6.0)
    >>> sources, views = gather([look(a) for a in (x[:4], x, np.zeros(2), x)])
    >>> [source.shape for source in sources]
    [(6,), (2,)]
    >>> [(at, view.layout and view.layout.shape) for at, view in views]
    [(0, (4,)), (0, None), (1, None), (0, None)]
    """
    sources: list[Source] = []
    views: list[tuple[int, View]] = [(0, WHOLE)] * len(arrays)
    found = (
        part for group in groups(arrays) for part in (_apart(arrays, group) if len(group) > 1 else [group])
    )
    for group in sorted(found):
        facts = arrays[group[0]]
        if len(group) == 1 and facts.is_simple:  # nearly all are: 3 us each instead of 25
            source = Source(group[0], facts.dtype, facts.layout.shape, facts, facts.layout.span, (facts,))
            views[group[0]] = len(sources), facts.as_whole()
        else:
            source = _source(arrays, group)
            for i in group:
                views[i] = len(sources), _view(arrays[i], source)
        sources.append(source)
    return sources, views


def groups(arrays: Sequence[Facts]) -> list[list[int]]:
    """Return which arrays share a stretch of memory, each group in order; empty ones share by identity."""
    spans: dict[Hashable, list[tuple[int, int, int]]] = {}
    empty: dict[int, list[int]] = {}
    for i, facts in enumerate(arrays):
        start, stop = facts.layout.span
        if start < stop:
            spans.setdefault(facts.space, []).append((start, stop, i))
        else:
            empty.setdefault(id(facts.array), []).append(i)
    found = list(empty.values())
    for stretch in spans.values():
        stretch.sort()
        end = stretch[0][0]
        for start, stop, i in stretch:
            if start < end:
                found[-1].append(i)
            else:
                found.append([i])
            end = max(end, stop)
    return [sorted(group) for group in found]


def share_bytes(layouts: Sequence[Layout]) -> bool:
    """Whether a byte belongs to two different arrays of one memory; asks each element where it is.

    Examples
    --------
    >>> columns = Layout((3,), (8,), 0, 4), Layout((3,), (8,), 4, 4)
    >>> share_bytes(columns), share_bytes([columns[0], Layout((3,), (8,), 8, 4)])
    (False, True)
    """
    different = [layout.narrowed() for layout in dict.fromkeys(layouts)]
    parts = [layout.addresses() for layout in different]
    starts = np.concatenate(parts)
    ends = np.concatenate([part + layout.itemsize for part, layout in zip(parts, different, strict=True)])
    order = np.argsort(starts)
    return bool((starts[order][1:] < ends[order][:-1]).any())


def _apart(arrays: Sequence[Facts], group: list[int]) -> list[list[int]]:
    """Split a group that shares no byte, if most of the stretch is nobody's."""
    layouts = list(dict.fromkeys(arrays[i].layout for i in group))
    size = sum(layout.narrowed().size for layout in layouts)
    stretch = max(layout.span[1] for layout in layouts) - min(layout.span[0] for layout in layouts)
    if len(layouts) == 1 or 2 * size > stretch or size > _APART_SIZE_MAX:
        return [group]
    if share_bytes(layouts):
        return [group]
    return [[i for i in group if arrays[i].layout == layout] for layout in layouts]


def _source(arrays: Sequence[Facts], group: list[int]) -> Source:
    """Return what is stored for the arrays of one stretch of memory."""
    first, all_ = arrays[group[0]], tuple([arrays[i] for i in group])
    spans = [arrays[i].layout.span for i in group]
    whole = _aligned(arrays, group, min(start for start, _ in spans)), max(stop for _, stop in spans)
    fits = [i for i, span in zip(group, spans, strict=True) if span == whole and _is_solid(arrays[i])]
    if fits:
        owner = next((i for i in fits if arrays[i].layout.is_plain), fits[0])
        return _carried(arrays[owner], owner, whole, all_)
    is_alone = all((arrays[i].layout, arrays[i].dtype) == (first.layout, first.dtype) for i in group)
    if is_alone and not first.layout.narrowed().overlaps():
        return _carried(first, group[0], None, all_)
    dtype, itemsize = first.dtype, first.layout.itemsize
    steps = [whole[1] - whole[0]]
    for i in group:
        steps += [arrays[i].layout.offset - whole[0], *arrays[i].layout.strides]
    if any(arrays[i].dtype != dtype for i in group) or any(step % itemsize for step in steps):
        dtype, itemsize = "uint8", 1
    plain = Layout.plain(((whole[1] - whole[0]) // itemsize,), itemsize, whole[0])
    return _carried(replace(first, dtype=dtype, layout=plain), group[0], whole, all_)


def _aligned(arrays: Sequence[Facts], group: list[int], start: int) -> int:
    """Return where a stretch begins: torch makes a view only at a multiple of its itemsize."""
    first = arrays[group[0]]
    itemsizes = {arrays[i].layout.itemsize for i in group}
    if first.framework != "torch" or len(itemsizes) == 1:
        return start
    # The storage's own start is such a place for all of them.
    storage: int = first.layout.offset - first.array.storage_offset() * first.layout.itemsize
    return start - (start - storage) % max(itemsizes)


def _is_solid(facts: Facts) -> bool:
    return facts.layout.narrowed().is_solid()


def _carried(facts: Facts, owner: int, span: tuple[int, int] | None, arrays: tuple[Facts, ...]) -> Source:
    """Return an array's elements, axes in the order of memory, as those of the dtype that carries its own."""
    narrow = facts.layout.narrowed()
    # A plain array's axes are as they are, even those of one element.
    order = range(len(narrow.shape)) if facts.layout.is_plain else narrow.order()
    dtype, n_units = carrier(facts.dtype)
    shape = tuple([narrow.shape[axis] for axis in order])
    return Source(owner, dtype, shape if n_units == 1 else (*shape, n_units), facts, span, arrays)


def _view(facts: Facts, source: Source) -> View:
    """Return what an array is of a tensor."""
    if source.span is None:
        layout = facts.layout.narrowed().packed()
        strides = [
            0 if old == 0 else new for old, new in zip(facts.layout.strides, layout.strides, strict=True)
        ]
        layout = replace(layout, shape=facts.layout.shape, strides=tuple(strides))
    else:
        layout = facts.layout.moved(-source.span[0])
    if facts.dtype == source.dtype and layout == Layout.plain(source.shape, layout.itemsize):
        return facts.as_whole()
    return View(facts.dtype, layout, facts.parameter, facts.requires_grad, facts.device)
