"""A snapshot: a state as tensors, chunks and a manifest.  The way back is in restore.py and loader.py.

Owns   which of a tensor's chunks are new, its lists and its row.
Never  touches storage but through a store or a session, or knows about steps and runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash
from blake3 import blake3

from deltackpt import codecs, tree
from deltackpt.bases import Bases, CastOf, Lacking, Put
from deltackpt.casts import Casts, Source
from deltackpt.chains import as_ids
from deltackpt.codecs import Kind
from deltackpt.digests import fingerprint, identify
from deltackpt.dtypes import kind_of
from deltackpt.format import CHUNK_ID_SIZE
from deltackpt.glances import NONE, Glances, Watch
from deltackpt.groups import GroupCost
from deltackpt.index import Rows
from deltackpt.manifest import Manifest, TensorRow, build_lists
from deltackpt.memory import Ends, Known, Memory, Pieces
from deltackpt.modes import Taken, Tried, kept, learned
from deltackpt.pack import PackName
from deltackpt.records import Figures
from deltackpt.session import Parent, Session
from deltackpt.shadow import Fresh, Shadow
from deltackpt.staging import Look, Reusable, looks
from deltackpt.tally import Tally
from deltackpt.tree import Flat
from deltackpt.trials import Pair, Trial, run_trials
from deltackpt.types import DTYPE_SIZES, U8, Deferred, State, Tensor

#: What is remembered, given the tensors to be saved.
Before: TypeAlias = Callable[[Sequence[Tensor | Deferred]], Memory]

#: A remembered set of packs only grows; past this many a tensor's chunks are looked up again, 1 us each.
_N_PACKS_MAX = 16
#: Bytes of changed tensors whose chunks are looked up together.
_GROUP_SIZE = 8 << 20
_LIST_KIND = Kind(1, False)


@dataclass(slots=True)
class Saved:
    """What `save` made: the manifest, what to remember, and its figures.

    Parameters
    ----------
    manifest : Manifest
    tensors : list of Known
    changed : set of str
        Tensors with chunks or lists in the packs of this session.
    fresh : list of Fresh
        Tensors that changed, for the shadow.
    tally : Tally
        What was put for which tensor.
    taken : list of Taken
        How.
    glances : Glances
        What tells, at the next save, that a tensor need not be looked at.
    """

    manifest: Manifest
    tensors: list[Known]
    changed: set[str]
    fresh: list[Fresh]
    tally: Tally
    taken: list[Taken]
    glances: Glances = NONE
    logical_size: int = 0
    new_size: int = 0
    is_small: bool = True
    n_chunks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def memory(self, packs: frozenset[PackName], rows: Rows) -> Memory:
        """Return what to remember once the session has written these packs, and these rows."""
        modes = learned(self.taken, rows, is_small=self.is_small)
        shared: dict[frozenset[PackName], frozenset[PackName]] = {}  # one set for all tensors that have it
        tensors = []
        for known in self.tensors:
            if known.row.name in self.changed:
                together = (known.packs or frozenset()) | packs
                known = replace(
                    known,
                    packs=shared.setdefault(together, together),
                    modes=kept(known.modes, modes.get(known.row.name, {})),
                )
            tensors.append(known)
        new_share = self.new_size / self.logical_size if self.logical_size else 1.0
        return Memory(tensors, self.glances, new_share=new_share)

    def figures(self, session: Session) -> Figures:
        """Return what a published session took for it."""
        return Figures(
            self.logical_size,
            session.new_size,
            session.written_size,
            len(self.manifest.tensors),
            self.n_chunks,
            session.n_new_chunks,
            {phase: round(s, 6) for phase, s in self.seconds.items()},
            self.costs(session.rows()),
        )

    def costs(self, rows: Rows) -> list[GroupCost]:
        """Return what each group of tensors cost, given the rows of what the session wrote."""
        n_chunks = {known.row.name: len(known.ends) for known in self.tensors}
        return self.tally.costs([(row, n_chunks.get(row.name, 0)) for row in self.manifest.tensors], rows)


class _Clock:
    """Seconds of the calling thread by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def save(
    session: Session,
    state: State,
    before: Before,
    shadow: Shadow,
    *,
    allow_pickle: bool = False,
    audit_every: int = 1,
) -> Saved:
    """Put the chunks of a state that the store lacks into a session.

    Parameters
    ----------
    session : Session
    state : State
    before : callable
        Given the state's tensors, returns what is remembered of the previous snapshot: its boundaries are
        kept where a tensor kept name, dtype and shape, and its chunks are what the new ones are deltas of.
    shadow : Shadow
        The previous snapshot's bytes, as far as they are in memory.
    allow_pickle : bool
        Pickle what has no plain form.
    audit_every : int
        As `Watch` takes it.

    Raises
    ------
    InvalidInputError
        If the state holds what has no plain form, with the key path; or changed meanwhile.
    """
    start = time.perf_counter()
    flat = tree.flatten(state, allow_pickle=allow_pickle)
    flatten_s = time.perf_counter() - start
    memory = before(flat.tensors)
    watch = watch_of(flat, memory, audit_every, session.slot.step)
    found = looks(flat.tensors, order_of(flat.tensors), memory, reusable(session), watch)
    saved = save_looks(session, flat, lambda _: found, memory, shadow)
    saved.glances = watch.glances()
    saved.seconds = {"flatten": flatten_s, **saved.seconds}
    return saved


