"""Joules: from counters laid out as the kernel does, and from what was done where there are none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deltackpt import energy, open_run
from deltackpt.backends.memory import MemoryBackend
from deltackpt.energy import Energy, Files, Machine, Meter, Nvml, estimate, moved_size, whole, zones
from deltackpt.report import human_energy

RANGE_UJ = 262_143_328_850
POWERCAP = "sys/class/powercap"
H100 = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 10\nGPU UUID: \t GPU-9221d5d1\n"


class Fake:
    """A machine that says what it is told to: files below a root, two clocks, and perhaps GPUs."""

    def __init__(self, root: Path, nvml=lambda visible: None, visible: str | None = None) -> None:
        self.root = root
        self.at_s = self.cpu_s = 100.0
        self.made = (nvml, visible)

    def machine(self) -> Machine:
        nvml, visible = self.made
        return Machine(Files(self.root), nvml, lambda: self.at_s, lambda: self.cpu_s, visible)

    def put(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def zone(
        self, number: str, name: str, uj: int, range_uj: int = RANGE_UJ, kind: str = "intel-rapl"
    ) -> None:
        """As /sys has it: the folder of a zone below that of its parent, and a link in the class's folder."""
        parts = number.split(":")
        folder = Path("sys/devices/virtual/powercap") / kind
        for n in range(1, len(parts) + 1):
            folder /= f"{kind}:{':'.join(parts[:n])}"
        self.put(f"{folder}/name", f"{name}\n")
        self.put(f"{folder}/energy_uj", f"{uj}\n")
        self.put(f"{folder}/max_energy_range_uj", f"{range_uj}\n")
        link = self.root / POWERCAP / folder.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(self.root / folder)

    def gpus(self, *infos: str, cuda: bool = True) -> None:
        for n, info in enumerate(infos):
            self.put(f"proc/driver/nvidia/gpus/0000:6{n}:00.0/information", info)
        self.put("proc/self/maps", "7f00-7f01 r-xp /usr/lib/libcuda.so.550.54\n" if cuda else "")


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


def server(fake, uj: list[int]) -> None:
    """Two packages with memory, in a kernel's folders with all that is not to be counted."""
    fake.put("sys/devices/virtual/powercap/intel-rapl/enabled", "1\n")
    (fake.root / POWERCAP).mkdir(parents=True, exist_ok=True)
    for number, name, value in [
        ("0", "package-0", uj[0]),
        ("0:0", "dram", uj[1]),
        ("1", "package-1", uj[2]),
        ("1:0", "dram", uj[3]),
        ("0:1", "core", 7 * uj[0]),
        ("2", "psys", 9 * uj[0]),
    ]:
        fake.zone(number, name, value)
    fake.zone("0", "package-0", uj[0], kind="intel-rapl-mmio")


# -- RAPL


def test_packages_and_memory_are_counted_once_and_nothing_else(fake):
    server(fake, [1_000_000, 2_000_000, 3_000_000, 4_000_000])
    meter = Meter(fake.machine())
    server(fake, [2_500_000, 2_250_000, 4_000_000, 4_125_000])
    fake.cpu_s += 60
    took = meter.read(moved_size=10**9, written_size=10**8)
    assert took.parts == {"rapl package": 2.5, "rapl dram": 0.375, "bytes written": 0.5}
    assert took.method == "measured: rapl package+dram; estimated: bytes written"
    assert took.joules == 3.375


def test_a_counter_that_starts_again_is_followed(fake):
    server(fake, [RANGE_UJ - 1_000_000, 0, 5, RANGE_UJ - 7])
    meter = Meter(fake.machine())
    server(fake, [500_000, 250_000, 5, 249_993])
    assert meter.read().parts == {"rapl package": 1.5, "rapl dram": 0.5}


def test_what_is_added_to_that_of_other_processes_is_no_counters(fake):
    server(fake, [0, 0, 0, 0])
    meter = Meter(fake.machine())
    server(fake, [2_500_000, 2_250_000, 4_000_000, 4_125_000])
    fake.cpu_s += 2
    took = meter.estimated(moved_size=10**9, written_size=10**8)
    assert took.parts == {"cpu seconds": 10.0, "bytes moved": 0.16, "bytes written": 0.5}


def test_without_a_memory_domain_as_on_amd_the_bytes_moved_are_estimated(fake):
    fake.zone("0", "package-0", 0, 65_532_610_987)
    fake.zone("0:0", "core", 0)
    meter = Meter(fake.machine())
    fake.zone("0", "package-0", 2_000_000, 65_532_610_987)
    assert meter.read(moved_size=10**9).method == "measured: rapl package; estimated: bytes moved"


