"""repair: make a damaged store whole, as far as its bytes are still to be had, and usable in any case.

Owns   the plan (a pure function), and the order in which it is done.
Never  deletes what may be wanted again: it adds good copies, and sets what is damaged aside.

    R1  gc records: condemn anew what one that is lost may have listed, then set it aside
    R2  decisions and manifests that another copy has
    R3  good records of bad packs, and chunks of the other store, into a new pack, as an ordinary session
    R4  then set the bad packs aside, where they stand; gc deletes them once every step is whole without them
    R5  quarantine the chunks that are lost: the next save that has one stores it again
    R6  an index file in place of those that are damaged or name what is not there

Each step is durable before the next, and leaves the store no worse if it is the last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from deltackpt import pack, survey
from deltackpt.chains import as_ids
from deltackpt.codecs import Kind
from deltackpt.errors import ConflictError, InvalidInputError, NotFoundError
from deltackpt.format import RECORD_HEADER
from deltackpt.index import Segment
from deltackpt.pack import PackName, Record
from deltackpt.records import (
    GC_RUN,
    GONE,
    Commit,
    Fence,
    GcRecord,
    Pin,
    Slot,
    aside_key,
    index_key,
    lost_key,
)
from deltackpt.session import Session
from deltackpt.store import Store, Where, open_store
from deltackpt.survey import Salvage, Survey
from deltackpt.verify import Damage

log = logging.getLogger("deltackpt")

Verb = Literal[
    "condemn",
    "create",
    "supersede",
    "replace",
    "rewrite",
    "fetch",
    "set aside",
    "quarantine",
    "release",
    "index",
]


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to be done.

    Parameters
    ----------
    verb : str
    key : str
        The file, or the chunk, that it is done to.
    why : str
    """

    verb: Verb
    key: str
    why: str


@dataclass(slots=True)
class RepairPlan:
    """What repair would do; every member in the order of the steps R1 to R6.

    Parameters
    ----------
    actions : list of Action
        All of it, to be read.
    condemn : GcRecord or None
        Packs that records of gc's which are lost may have listed.
    create : dict of str to bytes
        Files that were lost, and of which the name or another copy tells every byte.
    supersede : dict of Slot to Commit
        Decisions that cannot be read, and what was decided.
    forget : list of Slot
        Decisions that cannot be read, and that no step needs.
    replace : dict of str to bytes
        Manifests that are damaged or lost.
    rewrite : list of Salvage
        Packs whose good records go into a new one.
    keep : list of bytes
        Chunks that are stored again, whole, before a gc deletes the only good copy, or because a delta of
        them can use no other.
    fetch : list of bytes
        Chunks that the other store has.
    aside : list of str
        Files that are set aside where they stand.
    quarantine, release : list of bytes
        Chunks no good copy of which is left; and those of which there is one again.
    bad_index, stale_index : list of str
        Index files that another one takes the place of: unreadable ones, and those whose rows it takes over.
    unlisted : list of PackName
        Packs that this one takes in.
    """

    actions: list[Action] = field(default_factory=list)
    condemn: GcRecord | None = None
    create: dict[str, bytes] = field(default_factory=dict)
    supersede: dict[Slot, Commit] = field(default_factory=dict)
    forget: list[Slot] = field(default_factory=list)
    replace: dict[str, bytes] = field(default_factory=dict)
    rewrite: list[Salvage] = field(default_factory=list)
    keep: list[bytes] = field(default_factory=list)
    fetch: list[bytes] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    quarantine: list[bytes] = field(default_factory=list)
    release: list[bytes] = field(default_factory=list)
    bad_index: list[str] = field(default_factory=list)
    stale_index: list[str] = field(default_factory=list)
    unlisted: list[PackName] = field(default_factory=list)


