"""The small records: who writes, what was decided, what gc condemned.

Owns   their names in the store and their bytes, and what the names in the quarantine say.
Never  opens a file, or decides who wins: the first to create a name does.

A step is saved into a *slot*, ``refs/<run>/<step>.<attempt>``, attempts counting from 1.  The slot's one
file is the decision, created once: a `Commit`, or the `Fence` of a writer that was given up for dead.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from deltackpt.energy import Energy
from deltackpt.errors import CorruptError, InvalidInputError
from deltackpt.format import check_features, seal, unseal
from deltackpt.groups import GroupCost
from deltackpt.pack import PackName

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SLOT = re.compile(r"refs/([^/]+)/(0|[1-9][0-9]{0,18})\.([1-9][0-9]{0,8})")
_PIN = re.compile(r"(refs/[^/]+/[0-9]+)\.pin-([1-9][0-9]{0,8})")
_SESSION = re.compile(r"sessions/([0-9a-f]{32})\.(0|[1-9][0-9]{0,8})\.([0-9]{1,9})\.([0-9]{1,19})\.([^/]+)")
_GC = re.compile(r"gc/(condemn|sweep)-(0|[1-9][0-9]{0,8})")
_OWNED = re.compile(r"manifests/([0-9a-f]{32})\.man|index/([0-9a-f]{32})\.idx")
_ASIDE, _MARK = "quarantine/", re.compile(r"[0-9a-f]{64}")
STEP_MAX = (1 << 63) - 1
#: Where gc's own sessions decide; no run can have this name.
GC_RUN = "~gc"
GONE = ".gone"
PIN = ".pin-"


def is_run(name: str) -> bool:
    """Return whether a run may have this name."""
    return bool(_RUN.fullmatch(name)) and not name.endswith((".", GONE))


def check_run(run: Any) -> str:
    """Return `run` if it is a run's name.

    Raises
    ------
    InvalidInputError
        Unless it is 1 to 128 of ``A-Z a-z 0-9 . _ -``, not starting with a sign and not ending in a dot.
    """
    if not isinstance(run, str) or not is_run(run):
        raise InvalidInputError(
            f"run: found {run!r}, expected 1 to 128 of A-Z a-z 0-9 . _ -, starting with a letter or digit",
            hint="choose another run name",
        )
    return run


def check_step(step: Any) -> int:
    """Return `step` as an int if it is one, 0 <= step < 2 ** 63."""
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise InvalidInputError(f"step: found {step!r}, expected an integer", hint="pass the training step")
    number = int(step.__index__())
    if not 0 <= number <= STEP_MAX:
        raise InvalidInputError(
            f"step: found {number}, expected 0 to {STEP_MAX}", hint="pass the training step"
        )
    return number


class Slot(NamedTuple):
    """Where an attempt at a step is decided."""

    run: str
    step: int
    attempt: int

    @property
    def key(self) -> str:
        """Name in the store."""
        return f"refs/{self.run}/{self.step}.{self.attempt}"

    @classmethod
    def from_key(cls, key: str) -> Slot | None:
        """Parse a name in the store; None if it is not a slot's."""
        m = _SLOT.fullmatch(key)
        if not m or not _may_decide(m[1]):
            return None
        slot = cls(m[1], int(m[2]), int(m[3]))
        return slot if slot.step <= STEP_MAX else None


@lru_cache
def _may_decide(run: str) -> bool:
    """Return whether slots may be of this run; asked of every name in a listing."""
    return run == GC_RUN or bool(_RUN.fullmatch(run))