def test_a_counter_that_may_not_be_read_is_not_used(fake, monkeypatch):
    server(fake, [1, 1, 1, 1])
    assert len(zones(Files(fake.root))) == 4
    read_text = Path.read_text

    def refuse(path: Path, *args, **kwargs) -> str:
        if path.name == "energy_uj":  # as the kernel has it since 5.10, for all but root
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert zones(Files(fake.root)) == []
    meter = Meter(fake.machine())
    fake.cpu_s += 2
    assert meter.read().parts == {"cpu seconds": 10.0}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_file_without_permission_is_empty(fake):
    fake.put("secret", "1").chmod(0)
    assert Files(fake.root).text("/secret") == ""


@pytest.mark.parametrize("text", ["", "many", "-5", "1e9", "²"])
def test_a_counter_that_is_no_number_is_not_used(fake, text):
    fake.zone("0", "package-0", 0)
    fake.put(f"{POWERCAP}/intel-rapl:0/energy_uj", text)
    assert zones(Files(fake.root)) == []


def test_one_package_of_two_is_not_taken_for_both(fake):
    server(fake, [1, 1, 1, 1])
    (fake.root / POWERCAP / "intel-rapl:1" / "energy_uj").unlink()
    assert zones(Files(fake.root)) == []


def test_counters_that_fail_or_have_not_moved_on_leave_the_estimate(fake):
    server(fake, [1, 1, 1, 1])
    meter = Meter(fake.machine())
    fake.cpu_s += 1
    assert meter.read().method == "estimated: cpu seconds"  # they are counted on every ms
    (fake.root / POWERCAP / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.read().method == "estimated: cpu seconds"


# -- the estimate


def test_the_estimate_is_of_cpu_seconds_bytes_moved_and_bytes_written(fake):
    meter = Meter(fake.machine())
    fake.cpu_s, fake.at_s = fake.cpu_s + 3, fake.at_s + 1
    took = meter.read(moved_size=10**9, written_size=10**9)
    assert took.parts == pytest.approx({"cpu seconds": 15.0, "bytes moved": 0.16, "bytes written": 5.0})
    assert took.method == "estimated: cpu seconds, bytes moved, bytes written"
    assert took == Energy.of(estimate(3, 10**9, 10**9))


def test_the_constants_are_those_that_the_page_gives_sources_for():
    page = (Path(__file__).parents[1] / "docs" / "energy.md").read_text()
    told = dict(
        line.strip("|").replace("`", "").split("|")[:2]
        for line in page.splitlines()
        if line.startswith("| `") and line.split("|")[1].strip(" `").isupper()
    )
    told = {name.strip(): float(value.split()[0]) for name, value in told.items()}
    assert told == {
        "CPU_W": energy.CPU_W,
        "MOVED_J": energy.MOVED_J / 8 * 1e12,
        "WRITTEN_J": energy.WRITTEN_J * 1e9,
        "GPU_OTHER_W": energy.GPU_OTHER_W,
        "GPU_CONTEXT_W": energy.GPU_CONTEXT_W,
        "WHOLE_CPU_S": energy.WHOLE_CPU_S * 1e9,
    }


def test_a_save_of_nothing_new_takes_less_than_the_state_whole():
    unchanged = sum(estimate(0.1, moved_size(10**9, 0, 1000), 1000).values())
    assert unchanged < whole(10**9) / 10


# -- GPUs


class Lib:
    """pynvml, as far as it is used: its names, its units, its error."""

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: dict) -> None:
        self.gpus = [
            SimpleNamespace(**{"uuid": f"GPU-{i}a", "mj": None, "mw": None} | g) for i, g in enumerate(gpus)
        ]
        self.is_there = True

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.is_there:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:  # noqa: N802
        return i

    def nvmlDeviceGetUUID(self, i: int) -> str:  # noqa: N802
        return self.gpus[i].uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, i: int) -> int:  # noqa: N802
        return self._said(self.gpus[i].mj)

    def nvmlDeviceGetPowerUsage(self, i: int) -> int:  # noqa: N802
        return self._said(self.gpus[i].mw)

    def _said(self, value: int | None) -> int:
        if value is None:
            raise self.NVMLError("Not Supported")
        return value


