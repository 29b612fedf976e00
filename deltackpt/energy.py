"""Energy: the joules that a piece of work in this process took, and by what they are known.

Owns   the machine's counters (RAPL, NVML), the estimate where there are none, its constants, the words.
Never  tells which part of what a counter counted one process took, or makes the work it measures fail.

Where each constant comes from, and how far off it may be, stands in docs/energy.md.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

#: W of a busy hardware thread; published: 1.7 to 8.6.
CPU_W = 5.0
#: J per byte read from or written to memory: 20 pJ a bit; published: 4 to 41.
MOVED_J = 20e-12 * 8
#: J per byte written to an NVMe SSD: 5 J a GB; published: 1 to 14.
WRITTEN_J = 5e-9
#: W of a GPU that waits: its board's, by a part of its name, and what a CUDA context adds.
GPU_IDLE_W = {"A100": 46.0, "P100": 36.0, "V100": 35.0, "A10G": 18.0, "T4": 8.0}
GPU_OTHER_W = 46.0
GPU_CONTEXT_W = 40.0
#: CPU seconds that a byte takes when a state is written whole: `torch.save` and fsync, measured.
WHOLE_CPU_S = 0.5e-9

#: What a part of the joules is known by, in the order they are told; the first of them are measured.
SOURCES = (
    "rapl package",
    "rapl dram",
    "nvml",
    "cpu seconds",
    "bytes moved",
    "bytes written",
    "idle gpus",
)
MEASURED = SOURCES[:3]
_N_PARTS_MAX = 32

_POWERCAP = "/sys/class/powercap"
_GPUS = "/proc/driver/nvidia/gpus"
#: Of the package domains alone: intel-rapl-mmio counts the same package once more.
_ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")
#: NVML samples an H100 or A100 for 25 ms in every 100 ms, and counts the joules of that (arXiv:2312.02741).
_NVML_COUNTS_FROM_S = 1.0


@dataclass(frozen=True, slots=True)
class Energy:
    """What some work took.

    Parameters
    ----------
    joules : float
        The sum of `parts`.
    method : str
        By what they are known: ``measured:`` and ``estimated:``, each with its sources; empty if nothing is.
    parts : dict of str to float
        Joules by source, of `SOURCES`.

    Examples
    --------
    >>> took = Energy.of({"rapl package": 1.5, "rapl dram": 0.25, "bytes written": 0.25})
    >>> took.joules, took.method
    (2.0, 'measured: rapl package+dram; estimated: bytes written')
    >>> Energy.of({"cpu seconds": 0.5, "bytes moved": 0.1}).method
    'estimated: cpu seconds, bytes moved'
    """

    joules: float = 0.0
    method: str = ""
    parts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, float]) -> Energy:
        """Return the sum of what each source says, and the words for it; nothing is said of no joules."""
        told = {name: round(joules, 6) for name, joules in parts.items() if round(joules, 6) > 0}
        ordered = {name: told[name] for name in sorted(told, key=_order)}
        words = [f"{kind}: {', '.join(of_kind)}" for kind, of_kind in by_kind(ordered).items()]
        method = "; ".join(words).replace("rapl package, rapl dram", "rapl package+dram")
        return cls(round(sum(ordered.values()), 6), method, ordered)

    @classmethod
    def total(cls, energies: Iterable[Energy]) -> Energy:
        """Return the sum of several, source by source.

        Examples
        --------
        >>> Energy.total([Energy.of({"nvml": 2.0}), Energy.of({"nvml": 3.0, "cpu seconds": 1.0})]).parts
        {'nvml': 5.0, 'cpu seconds': 1.0}
        """
        parts: dict[str, float] = {}
        for energy in energies:
            for name, joules in energy.parts.items():
                parts[name] = parts.get(name, 0.0) + joules
        return cls.of(parts)

    @classmethod
    def from_json(cls, body: Any) -> Energy:
        """Return what a record has of it, or raise a `ValueError`; what a later version adds is passed over.

        Examples
        --------
        >>> Energy.from_json({"joules": -1, "method": "", "parts": {}})
        Traceback (most recent call last):
            ...
        ValueError: joules are -1
        """
        if not isinstance(body, dict) or not isinstance(body.get("parts"), dict):
            raise ValueError(f"energy is {body!r:.80}")
        method, parts = body.get("method"), body["parts"]
        if not isinstance(method, str) or len(parts) > _N_PARTS_MAX:
            raise ValueError(f"energy is known by {method!r:.80}, in {len(parts)} parts")
        return cls(_joules(body.get("joules")), method, {name: _joules(part) for name, part in parts.items()})


def by_kind(parts: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the parts that are measured, and those that are estimated; a kind without any is left out.

    Examples
    --------
    >>> by_kind({"nvml": 2.0, "cpu seconds": 1.0})
    {'measured': {'nvml': 2.0}, 'estimated': {'cpu seconds': 1.0}}
    """
    kinds: dict[str, dict[str, float]] = {"measured": {}, "estimated": {}}
    for name, joules in parts.items():
        kinds["measured" if name in MEASURED else "estimated"][name] = joules
    return {kind: of_kind for kind, of_kind in kinds.items() if of_kind}