@dataclass(frozen=True, slots=True)
class SessionName:
    """A writer at work.  Its name alone says all that safety needs, so its body may be lost or torn."""

    sid: bytes
    epoch: int
    slot: Slot

    @property
    def key(self) -> str:
        """Name in the store."""
        return f"sessions/{self.sid.hex()}.{self.epoch}.{self.slot.attempt}.{self.slot.step}.{self.slot.run}"

    @classmethod
    def from_key(cls, key: str) -> SessionName | None:
        """Parse a name in the store; None if it is not a session's."""
        m = _SESSION.fullmatch(key)
        if not m:
            return None
        slot = Slot.from_key(f"refs/{m[5]}/{m[4]}.{m[3]}")
        return cls(bytes.fromhex(m[1]), int(m[2]), slot) if slot else None


@dataclass(frozen=True, slots=True)
class Figures:
    """What a save cost, in bytes, counts and seconds.

    Parameters
    ----------
    logical_size : int
        Bytes of the state's tensors.
    new_size : int
        Of those, bytes in chunks the store did not have.
    written_size : int
        Bytes of the files written: packs, index, manifest.
    n_tensors, n_chunks, n_new_chunks : int
    seconds : dict of str to float
        By phase, up to the decision.
    groups : list of GroupCost
        A dozen at most; none in what was saved before they were counted.
    energy : Energy or None
        Up to the decision; None in what was saved before it was told, and of what took none, as a fork.
    """

    logical_size: int = 0
    new_size: int = 0
    written_size: int = 0
    n_tensors: int = 0
    n_chunks: int = 0
    n_new_chunks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    groups: list[GroupCost] = field(default_factory=list)
    energy: Energy | None = None

    @property
    def new_share(self) -> float:
        """The part of the state's bytes that the store did not have; all of none."""
        return min(1.0, self.new_size / self.logical_size) if self.logical_size else 1.0


@dataclass(frozen=True, slots=True)
class Origin:
    """The step that a run was forked from: said to people, followed by nobody."""

    run: str
    step: int


@dataclass(frozen=True, slots=True)
class Commit:
    """The decision that makes a step visible.

    Parameters
    ----------
    slot : Slot
    sid : bytes
        The session that saved it; its manifest is ``manifests/<sid>.man``.
    manifest : bytes
        BLAKE3-256 of the manifest file.
    parent : int or None
        The run's step before it when it was saved.
    created_s : float
        Seconds since 1970 by the writer's clock; shown, and what `retention.every_seconds` goes by.
    metrics, metadata : dict
        The user's.
    figures : Figures
    origin : Origin or None
        What the run was forked from, in its first step.
    """

    slot: Slot
    sid: bytes
    manifest: bytes
    parent: int | None
    created_s: float
    metrics: dict[str, float]
    metadata: dict[str, Any]
    figures: Figures
    origin: Origin | None = None

    @property
    def manifest_key(self) -> str:
        """Name of the manifest in the store."""
        return manifest_key(self.sid)

    def to_bytes(self) -> bytes:
        """Return the record's bytes."""
        origin = {"origin": asdict(self.origin)} if self.origin else {}
        return seal(
            {
                "kind": "commit",
                "features": [],
                "run": self.slot.run,
                "step": self.slot.step,
                "attempt": self.slot.attempt,
                "sid": self.sid.hex(),
                "manifest": self.manifest.hex(),
                "parent": self.parent,
                "created_s": self.created_s,
                "metrics": self.metrics,
                "metadata": self.metadata,
                "figures": asdict(self.figures),
                **origin,
            }
        )


@dataclass(frozen=True, slots=True)
class Fence:
    """The decision that a writer lost: gc gave it up for dead."""

    slot: Slot
    sid: bytes

    def to_bytes(self) -> bytes:
        """Return the record's bytes."""
        s = self.slot
        return seal(
            {
                "kind": "fence",
                "features": [],
                "run": s.run,
                "step": s.step,
                "attempt": s.attempt,
                "sid": self.sid.hex(),
            }
        )