def plan(found: Survey) -> RepairPlan:
    """Decide what to do about what is damaged.  Reads nothing, changes nothing.

    Examples
    --------
    >>> from deltackpt.records import Quarantine
    >>> plan(Survey([], Quarantine.of([]))).actions
    []
    """
    p = RepairPlan()

    def act(verb: Verb, key: str, why: str) -> None:
        p.actions.append(Action(verb, key, why))

    _plan_cycles(found, p, act)
    for damage in found.damage:
        if damage.kind in ("tombstone", "pin"):
            _plan_existence(found, damage, p, act)
    slots = {slot for d in found.damage if d.kind == "commit" and (slot := Slot.from_key(d.key))}
    for slot in sorted(slots | found.decisions.keys()):
        _plan_decision(found, slot, p, act)
    for key, data in sorted(found.manifests.items()):
        p.replace[key] = data
        act("replace", key, "another copy is what was committed")
    p.rewrite = found.salvages
    for salvage in p.rewrite:
        act("rewrite", salvage.name.key, f"{len(salvage.rows)} good records, {len(salvage.bad)} bad ones")
    p.aside += [salvage.name.key for salvage in p.rewrite]
    p.keep = sorted(found.doomed | found.bases)
    for chunk_id in p.keep:
        why = (
            "is set aside or too deep"
            if chunk_id in found.bases
            else "is in a pack that gc is about to delete"
        )
        act("rewrite", chunk_id.hex(), f"its only good copy {why}")
    p.fetch = sorted(found.offered)
    for chunk_id in p.fetch:
        act("fetch", chunk_id.hex(), "the other store has it")
    p.quarantine = sorted(found.bad - found.bases - found.offered - found.quarantine.ids)
    for chunk_id in p.quarantine:
        act("quarantine", chunk_id.hex(), "no good copy is left; the next save that has it stores it again")
    p.release = sorted(found.whole)
    for chunk_id in p.release:
        act("release", chunk_id.hex(), "there is a good copy again")
    p.bad_index, p.stale_index, p.unlisted = found.bad_index, found.stale_index, found.unlisted
    for key in found.bad_index:
        act("index", key, "cannot be read; made again from packs")
    for key in found.stale_index:
        act("index", key, "names packs that are lost or set aside")
    for name in p.unlisted:
        act("index", name.key, "is in use, and no index file names it")
    return p


_Act = Callable[[Verb, str, str], None]


def _plan_cycles(found: Survey, p: RepairPlan, act: _Act) -> None:
    """See to records of gc's that are lost.

    Nobody knows what a cycle condemned or spared whose records are gone: whoever read them may delete, or
    rely on, any of it.  So it is condemned again, by a new cycle, which waits for all of them; then the old
    one counts for nothing.
    """
    n = max((cycle + 1 for _, cycle in found.cycles), default=0)
    again: set[PackName] = set()
    for cycle in range(n):
        sweep, condemn = found.cycles.get(("sweep", cycle)), found.cycles.get(("condemn", cycle))
        if sweep is not None and ("condemn", cycle) not in found.cycles:
            record = replace(sweep, kind="condemn")
            p.create[record.key] = record.to_bytes()
            act("create", record.key, "its sweep record says what counts of it")
            continue
        bad = [f"gc/condemn-{cycle}"] if condemn is None else []
        bad += [f"gc/sweep-{cycle}"] if sweep is None and ("sweep", cycle) in found.cycles else []
        bad = [key for key in bad if not found.quarantine.holds(key)]
        if sweep is None and bad:
            again |= found.packs if condemn is None else found.packs & condemn.packs
        for key in bad:
            p.aside.append(key)
            act("set aside", key, "cannot be read; what it may have listed is condemned anew")
    if again:
        # Not fewer than there were: gc goes by it to see that decisions are lost.
        n_refs = sum(len(listing.slots) for run, listing in found.listings.items() if run != GC_RUN)
        n_refs = max([n_refs, *(record.n_refs for record in found.cycles.values() if record is not None)])
        p.condemn = GcRecord("condemn", n, frozenset(again), n_refs, len(found.packs))
        p.actions.insert(
            0, Action("condemn", p.condemn.key, f"{len(again)} packs; run gc before the next save")
        )


def _plan_existence(found: Survey, damage: Damage, p: RepairPlan, act: _Act) -> None:
    """See to a record of which only the name counts."""
    slot, pin = Slot.from_key(damage.key.removesuffix(GONE)), Pin.from_key(damage.key)
    listing = found.listings.get(slot.run if slot else pin.run if pin else "")
    if listing is None:
        return
    if (pin in listing.pins) if pin else (slot in listing.tombstones):
        if pin is None or any(s.step == pin.step for s in listing.slots):
            p.aside.append(damage.key)
            act("set aside", damage.key, "its name says all that counts")
    elif pin is not None:
        p.create[pin.key] = pin.to_bytes()
        act("create", pin.key, "a later one is there")