def save_looks(
    session: Session,
    flat: Flat,
    walk: Callable[[Callable[[], int]], Iterable[Look]],
    memory: Memory,
    shadow: Shadow,
    *,
    is_staged: bool = False,
) -> Saved:
    """Put the chunks of a state that the store lacks into a session, its tensors being looked at already.

    Parameters
    ----------
    session : Session
    flat : Flat
        The state; of its tensors only what they are is looked at.
    walk : callable
        Returns the tensors that have bytes, in the order of `order_of`, each compared with `memory`.  It is
        given a function that saves what was taken so far, lets go of it, and returns the bytes it keeps.
    memory : Memory
        As `before` of `save` returns it.
    shadow : Shadow
    is_staged : bool
        Whether the bytes of what changed are copies, which may be kept for the shadow.
    """
    clock = _Clock()
    session.pace.expect(sum(tensor.size for tensor in flat.tensors), memory.new_share)
    saver = _Saver(session, memory, shadow, clock, is_staged=is_staged)
    knowns = saver.all(flat.tensors, walk(saver.settle))
    rows = [
        known.row if known is not None else _row(tensor, 0, b"", xxhash.xxh3_128_digest(b""))
        for tensor, known in zip(flat.tensors, knowns, strict=True)
    ]
    tensors = [known for known in knowns if known is not None]
    saved = Saved(
        Manifest(flat.structure, rows),
        tensors,
        saver.changed,
        saver.fresh,
        saver.tally,
        saver.taken,
        seconds=clock.seconds,
    )
    saved.logical_size = sum(row.size for row in rows)
    saved.new_size = session.new_size
    saved.is_small = session.pace.is_small()
    saved.n_chunks = sum(len(known.ends) for known in tensors)
    return saved


def order_of(tensors: Sequence[Tensor | Deferred]) -> list[int]:
    """Return the order in which tensors are to be looked at: casts of others after those."""
    return Casts(tensors).order(tensors)


def watch_of(flat: Flat, memory: Memory, audit_every: int, step: int) -> Watch:
    """Glance at a state's tensors."""
    names = [tensor.name for tensor in flat.tensors]
    return Watch(names, flat.sources, memory.glances, audit_every, step=step)


def reusable(session: Session) -> Reusable:
    """Return whether a session may rely on what is remembered of a tensor."""
    return lambda known: known.packs is not None and session.may_use(known.packs)


