"""gc: give back the space that no step needs.  Two phases, no clock, no lock.

Owns   the plan (a pure function), and the order of condemn, drain, sweep, delete.
Never  deletes what a committed step needs, whatever runs beside it (format.md, "Garbage collection").

    G1  mark, live closed under bases; candidates are packs that nothing live needs and no open session wrote
    G2  create condemn-n, or adopt the one that is there
    G3  wait until every session of epoch <= n has ended, fencing those whose writer is dead
    G4  mark again; create sweep-n = condemn-n without what is live now, or adopt
    G5  delete exactly what sweep-n lists

Any step may be done by another process, years later.  Time decides when a writer is given up for dead,
never whether a deletion is safe.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deltackpt import liveness, pack, process, rebase
from deltackpt.chains import as_ids
from deltackpt.codecs import Kind
from deltackpt.errors import ConflictError, CorruptError, FormatError, NotFoundError, StorageError
from deltackpt.format import RECORD_HEADER, unseal
from deltackpt.index import N_FILES_MAX, Segment
from deltackpt.liveness import Liveness, PackUse
from deltackpt.pack import PackName, Record
from deltackpt.records import GC_RUN, Fence, GcRecord, SessionName, Slot, index_key, sid_of
from deltackpt.session import Session
from deltackpt.store import Store, Where, open_store
from deltackpt.types import U8

log = logging.getLogger("deltackpt")

#: A session is given up for dead after this long, unless its process is known to be; a save takes minutes.
PATIENCE_S = 3600.0
#: Packs are rewritten until no more than this share of the bytes in use is waste.
WASTE_MAX = 0.10
#: Packs condemned at a time on a full disk: their two records fit into what is kept back for that.
_N_DEAD_TIGHT = 128
#: What a backend writes before it has its name; the session is in it unless it is a decision or a gc record.
_TEMPORARY = re.compile(r"tmp/(?:(?:([0-9a-f]{32}).*|.+)\.|probe-)[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class GcPlan:
    """What gc would do, and why.

    Parameters
    ----------
    dead : list of PackName
        Packs that nothing needs: to be condemned.
    repack : list of PackName
        Packs of much waste: what is live in them is copied first, then they are condemned too.
    live_size, dead_size : int
        Bytes that committed steps need, and do not need, in all packs.
    """

    dead: list[PackName]
    repack: list[PackName]
    live_size: int
    dead_size: int


def plan(packs: Mapping[PackName, PackUse], *, waste_max: float = WASTE_MAX) -> GcPlan:
    """Choose packs to delete and packs to rewrite.  Reads nothing, changes nothing.

    Wholly dead packs go.  Of the others, those with the highest share of waste are rewritten until the
    waste left is at most `waste_max` of what is live.

    Examples
    --------
    >>> a, b = PackName(bytes(16), 0, 0), PackName(bytes(16), 0, 1)
    >>> chosen = plan({a: PackUse(100, 0), b: PackUse(100, 95)})
    >>> chosen.dead == [a], chosen.repack
    (True, [])
    """
    live_size = sum(use.live_size for use in packs.values())
    dead = sorted(name for name, use in packs.items() if not use.live_size)
    mixed = [(name, use) for name, use in packs.items() if use.live_size]
    waste = sum(use.size - use.live_size for _, use in mixed)
    repack = []
    # Ties by name, so that every process plans the same.
    for name, use in sorted(mixed, key=lambda m: ((m[1].live_size / m[1].size), m[0])):
        if waste <= waste_max * live_size:
            break
        repack.append(name)
        waste -= use.size - use.live_size
    dead_size = sum(use.size for use in packs.values()) - live_size
    return GcPlan(dead, sorted(repack), live_size, dead_size)


@dataclass(slots=True)
class GcResult:
    """What a gc did, or would do.

    Parameters
    ----------
    dry_run : bool
    n_packs, live_size, dead_size : int
        Packs seen, and their bytes in and out of use.
    n_dead, n_repacked : int
        Packs found wholly dead, and packs rewritten for their waste.
    n_rebased : int
        Deltas stored whole, so that bases which no step has can go.
    freed_size : int
        Bytes given back by this call; 0 in a dry run.
    n_deleted : int
        Files deleted by this call.
    waiting_for : list of str
        Sessions that must end before the packs condemned now can be deleted.
    fenced : list of str
        Sessions given up for dead.
    """

    dry_run: bool
    n_packs: int = 0
    live_size: int = 0
    dead_size: int = 0
    n_dead: int = 0
    n_repacked: int = 0
    n_rebased: int = 0
    freed_size: int = 0
    n_deleted: int = 0
    waiting_for: list[str] = field(default_factory=list)
    fenced: list[str] = field(default_factory=list)


def collect(
    where: Where, *, dry_run: bool = False, force: bool = False, patience_s: float = PATIENCE_S
) -> GcResult:
    """Give back the space that no committed step needs.

    Safe beside writers, readers and other gcs.  With no session open it frees the space now; with one open
    it condemns, says what it waits for, and a later call frees.

    Parameters
    ----------
    where : path, Backend or Store
    dry_run : bool
        Plan only.
    force : bool
        Go on although fewer decisions are listed than at the last gc.
    patience_s : float
        Give a session up for dead after this many seconds; one whose process is known to be dead at once.

    Raises
    ------
    CorruptError
        If a committed step's manifest or a list is missing or damaged: then what is live is not known.
    StorageError
        If the storage fails, or lists far less than it held.

    Examples
    --------
    >>> from deltackpt import delta
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = open_store(MemoryBackend(), create=True)
    >>> _ = delta.save({"note": b"x" * 5000}, store, step=1)
    >>> collect(store).freed_size
    0
    """
    store = open_store(where)
    try:
        return store.freeing(_Gc(store, GcResult(dry_run), force=force, patience_s=patience_s).run)
    finally:
        store.backend.close()


class _OvertakenError(Exception):
    """Another gc did meanwhile what makes this one's view out of date: it looks again."""