def stalled(fake: Fake, lib: Lib, seconds: float, visible: str | None = None) -> Meter:
    """A meter of a stall of some seconds, in which every GPU that counts took 50 J."""
    fake.gpus(*[H100] * len(lib.gpus))
    fake.made = (lambda visible: Nvml(lib, visible), visible)
    meter = Meter(fake.machine())
    for gpu in lib.gpus:
        gpu.mj = None if gpu.mj is None else gpu.mj + 50_000
    fake.at_s += seconds
    return meter


@pytest.mark.parametrize(
    ("seconds", "gpu", "joules"),
    [
        (2.0, {"mj": 5_000, "mw": 90_000}, 50.0),  # counted
        (0.1, {"mj": 5_000, "mw": 90_000}, 9.0),  # too short for the counter
        (2.0, {"mw": 90_000}, 180.0),  # a GPU that does not count
        (0.1, {"mj": 5_000}, 50.0),  # one that counts only
    ],
)
def test_gpus_are_counted_or_else_power_times_seconds(fake, seconds, gpu, joules):
    took = stalled(fake, Lib(gpu), seconds).read()
    assert took.joules == joules
    assert took.method == "measured: nvml"


def test_gpus_that_say_nothing_are_estimated(fake):
    took = stalled(fake, Lib({}, {}), 2.0).read()
    assert (took.joules, took.method) == (2 * 2.0 * (46 + 40), "estimated: idle gpus")


def test_gpus_count_until_training_goes_on(fake):
    lib = Lib({"mj": 0, "mw": 90_000})
    meter = stalled(fake, lib, 2.0)
    meter.resume()
    lib.gpus[0].mj += 700_000
    fake.at_s += 2.0
    fake.cpu_s += 2.0
    meter.resume()  # once is enough
    assert meter.read().parts == {"nvml": 50.0, "cpu seconds": 10.0}


@pytest.mark.parametrize(
    ("visible", "n"), [(None, 3), ("0,2", 2), ("GPU-1", 1), ("", 0), ("-1", 0), ("MIG-0a", 0), ("7", 0)]
)
def test_only_gpus_that_the_process_may_use_count(fake, visible, n):
    lib = Lib(*[{"mj": 0} for _ in range(3)])
    assert stalled(fake, lib, 2.0, visible).read().joules == 50.0 * n


def test_without_nvml_gpus_that_wait_count_by_their_names(fake):
    fake.gpus(
        H100, H100.replace("H100 80GB HBM3", "A100-SXM4-40GB"), H100.replace("H100 80GB HBM3", "Tesla T4")
    )
    meter = Meter(fake.machine())
    fake.at_s += 2.0
    took = meter.read()
    assert took.parts == {"idle gpus": 2 * ((46 + 40) + (46 + 40) + (8 + 40))}
    assert took.method == "estimated: idle gpus"
    fake.made = (fake.made[0], "0")
    meter = Meter(fake.machine())
    fake.at_s += 2.0
    assert meter.read().joules == 2 * (46 + 40)


def test_a_job_that_does_not_use_gpus_keeps_none_waiting(fake):
    fake.gpus(H100, cuda=False)
    fake.made = (lambda visible: pytest.fail("asked"), None)
    meter = Meter(fake.machine())
    fake.at_s += 2.0
    assert meter.read() == Energy()


def test_a_driver_that_is_gone_is_no_error(monkeypatch):
    lib = Lib()
    lib.is_there = False
    monkeypatch.setitem(sys.modules, "pynvml", lib)
    assert energy._nvml(None) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy._nvml(None) is None


def test_the_names_used_are_those_of_nvidia_ml_py():
    pynvml = pytest.importorskip("pynvml")
    for name in vars(Lib):
        if name.startswith(("nvml", "NVML")):
            assert hasattr(pynvml, name)


# -- a save


def test_a_save_says_joules_and_by_what_and_keeps_them_with_the_step():
    with open_run(MemoryBackend()) as run:
        report = run.save({"w": np.arange(1_000_000, dtype=np.float32)}, step=1)
        kept = run.commit(1).figures.energy
    assert report.energy.joules > 0
    assert report.energy.method.startswith(("measured: ", "estimated: "))
    assert report.to_json()["energy"]["joules"] == report.energy.joules
    assert kept.joules > 0
    assert report.table().splitlines()[-1].startswith(f"energy: {human_energy(report.energy.joules)}; ")
    assert str(report).endswith(f", ~{human_energy(report.energy.joules)}")


def test_a_fork_takes_over_no_energy():
    run = open_run(MemoryBackend())
    run.save({"w": np.arange(1000)}, step=1)
    assert run.fork("branch").commit().figures.energy is None