def _row(tensor: Tensor | Deferred, level: int, root: bytes, fingerprint: bytes) -> TensorRow:
    return TensorRow(
        tensor.name, tensor.dtype, tensor.shape, tensor.framework, tensor.size, level, root, fingerprint
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A tensor whose chunks are to be looked up; `known.packs` is None until then.

    Parameters
    ----------
    at : int
        The tensor's place in the state.
    tensor : Tensor
    known : Known
    asked : ndarray of int64
        The chunks that are not known to be there.
    packs : frozenset of PackName
        Packs that hold the others.
    lists : list of ndarray of uint8
        The tensor's list chunks.
    list_ids : list of bytes
    before : Known or None
        What was there before, cut alike.
    pieces : Pieces or None
        See `Lacking`.
    source : CastOf or None
    is_own : bool
        Whether the tensor's bytes are a copy that nobody else has.
    """

    at: int
    tensor: Tensor
    known: Known
    asked: npt.NDArray[np.int64]
    packs: frozenset[PackName]
    lists: list[U8]
    list_ids: list[bytes]
    before: Known | None
    pieces: Pieces | None
    source: CastOf | None
    is_own: bool


class _ToPut(NamedTuple):
    """A chunk to put, the `i`-th of its tensor; what it may be a delta of, and the relation of the two."""

    i: int
    data: U8
    parent: Parent | None
    why: str


def _to_put(p: _Pending, put: Put) -> _ToPut:
    start, end = int(p.known.ends[put.i - 1]) if put.i else 0, int(p.known.ends[put.i])
    return _ToPut(put.i, p.tensor.data[start:end], put.plan.parent, put.plan.why)


class _Saver:
    """One walk over a state's tensors.

    What changed is looked up and put group by group: a look-up costs 100 us whether for one chunk or for
    a thousand, and hashing is done before encoders compete for the cores.
    """

    def __init__(
        self, session: Session, memory: Memory, shadow: Shadow, clock: _Clock, *, is_staged: bool = False
    ) -> None:
        self._session = session
        self._is_staged = is_staged
        self._reusable = reusable(session)
        self._staged: dict[int, Tensor] = {}  # by their place: what others may be casts of
        self._memory = memory
        self._bases = Bases(session, memory, shadow)
        self._fresh_size_max = shadow.size_max
        # What is there stays until the step is saved; copies that are staged are there in any case.
        self._own_size_max = shadow.size_max - (0 if is_staged else shadow.size)
        self._here = Memory()
        self._clock = clock
        self._given: Sequence[Tensor | Deferred] = ()
        self._knowns: list[Known | None] = []
        self._pending: list[_Pending] = []
        self._pending_size = 0
        self.changed: set[str] = set()  # tensors with chunks or lists in the packs of this session
        self.fresh: list[Fresh] = []
        self.tally = Tally()
        self.taken: list[Taken] = []

    def all(self, tensors: Sequence[Tensor | Deferred], looks: Iterable[Look]) -> list[Known | None]:
        """Put the new chunks of all tensors; return what is known of each, None for one without bytes."""
        self._given = tensors
        self._knowns = [None] * len(tensors)
        casts = Casts(tensors)
        for look in looks:
            self._clock.lap("stage" if self._is_staged else "compare")
            has_bytes = not (self._is_staged and look.is_same)
            found = casts.find(look.tensor) if has_bytes else None
            source = self._source(found, tensors[found.at]) if found is not None else None
            self._here.add(self._one(look, source))
            if has_bytes:
                casts.add(look.at, look.tensor)
                if self._is_staged:
                    self._staged[look.at] = look.tensor
            del look, source  # a wave that is saved must not be held by its last tensor
            if self._pending_size >= _GROUP_SIZE:
                self._put_pending()
        self._put_pending()
        return self._knowns

    def settle(self) -> int:
        """Save what was taken so far and let go of its bytes, but those for the shadow; return how many."""
        self._put_pending()
        self._session.settle()
        self._staged = {}
        return sum(fresh.data.size for fresh in self.fresh if fresh.is_own)

    def _source(self, found: Source, given: Tensor | Deferred) -> CastOf | None:
        """Return what a tensor is the cast of, if its bytes are still those that were saved."""
        known = self._knowns[found.at]
        assert known is not None
        if self._is_staged:
            staged = self._staged.get(found.at)
            return CastOf(known, staged, found.cast) if staged is not None else None
        tensor = given.taken() if isinstance(given, Deferred) else given
        # What is taken again from where it is may have changed since: a delta must not be taken against that.
        if tensor is not given and fingerprint(tensor.data, known.ends) != known.fingerprints:
            return None
        return CastOf(known, tensor, found.cast)

    def _one(self, look: Look, source: CastOf | None) -> Known:
        """Note one tensor, and leave it to be put if it changed."""
        if look.is_same and look.before is not None:
            known = look.before if _is_same_row(look.before, look.tensor) else self._renamed(look)
        else:
            # A cast is cut where its source is.
            pieces = self._memory.pieces.get(look.tensor.name) if source is None else None
            before, ends, fingerprints, whole = self._cut(look, source, pieces)
            if before is not None and fingerprints == before.fingerprints and self._reusable(before):
                known = self._renamed(look._replace(before=before))
            else:
                known = self._changed(look, ends, fingerprints, whole, before, pieces, source)
        if known.packs is not None:
            self._session.pace.pass_by(look.tensor.size)
        self._knowns[look.at] = known
        return known

    def _cut(
        self, look: Look, source: CastOf | None, pieces: Pieces | None
    ) -> tuple[Known | None, Ends, list[bytes], bytes]:
        """Return what was there before, and the tensor's cuts, their fingerprints, and its own."""
        tensor, before, fingerprints, whole = look.tensor, look.before, look.fingerprints, b""
        if before is None:
            whole = xxhash.xxh3_128_digest(tensor.data)
            before = self._here.same_content(tensor.size, whole)
            before = before or self._memory.same_content(tensor.size, whole)
            fingerprints = fingerprint(tensor.data, before.ends) if before is not None else []
        if before is not None:
            self._clock.lap("compare")
            if fingerprints == before.fingerprints or source is None or _fits(before.ends, source, tensor):
                return before, before.ends, fingerprints, whole or _whole(tensor, fingerprints)
        if source is not None:  # cut where its source is, so that each chunk is the cast of one chunk
            ends = _scaled(source, tensor)
        elif pieces is not None:
            ends = pieces.ends
        else:
            ends = self._session.store.chunker.cuts(tensor.data, DTYPE_SIZES[tensor.dtype])
        fingerprints = fingerprint(tensor.data, ends)
        self._clock.lap("chunk")
        return None, ends, fingerprints, whole or _whole(tensor, fingerprints)

    def _put_pending(self) -> None:
        """Look the group's chunks and lists up, and put those that the store lacks."""
        group, self._pending, self._pending_size = self._pending, [], 0
        if not group:
            return
        parts = [p.known.ids[p.asked] for p in group]
        parts += [as_ids(p.list_ids) for p in group if p.list_ids]
        copies = iter(self._session.look_up(np.concatenate(parts)))
        chunks = [[next(copies) for _ in p.asked] for p in group]
        lists = [[next(copies) for _ in p.list_ids] for p in group]
        lacking = [
            Lacking(
                p.tensor,
                p.known,
                [i for i, copy in zip(p.asked.tolist(), found, strict=True) if copy is None],
                p.before,
                p.pieces,
                p.source,
            )
            for p, found in zip(group, chunks, strict=True)
        ]
        plans = self._bases.plan(lacking)
        todo = [[_to_put(p, put) for put in puts] for p, puts in zip(group, plans, strict=True)]
        modes = self._modes(group, todo)
        self._clock.lap("plan")
        for p, found, found_lists, puts, of in zip(group, chunks, lists, todo, modes, strict=True):
            self._put(p, puts, of)
            for chunk_id, data, copy in zip(p.list_ids, p.lists, found_lists, strict=True):
                if copy is None:
                    self._session.put(chunk_id, data, _LIST_KIND)
            copies_there = [copy for copy in (*found, *found_lists) if copy is not None]
            if len(copies_there) < len(found) + len(found_lists):
                self._note_changed(p)
            packs = p.packs.union(*(copy.packs for copy in copies_there))
            self._knowns[p.at] = replace(p.known, packs=packs)
        self._clock.lap("write")

    def _modes(self, group: list[_Pending], todo: list[list[_ToPut]]) -> list[dict[str, Tried | None]]:
        """Return how each tensor's chunks are taken: as in saves before, or as is best now, by trying.

        None: the base cannot be read.  Without an entry: there is no time to try.
        """
        modes: list[dict[str, Tried | None]] = []
        trials: list[tuple[dict[str, Tried | None], str, Trial]] = []
        for p, puts in zip(group, todo, strict=True):
            pairs: dict[str, list[Pair]] = {}
            for put in puts:
                if put.parent is not None:
                    pairs.setdefault(put.why, []).append(Pair(put.data, put.parent))
            before = p.before.modes if p.before is not None else {}
            of = {why: before.get(why) for why in pairs}
            kind = kind_of(p.tensor.dtype)
            modes.append(of)
            untried = [why for why in pairs if of[why] is None]
            # Trying costs as much as encoding half a megabyte: for nothing, if that is to be stored raw.
            if untried and p.tensor.size <= _GROUP_SIZE and self._session.is_short_of_time(kind.itemsize):
                for why in untried:
                    del of[why]
            else:
                trials += [(of, why, Trial(pairs[why], kind)) for why in untried]
        best = run_trials(self._session.store, [trial for *_, trial in trials])
        for (of, why, _), mode in zip(trials, best, strict=True):
            of[why] = Tried(mode) if mode is not None else None
        return modes

    def _put(self, p: _Pending, puts: list[_ToPut], modes: dict[str, Tried | None]) -> None:
        """Put a tensor's chunks."""
        self._session.pace.pass_by(p.tensor.size - sum(put.data.size for put in puts))
        kind, ids = kind_of(p.tensor.dtype), p.known.ids
        chunk_ids = [ids[put.i].tobytes() for put in puts]
        is_few = False
        if self._is_passing(p.at):
            new = {i: put.data.size for i, put in zip(chunk_ids, puts, strict=True)}
            is_few = 2 * sum(n for i, n in new.items() if not self._session.was_put(i)) < p.tensor.size
        self.tally.put(p.known.row, ids[[put.i for put in puts]], [put.parent is not None for put in puts])
        for why, tried in modes.items():
            if tried is not None:
                which = [put.i for put in puts if put.why == why]
                self.taken.append(Taken(p.tensor.name, why, tried, ids[which]))
        for chunk_id, put in zip(chunk_ids, puts, strict=True):
            tried, parent = modes.get(put.why), put.parent
            mode = tried.mode if tried is not None else None
            if mode == codecs.WHOLE or put.why not in modes:
                parent = None  # or it would be read for nothing
            seen = p.known.fingerprints[put.i] if p.known.fingerprints is not None else None
            # Until it is encoded, a view of it would keep all of the tensor.
            data = put.data.copy() if is_few and not self._session.was_put(chunk_id) else put.data
            self._session.put(chunk_id, data, kind, parent, mode, seen)

    def _is_passing(self, at: int) -> bool:
        """Return whether a tensor is here for this save alone: a copy, or a map that holds a descriptor."""
        return not self._is_staged and isinstance(self._given[at], Deferred)

    def _note_changed(self, p: _Pending) -> None:
        """Note that a tensor has new bytes, and keep them for the shadow if there is room."""
        self.changed.add(p.tensor.name)
        size = p.tensor.size
        room = min(self._fresh_size_max, self._own_size_max) if p.is_own else self._fresh_size_max
        if self._is_staged and size > room:
            # Copies stand side by side in large pieces: one more would keep all of its piece.
            self._fresh_size_max = 0
        elif p.source is None and size <= room:
            self._fresh_size_max -= size
            self._own_size_max -= size * p.is_own
            self.fresh.append(Fresh(p.tensor.name, p.known.row.root, p.tensor.data, p.is_own))

    def _renamed(self, look: Look) -> Known:
        """Return the same chunks as another tensor's."""
        known, tensor = look.before, look.tensor
        assert known is not None
        row = known.row
        return replace(known, row=_row(tensor, row.level, row.root, row.fingerprint))

    def _changed(
        self,
        look: Look,
        ends: Ends,
        fingerprints: list[bytes],
        whole: bytes,
        before: Known | None,
        pieces: Pieces | None,
        source: CastOf | None,
    ) -> Known:
        """Identify a tensor's chunks and lists, to be put with the group."""
        tensor, data = look.tensor, look.tensor.data
        ids = np.empty((len(ends), CHUNK_ID_SIZE), np.uint8)
        changed = np.ones(len(ends), np.bool_)
        if before is not None and before.fingerprints is not None:
            changed[:] = [a != b for a, b in zip(fingerprints, before.fingerprints, strict=True)]
            ids[~changed] = before.ids[~changed]
        hashed = identify(data, ends, np.flatnonzero(changed))
        if hashed:
            ids[changed] = as_ids(hashed)
        # What did not change is there already, unless gc condemned it meanwhile.
        packs: frozenset[PackName] = frozenset()
        asked = np.arange(len(ends))
        if before is not None and self._reusable(before) and len(before.packs or ()) <= _N_PACKS_MAX:
            packs, asked = before.packs or packs, np.flatnonzero(changed)
        level, root, lists, list_ids = _lists(ids, ends)
        self._clock.lap("identify")
        row = _row(tensor, level, root, whole)
        known = Known(row, ends, ids, fingerprints, None, before.modes if before is not None else {})
        self._pending.append(
            _Pending(
                look.at, tensor, known, asked, packs, lists, list_ids, before, pieces, source, look.is_own
            )
        )
        self._pending_size += tensor.size
        return known


def _is_same_row(known: Known, tensor: Tensor) -> bool:
    row = known.row
    return (row.name, row.dtype, row.shape, row.framework) == (
        tensor.name,
        tensor.dtype,
        tensor.shape,
        tensor.framework,
    )


def _whole(tensor: Tensor, fingerprints: list[bytes]) -> bytes:
    """Return a tensor's fingerprint."""
    return fingerprints[0] if len(fingerprints) == 1 else xxhash.xxh3_128_digest(tensor.data)


def _scaled(source: CastOf, tensor: Tensor) -> Ends:
    """Return a source's cuts as those of the tensor that is its cast."""
    return source.known.ends // DTYPE_SIZES[source.tensor.dtype] * DTYPE_SIZES[tensor.dtype]


def _fits(ends: Ends, source: CastOf, tensor: Tensor) -> bool:
    """Return whether no chunk of a tensor crosses a cut of its source."""
    return bool(np.isin(_scaled(source, tensor), ends).all())


def _lists(ids: U8, ends: Ends) -> tuple[int, bytes, list[U8], list[bytes]]:
    """Return level and id of a tensor's root, and its lists with their ids; a single chunk needs none."""
    if len(ends) == 1:
        return 0, ids[0].tobytes(), [], []
    level, levels = build_lists(ids, np.diff(ends, prepend=0))
    lists = [np.frombuffer(data, np.uint8) for row in levels for data in row]
    list_ids = [blake3(data).digest() for data in lists]
    return level, list_ids[-1], lists, list_ids