def _order(source: str) -> tuple[int, str]:
    return SOURCES.index(source) if source in SOURCES else len(SOURCES), source


def _joules(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"joules are {value!r:.80}")
    return float(value)


# -- the estimate


def moved_size(logical_size: int, new_size: int, written_size: int) -> int:
    """Return the bytes that a save reads from memory and writes to it, about.

    All bytes are read once to see what changed; what is new is read to identify, to encode and to check it,
    and its base once; what is written goes into a buffer, into the page cache, and on to the device.

    Examples
    --------
    >>> moved_size(1000, 100, 60)
    1580
    """
    return logical_size + 4 * new_size + 3 * written_size


def estimate(cpu_s: float, moved_size: int, written_size: int) -> dict[str, float]:
    """Return joules by source, from what was done alone.

    Examples
    --------
    >>> {name: round(joules, 2) for name, joules in estimate(2.0, 10**9, 10**9).items()}
    {'cpu seconds': 10.0, 'bytes moved': 0.16, 'bytes written': 5.0}
    """
    return {
        "cpu seconds": CPU_W * cpu_s,
        "bytes moved": MOVED_J * moved_size,
        "bytes written": WRITTEN_J * written_size,
    }


def whole(logical_size: int) -> float:
    """Return the joules that writing a state whole takes, by its bytes: read, copied, written.

    Examples
    --------
    >>> round(whole(10**9), 2)
    8.14
    """
    return sum(estimate(WHOLE_CPU_S * logical_size, 4 * logical_size, logical_size).values())


# -- the counters


