"""verify: read, compare, report.

Owns   the levels of checking, and telling damage as run, step, tensor, chunk and pack.
Never  changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from blake3 import blake3

from deltackpt import codecs, pack
from deltackpt.backends import Backend
from deltackpt.chains import Bases, Chains, as_ids, bases_of
from deltackpt.errors import CorruptError, DeltackptError, FormatError, InvalidInputError, NotFoundError
from deltackpt.format import INDEX_HEADER, PACK_HEADER, RECORD_HEADER, ROW, unseal
from deltackpt.index import Index, Rows, Segment
from deltackpt.manifest import TensorRow
from deltackpt.pack import PackName, Record
from deltackpt.records import (
    GC_RUN,
    GONE,
    Commit,
    Pin,
    SessionName,
    Slot,
    parse_gc_key,
    sid_of,
    tombstone,
)
from deltackpt.refs import Listing
from deltackpt.restore import resolve
from deltackpt.store import DESCRIPTOR, DIRS, Store, Where, open_store
from deltackpt.types import U8
from deltackpt.workers import workers

Level = Literal["references", "stored", "decode"]
#: A name may claim any number.
_N_GAPS_TOLD = 10
#: Looks more at a store that was changed meanwhile, before what all of them found is damage.
_N_AGAIN = 2
LEVELS: tuple[Level, ...] = ("references", "stored", "decode")


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing found wrong.

    Parameters
    ----------
    kind : str
        commit, tombstone, pin, gc, manifest, list, chunk, pack or index.
    key : str
        The file.
    message : str
        What was found, what was expected.
    hits : list of str
        The tensors that cannot be given back, as ``run step: tensor``; none if no step needs it.
    """

    kind: str
    key: str
    message: str
    hits: list[str] = field(default_factory=list)