class _Gc:
    """One call of `collect`."""

    def __init__(self, store: Store, result: GcResult, *, force: bool, patience_s: float) -> None:
        self._store = store
        self._backend = store.backend
        self._result = result
        self._force = force
        self._patience_s = patience_s
        self._live: set[PackName] = set()
        #: What said that the disk is full: what is dead goes before anything is written.
        self._full: StorageError | None = None

    def run(self, full: StorageError | None) -> GcResult:
        self._full = full
        if self._result.dry_run:
            seen = self._look()
            self._result.n_rebased = len(rebase.plan(seen.links()).whole)
            self._count(self._measure(seen))
            return self._result
        self._store.prepare_to_write()
        self._reap()
        self._forget_superseded()
        self._delete_temporary()  # first, since on a full disk the rest may need the room
        while self._goes_on():
            pass
        self._tidy()
        self._backend.keep_reserve()
        return self._result

    def _goes_on(self) -> bool:
        """Finish what others began, or else begin a cycle; return whether there may be more to do."""
        cycle = self._unfinished()
        if cycle is not None:
            return self._finish(cycle)
        try:
            cycle = self._begin()
        except _OvertakenError:
            return True
        if cycle is None:
            return False
        freed_size = self._result.freed_size
        is_over = self._finish(cycle)
        return is_over and self._full is not None and self._result.freed_size > freed_size

    def _finish(self, cycle: int) -> bool:
        """Sweep and delete what a cycle condemned; False while it waits for a session."""
        if not self._drain(cycle):
            return False
        self._sweep(cycle)
        return True

    # -- G1, G2

    def _unfinished(self) -> int | None:
        """Return the first cycle that was condemned but not swept, or swept but not deleted, if any."""
        n, _ = self._store.gc_state()
        records = set(self._backend.names("gc/"))
        packs = set(self._backend.names("packs/"))
        for cycle in range(n):  # all of them: a power loss may undo deletions of long ago
            key = f"gc/sweep-{cycle}"
            if key not in records or any(name.key in packs for name in self._store.gc_record(key).packs):
                return cycle
        return None

    def _begin(self) -> int | None:
        """Plan, rewrite, and condemn what is dead then; return the cycle, None if there is nothing to do."""
        seen = self._settled()
        try:
            if self._full is None and (whole := rebase.plan(seen.links()).whole):
                self._rebase(seen, whole)
                seen = self._settled()
            chosen = self._measure(seen)
            if self._full is not None:
                chosen = self._least(chosen, seen)
            if not (chosen.dead or chosen.repack):
                if self._full is not None:
                    self._tell_left(seen, self._full)
                return None
            victims = frozenset(chosen.repack)
            if victims:
                self._repack(seen, victims)
        except NotFoundError as e:
            if set(seen.packs) <= {PackName.from_key(key) for key in self._backend.names("packs/")}:
                raise
            raise _OvertakenError from e  # moved and deleted meanwhile
        except StorageError as e:
            if not e.is_full:
                raise
            if self._full is None:
                self._full = e
                raise _OvertakenError from e  # from now on in steps that need the least room
            if not self._result.freed_size:
                raise
            log.warning("%s; what is half in use stays as it is", e.message)
            return None
        self._count(chosen)
        dead = set(chosen.dead)
        if victims:
            seen = self._settled()
            dead = {name for name, use in seen.use(avoid=victims).items() if not use.live_size}
        if not dead:
            return None
        record = GcRecord("condemn", seen.n_cycles, frozenset(dead), seen.n_refs, len(seen.packs))
        self._backend.create_once(record.key, record.to_bytes())  # else adopt what is there
        self._backend.barrier("gc")
        return seen.n_cycles

    def _least(self, chosen: GcPlan, seen: Liveness) -> GcPlan:
        """Return the part of a plan that needs the least room: what is dead, or else the one least in use."""
        use = seen.use()
        dead = sorted(chosen.dead, key=lambda name: -use[name].size)[:_N_DEAD_TIGHT]
        repack = [] if dead else sorted(chosen.repack, key=lambda name: use[name].live_size)[:1]
        return replace(chosen, dead=dead, repack=repack)

    def _tell_left(self, seen: Liveness, full: StorageError) -> None:
        """Say what a full disk left undone; raise what it said if that was all there was to do."""
        n = len(rebase.plan(seen.links()).whole)
        if not n:
            return
        log.warning("%s: no room to store %d deltas whole, so what they need stays", self._store.url, n)
        if not self._result.freed_size:
            raise full

    def _settled(self) -> Liveness:
        """Look, and begin nothing on what is seen while another gc's cycle is unfinished.

        Two unfinished cycles could condemn a chain each in part, and each find the rest of it gone: so a
        cycle is condemned only by one who has seen the sweep record of the one before.
        """
        seen = self._look()
        if not seen.is_settled:
            raise _OvertakenError
        try:
            seen.check_uncondemned()
        except CorruptError as e:
            if self._store.gc_state()[0] != seen.n_cycles:
                raise _OvertakenError from e
            raise
        return seen

    def _look(self) -> Liveness:
        # Before the listing: a gc beside this one may list more, later, and say so.
        last = _last_record(self._store)
        seen = liveness.look(self._store)
        if last is not None and seen.n_refs < last.n_refs and not self._force:
            raise StorageError(
                f"{self._store.url}: lists {seen.n_refs} decisions, {last.n_refs} were there at the last gc "
                "and none is ever removed; nothing was deleted",
                hint="check that all of refs/ is there; if it is, gc --force",
            )
        return seen

    def _measure(self, seen: Liveness) -> GcPlan:
        use = seen.use()
        chosen = plan(use)
        self._live = {name for name in use if use[name].live_size}
        r = self._result
        r.n_packs, r.live_size, r.dead_size = len(seen.packs), chosen.live_size, chosen.dead_size
        return chosen

    def _count(self, chosen: GcPlan) -> None:
        self._result.n_dead += len(chosen.dead)
        self._result.n_repacked += len(chosen.repack)

    def _forget_superseded(self) -> None:
        """Forget attempts that a newer one replaced, where the writer died before doing so."""
        refs = self._store.refs
        for run in refs.runs():
            commits = refs.commits(run)  # listed once: an attempt that comes later is no older one
            newest = {commit.slot.step: commit for commit in commits}
            superseded = [c.slot for c in commits if c is not newest[c.slot.step]]
            if superseded:
                refs.settle()  # or the newer one could be lost, and the tombstone of the older one not
                refs.forget(superseded)

    # -- rewriting

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """Open an ordinary session that commits no step; another gc may give it up for dead like others."""
        session = Session.for_gc(self._store)
        try:
            with session.losing(), session:
                yield session
        except ConflictError as e:
            raise _OvertakenError from e

    def _rebase(self, seen: Liveness, chunk_ids: list[bytes]) -> None:
        """Store deltas whole, as an ordinary session; what they needed is needed no more at the next look."""
        rows = self._store.find(as_ids(chunk_ids))
        bases = self._store.bases(rows)
        with self._session() as session:
            for i in np.lexsort((rows["offset"], rows["pack"])).tolist():
                row, data = rows[i], np.empty(int(rows[i]["raw_size"]), np.uint8)
                try:
                    self._store.read_into(chunk_ids[i], row, data, bases)
                except CorruptError as e:
                    log.warning("%s; what is left of it stays as it is", e.message)
                    continue
                # Whether these are floats decides on a bit to rotate by, and nothing else; deltas mostly are.
                itemsize = int(row["itemsize"])
                session.put(chunk_ids[i], data, Kind(itemsize, itemsize > 1))
            session.publish(None)
            self._backend.barrier("index")
            self._result.n_rebased = session.n_new_chunks
            session.finish()

    def _repack(self, seen: Liveness, victims: frozenset[PackName]) -> None:
        """Copy what is in use in `victims` into new packs, as an ordinary session."""
        with self._session() as session:
            for name, row in seen.in_use_of(victims):
                session.copy(*self._record(name, row))
            session.publish(None)
            self._backend.barrier("index")
            session.finish()

    def _record(self, name: PackName, row: np.void) -> tuple[Record, U8]:
        offset, size = int(row["offset"]), RECORD_HEADER.size + int(row["stored_size"])
        where = f"{self._store.url}/{name.key} @ {offset}"
        data = np.frombuffer(self._backend.read(name.key, offset, size), np.uint8)
        record = Record.from_bytes(data.data, where)
        pack.check_row(record, row, where)
        payload = data[RECORD_HEADER.size :]
        pack.check_payload(record, payload, where)
        return record, payload

    # -- G3

    def _drain(self, cycle: int) -> bool:
        """Return whether every session that may not know of the cycle has ended."""
        waiting_for = [
            f"{_what(name.slot)} ({self._who(name)})" for name in self._reap() if name.epoch <= cycle
        ]
        self._result.waiting_for = waiting_for
        return not waiting_for

    def _reap(self) -> list[SessionName]:
        """End the sessions that cannot commit any more, fencing those of the dead; return the others."""
        alive = []
        for name in self._store.sessions():
            if self._backend.exists(name.slot.key):  # whatever it says: it may be damaged
                self._end(name)  # committed, fenced, or lost to another writer
            elif self._is_dead(name):
                self._fence(name)
            else:
                alive.append(name)
        return alive

    def _is_dead(self, name: SessionName) -> bool:
        try:
            if process.is_dead(self._identity(name)):
                return True
            return self._backend.age_s(name.key) > self._patience_s
        except FormatError:
            return True  # cut short by a power loss: its writer had no more luck
        except NotFoundError:
            return True  # it ended meanwhile: its decision, if any, is seen by the second mark

    def _identity(self, name: SessionName) -> dict[str, Any]:
        return unseal(self._backend.read(name.key), name.key)

    def _who(self, name: SessionName) -> str:
        try:
            who = self._identity(name)
        except (FormatError, NotFoundError):
            who = {}
        return f"process {who.get('pid', '?')} on {who.get('host', 'an unknown host')}"

    def _fence(self, name: SessionName) -> None:
        if not self._backend.exists(name.key):
            return
        try:
            self._decide(name)
        except StorageError as e:
            if not e.is_full:
                raise
            # What it was writing makes room for the fence.  If it lives after all it finds its file gone, and
            # publishes nothing.
            for key in self._backend.names("tmp/"):
                if key.startswith(f"tmp/{name.sid.hex()}"):
                    self._delete(key)
            self._decide(name)
        self._end(name)

    def _decide(self, name: SessionName) -> None:
        """Create the fence in a session's slot, unless that is decided."""
        try:
            self._store.refs.decide(Fence(name.slot, name.sid))
        except ConflictError:
            pass  # decided meanwhile, either way
        else:
            self._result.fenced.append(_what(name.slot))

    def _end(self, name: SessionName) -> None:
        self._backend.delete(name.key)

    # -- G4, G5

    def _sweep(self, cycle: int) -> None:
        condemned = self._store.gc_record(f"gc/condemn-{cycle}").packs
        if not self._backend.exists(f"gc/sweep-{cycle}"):
            seen = self._look()
            kept = seen.needed_from(condemned)
            kept |= self._doubtful(seen, condemned - kept, condemned)
            self._store.refs.settle()
            record = GcRecord("sweep", cycle, condemned - kept, seen.n_refs, len(seen.packs))
            self._backend.create_once(record.key, record.to_bytes())  # else adopt what is there
            self._backend.barrier("gc")
        for name in sorted(self._store.gc_record(f"gc/sweep-{cycle}").packs):
            self._delete(name.key)

    def _doubtful(
        self, seen: Liveness, dead: frozenset[PackName], condemned: frozenset[PackName]
    ) -> frozenset[PackName]:
        """Return the packs to keep because they may have the only good copy of a chunk.

        Of two copies one is about to go, and nobody has looked whether the other one is damaged.
        """
        rows, holders = seen.relied_on(dead, condemned)
        for name, row in rows:
            try:
                self._record(name, row)
            except (CorruptError, NotFoundError) as e:
                log.warning("%s; %d packs that may have it are kept; run deltackpt repair", e, len(holders))
                return holders
        return frozenset()

    def _delete(self, key: str) -> None:
        try:
            size = self._backend.size(key)
        except NotFoundError:
            return
        self._backend.delete(key)
        self._result.freed_size += size
        self._result.n_deleted += 1

    # -- what no protocol protects

    def _tidy(self) -> None:
        """Merge index files, and delete the manifests of dead sessions and forgotten steps."""
        self._delete_temporary()
        manifests = self._backend.names("manifests/")
        # Listed before the sessions: whatever was there then belongs to a session listed now, or to none.
        open_sids = {name.sid.hex() for name in self._store.sessions()}
        committed = {c.manifest_key for run in self._store.refs.runs() for c in self._store.refs.commits(run)}
        orphans = [k for k in manifests if k not in committed and sid_of(k) not in {None, *open_sids}]
        if orphans:
            self._store.refs.settle()
        for key in orphans:
            self._delete(key)
        try:
            with suppress(_OvertakenError):
                self._merge_index()
        except StorageError as e:
            if not e.is_full:
                raise
            log.warning("%s; index files stay as they are", e.message)

    def _delete_temporary(self) -> None:
        """Delete what dead sessions were writing."""
        temporary = self._backend.names("tmp/")  # before the sessions, as in `_tidy`
        open_sids = {name.sid.hex() for name in self._store.sessions()}
        for key in temporary:
            owner = _TEMPORARY.fullmatch(key)
            if owner and (owner[1] not in open_sids if owner[1] else not open_sids):
                self._delete(key)

    def _merge_index(self) -> None:
        """Merge index files when there are many, some name deleted packs, or packs in use are in none."""
        names = [name for name in self._backend.names("index/") if sid_of(name)]
        n_cycles, condemned = self._store.gc_state()
        gone = {name for cycle in range(n_cycles) for name in self._swept(cycle)}
        gone |= self._store.quarantine().packs
        index = self._store.refresh(complete=True)
        # Of the others it is not known whether their writer is at work, or was before they were durable.
        unlisted = index.unlisted & self._live - condemned
        segments, stale = [], bool(unlisted)
        for name in names:
            try:
                segment = self._store.read_segment(name)
            except NotFoundError:
                return  # another gc is merging
            except CorruptError:
                stale = True  # what it said is read from the packs
                continue
            stale = stale or not gone.isdisjoint(segment.packs)
            segments.append(segment)
        if len(names) <= N_FILES_MAX and not stale:
            return
        merged = Segment.merge([*segments, *index.segments], without=gone | index.unlisted - unlisted)
        with self._session() as session:
            if merged.packs:
                key = index_key(session.sid)
                self._backend.create_once(key, merged.to_bytes(self._store.uuid, session.sid))
            # The merged file before the others go: a look-up finds the one or the other.
            self._backend.barrier("index")
            for name in names:
                self._backend.delete(name)
            session.finish()

    def _swept(self, cycle: int) -> frozenset[PackName]:
        key = f"gc/sweep-{cycle}"
        return self._store.gc_record(key).packs if self._backend.exists(key) else frozenset()


def _what(slot: Slot) -> str:
    return "gc" if slot.run == GC_RUN else f"run {slot.run} step {slot.step}"


def _last_record(store: Store) -> GcRecord | None:
    """Return the newest record that says how many decisions there were; what is set aside says nothing."""
    n_cycles, _ = store.gc_state()
    for cycle in reversed(range(n_cycles)):
        for kind in ("sweep", "condemn"):
            key = f"gc/{kind}-{cycle}"
            if store.backend.exists(key) and (record := store.gc_record(key)).n_refs:
                return record
    return None