class Files:
    """The kernel's files about the machine, below a root; what cannot be read is empty.

    Examples
    --------
    >>> Files().text("/sys/class/powercap/no such zone/name"), Files().names("/no such folder")
    ('', [])
    """

    def __init__(self, root: str | Path = "/") -> None:
        self._root = Path(root)

    def text(self, path: str) -> str:
        """Return a file's text."""
        try:
            return (self._root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return ""

    def names(self, path: str) -> list[str]:
        """Return the names in a folder, in order."""
        try:
            return sorted(entry.name for entry in (self._root / path.lstrip("/")).iterdir())
        except OSError:
            return []


class Zone(NamedTuple):
    """A domain of RAPL: its folder, the source that it is, and where its counter starts again, in uJ."""

    path: str
    source: str
    range_uj: int


def zones(files: Files) -> list[Zone]:
    """Return the packages and their memory; none unless the counters of all of them can be read.

    Since Linux 5.10 only root can.  psys counts the packages once more, core and uncore are in them.
    """
    found = []
    for name in files.names(_POWERCAP):
        path = f"{_POWERCAP}/{name}"
        kind = files.text(f"{path}/name") if _ZONE.fullmatch(name) else ""
        source = "rapl package" if kind.startswith("package") else "rapl dram" if kind == "dram" else ""
        if source:
            found.append(Zone(path, source, _number(files.text(f"{path}/max_energy_range_uj")) or 0))
    readable = all(zone.range_uj and _counter(files, zone) is not None for zone in found)
    return found if readable and any(zone.source == "rapl package" for zone in found) else []


def _counter(files: Files, zone: Zone) -> int | None:
    return _number(files.text(f"{zone.path}/energy_uj"))


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def spent(before: int, after: int, range_max: int) -> int:
    """Return how far a counter went that starts again after `range_max`, once at most.

    Once is enough: the 65 to 262 kJ that a package counts to take a server 5 minutes or more.

    Examples
    --------
    >>> spent(100, 250, 1000), spent(900, 50, 1000)
    (150, 150)
    """
    return after - before if after >= before else after - before + range_max


class Gpu(NamedTuple):
    """What NVML says of one GPU: mJ counted since the driver was loaded, and mW now; None: it does not."""

    counted_mj: int | None
    power_mw: int | None


def gpu_joules(before: Sequence[Gpu], after: Sequence[Gpu], seconds: float) -> float:
    """Return what GPUs took: by their counters, or in a short time, or without one, as power times seconds.

    Examples
    --------
    >>> gpu_joules([Gpu(5_000, 90_000)], [Gpu(185_000, 90_000)], 2.0)
    180.0
    >>> gpu_joules([Gpu(5_000, 90_000)], [Gpu(5_000, 70_000)], 0.1)
    8.0
    """
    total_mj = 0.0
    for a, b in zip(before, after, strict=True):
        powers = [p for p in (a.power_mw, b.power_mw) if p is not None]
        counted_mj = 0 if a.counted_mj is None or b.counted_mj is None else b.counted_mj - a.counted_mj
        if counted_mj > 0 and (seconds >= _NVML_COUNTS_FROM_S or not powers):
            total_mj += counted_mj
        elif powers:
            total_mj += sum(powers) / len(powers) * seconds
    return total_mj / 1000


class Nvml:
    """The GPUs that this process may use, through nvidia-ml-py.

    Parameters
    ----------
    lib : module
        ``pynvml``, or what has its names.
    visible : str, optional
        As ``CUDA_VISIBLE_DEVICES``: indices or the beginnings of UUIDs; None: all.

    Raises
    ------
    lib.NVMLError
        If there is no driver to ask.
    """

    def __init__(self, lib: Any, visible: str | None = None) -> None:
        self._lib = lib
        lib.nvmlInit()
        handles = [lib.nvmlDeviceGetHandleByIndex(i) for i in range(lib.nvmlDeviceGetCount())]
        if visible is None:
            self._handles = handles
            return
        uuids = [str(lib.nvmlDeviceGetUUID(handle)) for handle in handles]
        wanted = [name.strip() for name in visible.split(",")]
        self._handles = [
            handle
            for i, (handle, uuid) in enumerate(zip(handles, uuids, strict=True))
            if any(name == str(i) or (name.startswith("GPU-") and uuid.startswith(name)) for name in wanted)
        ]

    def read(self) -> list[Gpu]:
        """Return what each GPU says now."""
        lib = self._lib
        return [
            Gpu(
                self._ask(lib.nvmlDeviceGetTotalEnergyConsumption, h),
                self._ask(lib.nvmlDeviceGetPowerUsage, h),
            )
            for h in self._handles
        ]

    def _ask(self, function: Callable[[Any], int], handle: Any) -> int | None:
        try:
            return int(function(handle))
        except self._lib.NVMLError:  # a GPU before Volta does not count, one that was lost says nothing
            return None


def _nvml(visible: str | None) -> Nvml | None:
    """Return the GPUs if nvidia-ml-py is installed and finds a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        return Nvml(pynvml, visible)
    except pynvml.NVMLError:
        return None


def idle_gpu_watts(files: Files, visible: str | None) -> float:
    """Return what the GPUs that this process may use draw while they wait, by their names.

    Examples
    --------
    >>> idle_gpu_watts(Files("/no such root"), None)
    0.0
    """
    models = [
        line.partition(":")[2].strip()
        for name in files.names(_GPUS)
        for line in files.text(f"{_GPUS}/{name}/information").splitlines()[:1]
    ]
    if visible is not None:
        models = models[: len([name for name in visible.split(",") if name.strip() not in ("", "-1")])]
    boards_w = [next((w for part, w in GPU_IDLE_W.items() if part in m), GPU_OTHER_W) for m in models]
    return sum((board_w + GPU_CONTEXT_W for board_w in boards_w), 0.0)


# -- the meter


class Reading(NamedTuple):
    """What all counters said at a moment."""

    at_s: float
    cpu_s: float
    rapl_uj: list[int] | None
    gpus: list[Gpu] | None


class Machine:
    """The counters there are here.

    Parameters
    ----------
    files : Files
    nvml : callable
        Given `visible`, returns the `Nvml` of this process, or None; asked once, when it uses CUDA.
    clock, cpu_clock : callable
        Seconds; the second those of all threads of this process.
    visible : str, optional
        ``CUDA_VISIBLE_DEVICES``.
    """

    def __init__(
        self,
        files: Files | None = None,
        nvml: Callable[[str | None], Nvml | None] = _nvml,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
        visible: str | None = None,
    ) -> None:
        self._files = files or Files()
        self.zones = zones(self._files)
        self._has_gpus = bool(self._files.names(_GPUS))
        self._ask_nvml = nvml
        self._nvml: Nvml | None = None
        self._visible = visible
        self._clock, self._cpu_clock = clock, cpu_clock
        #: W that GPUs draw while they wait, where NVML cannot be asked; 0 until CUDA is in this process.
        self.idle_w = 0.0
        self._has_cuda = False

    def read(self) -> Reading:
        """Return what all counters say now."""
        self._look_for_cuda()
        counters = [_counter(self._files, zone) for zone in self.zones]
        rapl = [n for n in counters if n is not None]
        return Reading(
            self._clock(),
            self._cpu_clock(),
            rapl if rapl and len(rapl) == len(counters) else None,
            self._nvml.read() if self._nvml else None,
        )

    def _look_for_cuda(self) -> None:
        """Count GPUs from when this process uses CUDA on: a job that does not keeps none of them waiting."""
        if self._has_cuda or not self._has_gpus:
            return
        self._has_cuda = "libcuda." in self._files.text("/proc/self/maps")
        if not self._has_cuda:
            return
        nvml = self._ask_nvml(self._visible)
        said = nvml.read() if nvml else []
        if nvml and (not said or any(gpu != Gpu(None, None) for gpu in said)):
            self._nvml = nvml
        else:  # no NVML, or GPUs that say nothing to it, as virtual ones do
            self.idle_w = idle_gpu_watts(self._files, self._visible)

    def between(
        self, before: Reading, after: Reading, resumed: Reading, moved_size: int, written_size: int
    ) -> Energy:
        """Return what was spent between two readings; GPUs until the third, when training went on."""
        parts = estimate(max(0.0, after.cpu_s - before.cpu_s), moved_size, written_size)
        parts |= self._rapl(before.rapl_uj, after.rapl_uj)
        if "rapl package" in parts:
            del parts["cpu seconds"]
        if "rapl dram" in parts:
            del parts["bytes moved"]
        stall_s = resumed.at_s - before.at_s
        if before.gpus is not None and resumed.gpus is not None:
            parts["nvml"] = gpu_joules(before.gpus, resumed.gpus, stall_s)
        else:
            parts["idle gpus"] = self.idle_w * stall_s
        return Energy.of(parts)

    def _rapl(self, before: list[int] | None, after: list[int] | None) -> dict[str, float]:
        """Return joules by domain; nothing if a counter could not be read, or has not moved on yet."""
        if before is None or after is None:
            return {}
        parts: dict[str, float] = {}
        for zone, a, b in zip(self.zones, before, after, strict=True):
            parts[zone.source] = parts.get(zone.source, 0.0) + spent(a, b, zone.range_uj) * 1e-6
        return parts if parts["rapl package"] > 0 else {}


@cache
def here() -> Machine:
    """Return the counters of this machine, looked for once."""
    return Machine(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


class Meter:
    """Says what this process took since the meter was made.

    Where a counter is the machine's, as all of RAPL's and NVML's are, what others did meanwhile is in it.

    Parameters
    ----------
    machine : Machine, optional
        By default this one.

    Examples
    --------
    >>> meter = Meter()
    >>> total = sum(range(200_000))
    >>> took = meter.read(written_size=1_000_000)
    >>> took.joules > 0 and "bytes written" in took.method
    True
    """

    def __init__(self, machine: Machine | None = None) -> None:
        self._machine = machine or here()
        self._resumed: Reading | None = None
        self._start = self._machine.read()

    def resume(self) -> None:
        """Say that accelerators are at work again: what they take from now on is not this work's."""
        self._resumed = self._resumed or self._machine.read()

    def read(self, moved_size: int = 0, written_size: int = 0) -> Energy:
        """Return what was spent so far.

        Parameters
        ----------
        moved_size : int
            Bytes read from memory and written to it, by `moved_size`; what counts where RAPL has no dram.
        written_size : int
            Bytes written to storage, which no counter sees.
        """
        now = self._machine.read()
        return self._machine.between(self._start, now, self._resumed or now, moved_size, written_size)

    def estimated(self, moved_size: int = 0, written_size: int = 0) -> Energy:
        """Return what this process spent so far by what it did alone, which may be added to what others did.

        Counters are the machine's: several processes that add up theirs count it as often.

        Examples
        --------
        >>> Meter().estimated(written_size=10**9).method.endswith("bytes written")
        True
        """
        cpu_s = self._machine.read().cpu_s - self._start.cpu_s
        return Energy.of(estimate(max(0.0, cpu_s), moved_size, written_size))

    def held(self) -> Energy:
        """Return what this process spent until it resumed, where another process meters the rest.

        Of counters that see the whole machine, RAPL's, that one has read this as well.
        """
        resumed = self._resumed or self._machine.read()
        parts = self._machine.between(self._start, resumed, resumed, 0, 0).parts
        return Energy.of({name: part for name, part in parts.items() if not name.startswith("rapl")})