@dataclass(slots=True)
class VerifyReport:
    """What was checked, and what was found.

    Parameters
    ----------
    level : str
    n_steps, n_packs, n_chunks : int
        Steps whose references were followed, packs, and different chunks they need.
    checked_size : int
        Bytes of packs read.
    damage : list of Damage
    foreign : list of str
        Files that are not deltackpt's; they do no harm.
    """

    level: str
    n_steps: int = 0
    n_packs: int = 0
    n_chunks: int = 0
    checked_size: int = 0
    damage: list[Damage] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether no damage was found."""
        return not self.damage

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "clean": self.clean}


def verify(where: Where, *, level: Level = "references") -> VerifyReport:
    """Check a store.

    Others may save, forget and collect meanwhile: where something seems wrong then, all is looked at again.

    Parameters
    ----------
    where : path, Backend or Store
    level : {"references", "stored", "decode"}
        references: every record, manifest and list, and that every chunk is in a pack that is there.
        stored: also every stored byte against its checksum.
        decode: also every chunk's decoded bytes against its id.

    Raises
    ------
    NotFoundError
        If there is no store.
    StorageError
        If it cannot be read.

    Examples
    --------
    >>> from deltackpt import delta
    >>> from deltackpt.backends.memory import MemoryBackend
    >>> store = open_store(MemoryBackend(), create=True)
    >>> _ = delta.save({"note": b"x" * 5000}, store, step=1)
    >>> verify(store, level="decode").clean
    True
    """
    if level not in LEVELS:
        raise InvalidInputError(f"level: found {level!r}, expected one of {LEVELS}")
    backend = open_store(where).backend
    before, report = _state(backend), _looked(backend, level)
    for _ in range(_N_AGAIN):
        if report.clean or (now := _state(backend)) == before:
            break
        # Somebody saved, forgot or collected meanwhile, and a look sees half of it: damage is there still.
        # Not by message, which names the steps that need it, and those may have changed.
        seen = {(d.kind, d.key) for d in report.damage}
        before, report = now, _looked(backend, level)
        report.damage = [d for d in report.damage if (d.kind, d.key) in seen]
    return report


def _looked(backend: Backend, level: Level) -> VerifyReport:
    # A store of its own: what was read before proves nothing about the bytes there now.
    try:
        return _Verifier(Store(backend), VerifyReport(level)).run()
    finally:
        backend.close()  # a pack held open takes its space after gc has deleted it


def _state(backend: Backend) -> list[list[str]]:
    """Return what changes if somebody saves, forgets or collects: names of records, packs, index files."""
    runs = [f"refs/{run}/" for run in backend.list_dirs("refs/")]
    return [backend.names(place) for place in (*runs, "packs/", "index/", "gc/")]


class _Verifier:
    """One call of `verify`."""

    def __init__(self, store: Store, report: VerifyReport) -> None:
        self._store = store
        self._backend = store.backend
        self._report = report
        self._users: dict[tuple[int, bytes, int], list[str]] = {}  # tensor's root: who needs it
        self._ids: dict[tuple[int, bytes, int], np.ndarray[Any, Any]] = {}
        self._packs: dict[PackName, int] = {}
        self._deltas: dict[bytes, set[bytes]] = {}  # base: the chunks taken against it that steps need
        self._index = Index()
        self._lost: frozenset[PackName] = frozenset()
        self._aside = store.quarantine()
        self._cycles: set[tuple[str, int]] = set()
        self._damaged: set[str] = set()  # records of gc's

    def run(self) -> VerifyReport:
        self._names()
        self._small_records()
        self._index_files()
        n_slots = sum(map(self._run, [*self._store.refs.runs(), GC_RUN]))
        self._count(n_slots)
        self._lists()
        self._places()
        if self._report.level != "references":
            self._stored()
        return self._report

    def _add(self, kind: str, key: str, error: DeltackptError | str, hits: list[str] | None = None) -> None:
        message = error if isinstance(error, str) else error.message
        self._report.damage.append(Damage(kind, key, message, hits or []))

    # -- names

    def _names(self) -> None:
        """List what is there; note files that are not ours."""
        foreign = [e.name for e in self._backend.list("") if e.name != DESCRIPTOR]
        foreign += [name + "/" for name in self._backend.list_dirs("") if name not in DIRS]
        for entry in self._backend.list("packs/"):
            name = PackName.from_key(entry.name)
            if name is None:
                foreign.append(entry.name)
            elif name not in self._aside.packs:
                self._packs[name] = entry.size
        for place in ("index/", "manifests/"):
            foreign += [e.name for e in self._backend.list(place) if sid_of(e.name) is None]
        foreign += [e.name for e in self._backend.list("sessions/") if SessionName.from_key(e.name) is None]
        self._report.foreign = foreign
        self._report.n_packs = len(self._packs)

    def _small_records(self) -> None:
        """Check gc's records."""
        seen = self._cycles
        for entry in self._backend.list("gc/"):
            parsed = parse_gc_key(entry.name)
            if parsed is None:
                self._report.foreign.append(entry.name)
                continue
            seen.add(parsed)
            try:
                self._store.gc_record(entry.name)
            except FormatError as e:
                self._add("gc", entry.name, e)
                self._damaged.add(entry.name)
        for cycle in range(max((cycle + 1 for _, cycle in seen), default=0)):
            if ("condemn", cycle) not in seen and not self._aside.holds(f"gc/condemn-{cycle}"):
                self._add("gc", f"gc/condemn-{cycle}", "missing, and what came after it is there")

    def _index_files(self) -> None:
        for entry in self._backend.list("index/"):
            if sid_of(entry.name) is None:
                continue
            try:
                data = self._backend.read(entry.name)
                Segment.from_bytes(data, self._store.uuid, entry.name)
                sid = INDEX_HEADER.unpack(data, entry.name)[3]
                if entry.name != f"index/{sid.hex()}.idx":
                    raise CorruptError(f"{entry.name}: is the index of session {sid.hex()}")
            except FormatError as e:
                self._add("index", entry.name, f"{e.message}; derived data, deltackpt gc replaces it")
            except NotFoundError:
                continue  # merged meanwhile

    # -- references

    def _count(self, n_slots: int) -> None:
        """Check that there are as many decisions as at the last gc; none is ever removed."""
        keys = [f"gc/{kind}-{cycle}" for kind, cycle in self._cycles]
        known = [self._store.gc_record(key).n_refs for key in keys if key not in self._damaged]
        if n_slots < max(known, default=0):
            self._add("commit", "refs/", f"{n_slots} decisions, at the last gc there were {max(known)}")

    def _run(self, run: str) -> int:
        """Check a run's decisions, tombstones, pins and manifests; return how many decisions there are."""
        listing = self._store.refs.listing(run)
        slots = set(listing.slots)
        for slot, why in _gaps(slots, listing.tombstones).items():
            self._add("commit", slot.key, f"missing, and {why} is there")
        steps = {slot.step for slot in slots}
        for slot in sorted(slots | listing.tombstones):
            if slot in listing.tombstones:
                self._record_is("tombstone", *tombstone(slot))
            self._decision(slot, slot in listing.gone, steps)
        self._pins(listing)
        for entry in self._backend.list(f"refs/{run}/"):
            if not (Slot.from_key(entry.name.removesuffix(GONE)) or Pin.from_key(entry.name)):
                self._report.foreign.append(entry.name)
        return len(slots) if run != GC_RUN else 0

    def _pins(self, listing: Listing) -> None:
        """Check that a step's pins count from 1 without gaps, and that there is something to pin."""
        steps = {slot.step for slot in listing.slots}
        last: Pin | None = None
        for pin in listing.pins:
            first = last.n + 1 if last is not None and last.step == pin.step else 1
            for n in range(first, min(pin.n, first + _N_GAPS_TOLD)):
                self._add("pin", Pin(pin.run, pin.step, n).key, f"missing, and {pin.key} is there")
            if pin.step not in steps:
                self._add("pin", pin.key, "pins a step that was never saved")
            self._record_is("pin", pin.key, pin.to_bytes())
            last = pin

    def _record_is(self, kind: str, key: str, expected: bytes) -> None:
        """Check a record of which every byte follows from its name; what counts is that it is there."""
        if self._aside.holds(key):
            return
        try:
            found = self._backend.read(key)
            if found != expected:
                unseal(found, key)
                self._add(kind, key, "is not the record of its name")
        except FormatError as e:
            self._add(kind, key, e)

    def _decision(self, slot: Slot, is_gone: bool, steps: set[int]) -> None:
        try:
            commit = self._store.refs.decision(slot)
        except FormatError as e:
            if not (is_gone and self._aside.holds(slot.key)):
                self._add("commit", slot.key, e, [] if is_gone else [f"{slot.run} {slot.step}: all of it"])
            return
        if not isinstance(commit, Commit):
            return
        if commit.parent is not None and commit.parent not in steps:
            self._add(
                "commit", Slot(slot.run, commit.parent, 1).key, f"missing, and {slot.key} came after it"
            )
            steps.add(commit.parent)  # told once
        if is_gone:
            return
        self._report.n_steps += 1
        try:
            manifest = self._store.read_manifest(commit)
        except FormatError as e:
            if not self._store.refs.is_gone(slot):
                self._add("manifest", commit.manifest_key, e, [f"{slot.run} {slot.step}: all of it"])
            return
        for row in manifest.tensors:
            if row.size:
                user = f"{slot.run} {slot.step}: {row.name}"
                self._users.setdefault((row.level, row.root, row.size), []).append(user)

    def _lists(self) -> None:
        """Read the lists of every different tensor."""
        for root, users in self._users.items():
            level, chunk_id, size = root
            row = TensorRow(users[0], "uint8", (size,), "numpy", size, level, chunk_id, b"")
            try:
                self._ids[root] = resolve(self._store, [row])[0]["id"]
            except FormatError as e:
                self._add("list", self._store.url, e, users)
        self._report.n_chunks = len(self._wanted())

    def _wanted(self) -> set[bytes]:
        return {chunk_id.tobytes() for ids in self._ids.values() for chunk_id in ids}

    def _hits(self, chunk_ids: set[bytes]) -> dict[bytes, list[str]]:
        """Return which tensors need each of these chunks, in one walk: a lost pack takes thousands.

        Who needs a delta needs its base.
        """
        needing = {chunk_id: self._with_deltas(chunk_id) for chunk_id in chunk_ids}
        asked = set().union(*needing.values())
        users: dict[bytes, list[str]] = {chunk_id: [] for chunk_id in asked}
        for root, ids in self._ids.items():
            for chunk_id in asked.intersection([root[1], *(i.tobytes() for i in ids)]):
                users[chunk_id] += self._users[root]
        return {
            chunk_id: sorted({user for i in deltas for user in users[i]})
            for chunk_id, deltas in needing.items()
        }

    def _with_deltas(self, chunk_id: bytes) -> set[bytes]:
        """Return a chunk, the deltas taken against it, those against them, ..."""
        found: set[bytes] = set()
        todo = {chunk_id}
        while todo:
            found |= todo
            todo = {delta for base in todo for delta in self._deltas.get(base, ())} - found
        return found

    def _places(self) -> None:
        """Check that every chunk has a place in a pack that is there, and so have all its bases."""
        index = self._index = self._store.refresh(complete=True)
        self._lost = frozenset(name for name in index.packs if name not in self._packs)
        wanted = sorted(self._wanted())
        if not wanted:
            return
        ids = as_ids(wanted)
        found, rows = self._least(ids)
        bases = bases_of(rows, self._least, self._store.depth_max)
        if _is_broken(rows, bases):  # perhaps by a delta that has lost its base, beside a good copy
            found, rows = self._find(ids)
            bases = bases_of(rows, self._find, self._store.depth_max)
        places = [(i, row if there else None) for i, there, row in zip(wanted, found, rows, strict=True)]
        places += [(i, row) for i, row in bases.items() if i not in set(wanted)]
        bad: list[tuple[str, str, str, bytes]] = []
        for chunk_id, row in places:
            if row is None:
                bad.append(("chunk", chunk_id.hex(), "is in no pack", chunk_id))
                continue
            if row["depth"]:
                self._deltas.setdefault(row["base"].tobytes(), set()).add(chunk_id)
            name = index.packs[int(row["pack"])]
            if int(row["offset"]) + RECORD_HEADER.size + int(row["stored_size"]) > self._packs[name]:
                message = f"{name.key}: pack ends before chunk {chunk_id.hex()[:16]}"
                bad.append(("pack", name.key, message, chunk_id))
        missing = {chunk_id for _, _, _, chunk_id in bad}
        too_deep = {}
        for chunk_id, row, copy in zip(wanted, rows, self._chains().look_up(ids), strict=True):
            if copy is None and not missing.intersection(self._chain(chunk_id, row, bases)):
                at, link = _unusable(chunk_id, row, bases)
                base = link["base"].tobytes()
                too_deep[at] = f"needs {base.hex()[:16]}, of less depth than {link['depth']}"
        bad += [("chunk", chunk_id.hex(), message, chunk_id) for chunk_id, message in too_deep.items()]
        hits = self._hits({chunk_id for *_, chunk_id in bad}) if bad else {}
        for kind, key, message, chunk_id in bad:
            self._add(kind, key, message, hits[chunk_id])

    def _chain(self, chunk_id: bytes, row: np.void, bases: Bases) -> list[bytes]:
        """Return a chunk and its bases, as far as they are found."""
        ids, link = [chunk_id], row
        while link is not None and link["depth"] and len(ids) <= self._store.depth_max:
            ids.append(link["base"].tobytes())
            link = bases.get(ids[-1])  # type: ignore[assignment]
        return ids

    def _find(self, ids: U8) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], Rows]:
        """Return where each chunk is: the copy of least depth, of those that can be decoded if any can."""
        found, rows = self._least(ids)
        deltas = np.flatnonzero(rows["depth"])
        for i, is_usable in zip(deltas.tolist(), self._usable(rows[deltas]), strict=True):
            if not is_usable:
                others = np.array(self._copies(ids[i].tobytes()), ROW)
                rows[i] = next(iter(others[self._usable(others)]), rows[i])
        return found, rows

    def _usable(self, rows: Rows) -> list[bool]:
        """Return which rows can be decoded: whole ones, and those whose base can be in less depth."""
        bases = self._chains().look_up(np.ascontiguousarray(rows["base"]))
        depths = rows["depth"].tolist()
        return [
            not depth or (base is not None and base.depth < depth)
            for depth, base in zip(depths, bases, strict=True)
        ]

    def _least(self, ids: U8) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], Rows]:
        return self._index.find(ids, self._lost)

    def _copies(self, chunk_id: bytes) -> list[np.void]:
        packs = self._index.packs
        return [row for row in self._index.copies(chunk_id) if packs[int(row["pack"])] not in self._lost]

    def _chains(self) -> Chains:
        return Chains(self._index.packs, self._least, self._copies, self._store.depth_max)

    # -- stored bytes

    def _stored(self) -> None:
        def check(name: PackName) -> list[tuple[str, bytes | None]]:
            return list(self._pack(name))

        names = sorted(self._packs)
        bad: list[tuple[str, str, bytes | None]] = []
        for name, problems in zip(names, workers.map(check, names), strict=True):
            bad += [(name.key, message, chunk_id) for message, chunk_id in problems]
            self._report.checked_size += self._packs[name]
        hits = self._hits({chunk_id for *_, chunk_id in bad if chunk_id}) if bad else {}
        for key, message, chunk_id in bad:
            self._add("pack", key, message, hits[chunk_id] if chunk_id else [])

    def _pack(self, name: PackName) -> Iterator[tuple[str, bytes | None]]:
        """Check a pack's bytes; yield what is wrong and with which chunk."""
        size, key = self._packs[name], name.key
        try:
            header = self._backend.read(key, 0, min(size, PACK_HEADER.size))
            pack.read_header(header, key, store=self._store.uuid, name=name)
            rows = pack.read_footer(lambda offset, n: self._backend.read(key, offset, n), size, key)
        except NotFoundError:
            return  # deleted by gc since the listing
        except FormatError as e:
            yield e.message, None
            if not isinstance(e, CorruptError):
                return
            rows = self._index.rows_of(name)  # what else is wrong, and who needs it
        bases = self._decodable(rows) if self._report.level == "decode" else {}
        for row in rows:
            try:
                self._record(key, row, bases)
            except FormatError as e:
                yield e.message, row["id"].tobytes()
            except NotFoundError:
                return

    def _decodable(self, rows: Rows) -> Bases:
        """Return the rows of the bases of a pack's deltas, and of theirs; None for one that is not there.

        Of a delta that no step needs the base may be gone: where one needs it, `_places` has told.
        """
        bases = bases_of(rows, self._least, self._store.depth_max)
        ids = list(bases)
        for chunk_id, copy in zip(ids, self._chains().look_up(as_ids(ids)), strict=True):
            if copy is None:
                bases[chunk_id] = None
        return bases

    def _record(self, key: str, row: np.void, bases: Bases) -> None:
        offset = int(row["offset"])
        where = f"{key} @ {offset}"
        data = np.frombuffer(
            self._backend.read(key, offset, RECORD_HEADER.size + int(row["stored_size"])), np.uint8
        )
        record = Record.from_bytes(data.data, where)
        pack.check_row(record, row, where)
        payload = data[RECORD_HEADER.size :]
        pack.check_payload(record, payload, where)
        if self._report.level != "decode":
            return
        base = None
        if record.depth:
            base_row = bases.get(record.base)
            if base_row is None or base_row["depth"] >= record.depth:
                return
            base = np.empty(int(base_row["raw_size"]), np.uint8)
            try:
                self._store.read_into(record.base, base_row, base, bases)
            except CorruptError as e:
                raise CorruptError(f"{where}: chunk {record.id.hex()[:16]}: its base: {e.message}") from e
        out = np.empty(record.raw_size, np.uint8)
        codecs.decode(record.codec, payload, record.itemsize, out, where, base)
        if blake3(out).digest() != record.id:
            raise CorruptError(f"{where}: decoded bytes do not give chunk id {record.id.hex()[:16]}")