def _plan_decision(found: Survey, slot: Slot, p: RepairPlan, act: _Act) -> None:
    """See to a decision that is missing or cannot be read."""
    listing = found.listings.get(slot.run)
    if listing is None:
        return
    decided = found.decisions.get(slot)
    newest = max(s.attempt for s in (*listing.slots, slot) if s.step == slot.step)
    is_replaced = any(s.attempt > slot.attempt for s in found.committed if s[:2] == slot[:2])
    if slot not in listing.slots:
        if decided is not None:
            p.create[slot.key] = decided.to_bytes()
            has = "has" if isinstance(decided, Commit) else "has forgotten"
            act("create", slot.key, f"the other store {has} it")
        elif slot in listing.tombstones:
            p.create[slot.key] = Fence(slot, bytes(16)).to_bytes()
            act("create", slot.key, "it is forgotten: a fence takes its place")
        elif is_replaced:
            p.create[slot.key] = Fence(slot, bytes(16)).to_bytes()
            act("create", slot.key, "a later attempt counts: a fence takes its place")
    elif slot in listing.gone:
        p.aside.append(slot.key)
        act("set aside", slot.key, "it is forgotten")
    elif isinstance(decided, Commit) and slot.attempt == newest:
        p.supersede[slot] = replace(decided, slot=slot._replace(attempt=newest + 1))
        p.aside.append(slot.key)
        act("supersede", slot.key, "the other store has what was decided")
    elif is_replaced or slot.run == GC_RUN:
        p.forget.append(slot)
        p.aside.append(slot.key)
        act("set aside", slot.key, "a later attempt counts" if is_replaced else "it ended a gc, and no step")


# -- doing it