def decision_from_bytes(data: bytes, slot: Slot) -> Commit | Fence:
    """Parse what was decided in `slot`.

    Raises
    ------
    CorruptError
        If any byte is not as written, or it belongs to another slot.
    """
    where = slot.key
    body = unseal(data, where)
    check_features(body.get("features"), where)
    if (body.get("run"), body.get("step"), body.get("attempt")) != (slot.run, slot.step, slot.attempt):
        raise CorruptError(f"{where}: is the decision of run {body.get('run')!r} step {body.get('step')!r}")
    try:
        sid = _hex(body["sid"], 16)
        if body["kind"] == "fence":
            return Fence(slot, sid)
        if body["kind"] != "commit":
            raise ValueError(f"kind is {body['kind']!r}")
        parent, metrics, metadata = body["parent"], body["metrics"], body["metadata"]
        created_s = body["created_s"]
        if not (parent is None or type(parent) is int) or not isinstance(metrics, dict):
            raise ValueError("parent or metrics are of the wrong type")
        if not isinstance(metadata, dict) or not all(map(_is_number, [created_s, *metrics.values()])):
            raise ValueError("metadata, a metric or the time is of the wrong type")
        figures = _figures(body["figures"])
        return Commit(
            slot,
            sid,
            _hex(body["manifest"], 32),
            parent,
            float(created_s),
            metrics,
            metadata,
            figures,
            _origin(body.get("origin")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise CorruptError(f"{where}: not a decision: {e!r}") from e


def _is_number(value: Any) -> bool:
    # JSON has 1e999, and integers that no float is as large as.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _figures(body: Any) -> Figures:
    if not isinstance(body, dict):
        raise TypeError(f"figures are {body!r:.80}")
    # A later version may count more.
    known = {name: body[name] for name in Figures.__slots__ if name in body}
    seconds, groups = known.pop("seconds", {}), known.pop("groups", [])
    energy = known.pop("energy", None)
    if not isinstance(seconds, dict) or not all(map(_is_number, [*known.values(), *seconds.values()])):
        raise ValueError("a figure is of the wrong type")
    if not isinstance(groups, list):
        raise ValueError(f"groups are {groups!r:.80}")
    return Figures(
        **known,
        seconds=seconds,
        groups=[GroupCost.from_json(group) for group in groups],
        energy=None if energy is None else Energy.from_json(energy),
    )


def _origin(body: Any) -> Origin | None:
    if body is None:
        return None
    origin = Origin(body["run"], body["step"])
    if not isinstance(origin.run, str) or type(origin.step) is not int:
        raise ValueError("origin is of the wrong type")
    return origin


def _hex(text: Any, size: int) -> bytes:
    data = bytes.fromhex(text)
    if len(data) != size:
        raise ValueError(f"{text!r} has {len(data)} bytes, expected {size}")
    return data


def manifest_key(sid: bytes) -> str:
    """Return the name of the manifest a session writes."""
    return f"manifests/{sid.hex()}.man"


def index_key(sid: bytes) -> str:
    """Return the name of the index a session writes."""
    return f"index/{sid.hex()}.idx"


def sid_of(key: str) -> str | None:
    """Return the session, in hex, that a manifest or an index is named by; None for other people's files."""
    m = _OWNED.fullmatch(key)
    return (m[1] or m[2]) if m else None


def tombstone(slot: Slot) -> tuple[str, bytes]:
    """Return name and bytes of the record that forgets what was committed in `slot`."""
    return slot.key + GONE, seal(
        {"kind": "gone", "run": slot.run, "step": slot.step, "attempt": slot.attempt}
    )


@dataclass(frozen=True, slots=True)
class Pin:
    """The `n`-th record about keeping a step: odd ones pin it, even ones unpin it.

    Examples
    --------
    >>> Pin("main", 1000, 1).key, Pin("main", 1000, 2).pins
    ('refs/main/1000.pin-1', False)
    """

    run: str
    step: int
    n: int

    @property
    def key(self) -> str:
        """Name in the store."""
        return f"refs/{self.run}/{self.step}{PIN}{self.n}"

    @property
    def pins(self) -> bool:
        """Whether the step is pinned as long as no later record is there."""
        return self.n % 2 == 1

    @classmethod
    def from_key(cls, key: str) -> Pin | None:
        """Parse a name in the store; None if it is not a pin's."""
        m = _PIN.fullmatch(key)
        slot = Slot.from_key(f"{m[1]}.1") if m else None
        return cls(slot.run, slot.step, int(m[2])) if m and slot else None

    def to_bytes(self) -> bytes:
        """Return the record's bytes."""
        kind = "pin" if self.pins else "unpin"
        return seal({"kind": kind, "run": self.run, "step": self.step, "n": self.n})


@dataclass(frozen=True, slots=True)
class GcRecord:
    """A list of packs that gc decided on in one cycle: to be drained, or to be deleted.

    Parameters
    ----------
    kind : {"condemn", "sweep"}
    cycle : int
    packs : frozenset of PackName
    n_refs, n_packs : int
        Commits and packs listed when it was decided; a later gc that sees far fewer distrusts its listing.
    """

    kind: str
    cycle: int
    packs: frozenset[PackName]
    n_refs: int
    n_packs: int

    @property
    def key(self) -> str:
        """Name in the store."""
        return f"gc/{self.kind}-{self.cycle}"

    def to_bytes(self) -> bytes:
        """Return the record's bytes."""
        return seal(
            {
                "kind": self.kind,
                "features": [],
                "cycle": self.cycle,
                "packs": sorted(p.key for p in self.packs),
                "n_refs": self.n_refs,
                "n_packs": self.n_packs,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> GcRecord:
        """Parse a gc record; `CorruptError` unless it is the one `key` names."""
        body = unseal(data, key)
        check_features(body.get("features"), key)
        try:
            packs = [PackName.from_key(k) for k in body["packs"]]
            record = cls(
                body["kind"],
                body["cycle"],
                frozenset(p for p in packs if p is not None),
                int(body["n_refs"]),
                int(body["n_packs"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
            raise CorruptError(f"{key}: not a gc record: {e!r}") from e
        if record.key != key or type(record.cycle) is not int or None in packs:
            raise CorruptError(f"{key}: is {record.key!r}, or names what is not a pack")
        return record


def parse_gc_key(key: str) -> tuple[str, int] | None:
    """Return kind and cycle of a gc record's name, None if it is not one's."""
    m = _GC.fullmatch(key)
    return (m[1], int(m[2])) if m else None


def aside_key(key: str) -> str:
    """Return the name under which a file is set aside: a mark of it, or what its bytes were.

    Examples
    --------
    >>> aside_key("gc/sweep-3")
    'quarantine/gc~sweep-3'
    """
    return _ASIDE + key.replace("/", "~")


def lost_key(chunk_id: bytes) -> str:
    """Return the name of the mark of a chunk that is known to be damaged."""
    return _ASIDE + chunk_id.hex()


class Quarantine(NamedTuple):
    """What nobody is to build on.

    Parameters
    ----------
    packs : frozenset of PackName
        Packs set aside where they stand: whatever was good in them stands elsewhere too.
    ids : frozenset of bytes
        Chunks of which no good copy was left.
    keys : frozenset of str
        All names in the quarantine.
    """

    packs: frozenset[PackName]
    ids: frozenset[bytes]
    keys: frozenset[str]

    @classmethod
    def of(cls, keys: Iterable[str]) -> Quarantine:
        """Return what a listing of the quarantine says."""
        names = {key: key.removeprefix(_ASIDE) for key in keys}
        packs = {PackName.from_key(name.replace("~", "/")) for name in names.values()}
        ids = {bytes.fromhex(name) for name in names.values() if _MARK.fullmatch(name)}
        return cls(frozenset(packs - {None}), frozenset(ids), frozenset(names))  # type: ignore[arg-type]

    def holds(self, key: str) -> bool:
        """Return whether a file is set aside."""
        return aside_key(key) in self.keys