def _is_broken(rows: Rows, bases: Bases) -> bool:
    """Return whether some chain has a base that is nowhere, or no less deep than its delta."""
    for row in (*rows[rows["depth"] > 0], *bases.values()):
        if row is None:
            return True
        if row["depth"]:
            base = bases.get(row["base"].tobytes())
            if base is None or base["depth"] >= row["depth"]:
                return True
    return False


def _unusable(chunk_id: bytes, row: np.void, bases: Bases) -> tuple[bytes, np.void]:
    """Return the link of a chain whose base is as deep as itself; if there is none, the first one."""
    at, link = chunk_id, row
    while link["depth"]:
        base = bases[link["base"].tobytes()]
        assert base is not None  # or that one would be told as missing
        if base["depth"] >= link["depth"]:
            return at, link
        at, link = link["base"].tobytes(), base
    return chunk_id, row


def _gaps(slots: AbstractSet[Slot], tombstones: AbstractSet[Slot]) -> dict[Slot, str]:
    """Return the slots that must be there: attempts count from 1, and only what was there is forgotten."""
    gaps = dict.fromkeys(tombstones - slots, "its tombstone")
    for slot in sorted(slots, reverse=True):
        for attempt in range(max(1, slot.attempt - _N_GAPS_TOLD), slot.attempt):
            below = Slot(slot.run, slot.step, attempt)
            if below not in slots:
                gaps.setdefault(below, slot.key)
    return gaps