@dataclass(slots=True)
class RepairResult:
    """What was done, or would be, and what is damaged still.

    Parameters
    ----------
    dry_run : bool
    actions : list of Action
    damage : list of Damage
        What verify finds afterwards; in a dry run, what it finds now.
    """

    dry_run: bool
    actions: list[Action] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is damaged, and nothing is left to do."""
        return not self.damage and not (self.dry_run and self.actions)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {**asdict(self), "clean": self.clean}


def repair(where: Where, *, source: Where | None = None, dry_run: bool = False) -> RepairResult:
    """Make a damaged store whole, as far as its bytes are still to be had, and usable in any case.

    Reads all of it.  Safe beside saves, restores and gcs; killed anywhere it leaves the store no worse.

    Parameters
    ----------
    where : path, Backend or Store
    source : path, Backend or Store, optional
        Another store.  Chunks that are lost are taken from it, by their ids; from a copy of the same store
        also decisions and manifests.
    dry_run : bool
        Plan only.

    Raises
    ------
    NotFoundError
        If there is no store.
    CorruptError
        If the descriptor is damaged: nothing can be said of a store without it.
    ConflictError
        If a gc began a cycle at the same time.
    StorageError
        If the storage fails.

    Examples
    --------
    >>> from deltackpt import delta
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> backend = MemoryBackend()
    >>> _ = delta.save({"note": b"x" * 5000}, backend, step=1)
    >>> repair(backend).actions
    []
    """
    backend = open_store(where).backend
    other = None if source is None else Store(open_store(source).backend)
    if other is not None and other.backend.is_same(backend):
        raise InvalidInputError("source: is the store itself", hint="give another store, or none")
    result = RepairResult(dry_run)
    while True:
        found = survey.look(Store(backend), other)
        chosen = plan(found)
        new = [action for action in chosen.actions if action not in result.actions]
        result.actions += new
        result.damage = found.damage
        if dry_run or not new:
            return result
        _Repair(Store(backend), other, chosen).run()
        # Again: what was salvaged or fetched may be lists, and the chunks below them were not known.


class _Repair:
    """One plan being done."""

    def __init__(self, store: Store, other: Store | None, chosen: RepairPlan) -> None:
        self._store = store
        self._backend = store.backend
        self._other = other
        self._plan = chosen

    def run(self) -> None:
        p = self._plan
        self._store.prepare_to_write()
        if p.condemn is not None:
            if not self._backend.create_once(p.condemn.key, p.condemn.to_bytes()):
                raise ConflictError(f"{p.condemn.key}: a gc began this cycle meanwhile", hint="repair again")
            self._backend.barrier("gc")
        self._set_aside(key for key in p.aside if key.startswith("gc/"))
        self._records()
        if p.rewrite or p.keep or p.fetch:
            self._pack()
        self._set_aside(p.aside)
        for chunk_id in p.quarantine:
            self._backend.create_once(lost_key(chunk_id), b"")
        self._backend.barrier("quarantine")
        if p.bad_index or p.stale_index or p.unlisted:
            self._index()
        for chunk_id in p.release:
            self._backend.delete(lost_key(chunk_id))

    def _set_aside(self, keys: Iterable[str]) -> None:
        """Mark files, durable on return."""
        for key in keys:
            self._backend.create_once(aside_key(key), b"")
        self._backend.barrier("quarantine")

    # -- R2

    def _records(self) -> None:
        p = self._plan
        for key, data in p.create.items():
            self._backend.create_once(key, data)
            self._backend.barrier(key.rpartition("/")[0])
        for key, data in p.replace.items():
            self._move_aside(key)
            self._backend.create_once(key, data)
            self._backend.barrier("manifests")
        for slot, commit in p.supersede.items():
            # As an overwrite: the new one before the tombstone of the old.
            try:
                self._store.refs.decide(commit)
            except ConflictError:
                continue  # somebody saved it meanwhile
            self._store.refs.forget([slot])
        if p.forget:
            self._store.refs.forget(p.forget)

    def _move_aside(self, key: str) -> None:
        """Keep the bytes of a file in the quarantine, and delete it, so that its name is free."""
        try:
            data = survey.readable(self._backend, key)
        except NotFoundError:
            return
        kept, n = aside_key(key), 1
        while not self._backend.create_once(kept, data) and self._backend.read(kept) != data:
            n += 1
            kept = f"{aside_key(key)}.{n}"
        self._backend.barrier("quarantine")
        self._backend.delete(key)

    # -- R3

    def _pack(self) -> None:
        """Copy what is good in bad packs, and fetch what is lost, as an ordinary session."""
        session = Session.for_gc(self._store)
        with session.losing(), session:
            # First, since a session stores a chunk once, and what is copied may be a delta without a base.
            for chunk_id in self._plan.keep:
                self._fetch(session, chunk_id, self._store)
            for chunk_id in self._plan.fetch:
                assert self._other is not None
                self._fetch(session, chunk_id, self._other)
            for salvage in self._plan.rewrite:
                try:
                    for row in salvage.rows:
                        self._copy(session, salvage.name, row)
                except NotFoundError:
                    continue  # deleted by a gc meanwhile
            session.publish(None)
            # Durable before the bad packs are set aside: no save builds on a pack that no index names.
            self._backend.barrier("index")
            session.check_open()  # or a gc may have deleted what was copied
            self._set_aside(salvage.name.key for salvage in self._plan.rewrite)
            session.finish()

    def _copy(self, session: Session, name: PackName, row: np.void) -> None:
        offset, size = int(row["offset"]), RECORD_HEADER.size + int(row["stored_size"])
        where = f"{self._store.url}/{name.key} @ {offset}"
        data = np.frombuffer(self._backend.read(name.key, offset, size), np.uint8)
        record, payload = Record.from_bytes(data.data, where), data[RECORD_HEADER.size :]
        pack.check_payload(record, payload, where)
        session.copy(record, payload)

    def _fetch(self, session: Session, chunk_id: bytes, source: Store) -> None:
        """Store a chunk again, as another store has it, or this one."""
        [row] = source.find(as_ids([chunk_id]))
        data = survey.read(source, chunk_id)
        if data is None:
            log.warning("%s: chunk %s is damaged too", source.url, chunk_id.hex()[:16])
            return
        itemsize = int(row["itemsize"])
        session.put(chunk_id, data, Kind(itemsize, itemsize > 1))

    # -- R6

    def _index(self) -> None:
        """Write one index file of what was in those that go, and of packs that none names; then they go."""
        p, aside = self._plan, self._store.quarantine().packs
        index = self._store.refresh(complete=True)
        segments = []
        for key in p.stale_index:
            try:
                segments.append(self._store.read_segment(key))
            except NotFoundError:  # merged meanwhile
                continue
        there = {PackName.from_key(key) for key in self._backend.names("packs/")}
        gone = {name for segment in segments for name in segment.packs if name not in there} | aside
        gone |= index.unlisted.difference(p.unlisted)
        unlisted = [Segment.merge(index.segments, without={*index.packs}.difference(p.unlisted))]
        merged = Segment.merge([*segments, *unlisted], without=gone)
        session = Session.for_gc(self._store)
        with session.losing(), session:
            if merged.packs:
                key = index_key(session.sid)
                self._backend.create_once(key, merged.to_bytes(self._store.uuid, session.sid))
            # The new file before the others go: a look-up finds the one or the other.
            self._backend.barrier("index")
            for key in p.stale_index:
                self._backend.delete(key)
            for key in p.bad_index:
                self._move_aside(key)
            session.finish()
