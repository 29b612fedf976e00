"""The benchmarks train, measure every cell, tell a lossless tool from another, and which bounds are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

BENCH = Path(__file__).parents[1] / "bench"
REGIMES = ["finetune", "experts"]
PEERS = ["deltackpt", "torch.save", "safetensors", "zstd -3"]
ABSENT = "restic"  # no program is found where the tests look


def run_bench(script: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that one small run writes."""
    at = tmp_path_factory.mktemp("bench")
    arguments = ["--size", "small", "--regimes", *REGIMES, "--peers", *PEERS, ABSENT, "--repeats", 1]
    arguments += ["--cache", at / "cache", "--dir", at, "--json", at / "results.json"]
    arguments += ["--markdown", at / "results.md", "--plots", at / "plots"]
    (at / "stdout").write_text(run_bench("series.py", *arguments, PATH=str(at)))
    return at


@pytest.fixture(scope="module")
def results(at: Path) -> dict[str, Any]:
    return json.loads((at / "results.json").read_text())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's modules can be imported."""
    monkeypatch.syspath_prepend(BENCH)


def cells(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [results["regimes"][regime]["peers"][peer] for regime in REGIMES for peer in PEERS]


def test_every_tool_can_be_drawn(bench: None):
    import peers
    import plots

    assert set(plots.LOOKS) == set(peers.PEERS)
    assert len(set(plots.LOOKS.values())) == len(plots.LOOKS)


def test_every_tool_has_a_figure_for_every_measure_of_every_regime(results: dict[str, Any]):
    measures = ["stored_size", "save_s", "restore_s", "save_memory_size", "restore_memory_size"]
    for cell in cells(results):
        for measure in measures:
            assert 0 < cell[measure]["min"] <= cell[measure]["median"] <= cell[measure]["max"], measure
        assert cell["stored_sizes"] == sorted(cell["stored_sizes"])
        assert len(cell["stored_sizes"]) == len(cell["each_save_s"]) == 6


def test_every_tool_brings_back_every_bit(results: dict[str, Any]):
    assert all(cell["lossless"] is True for cell in cells(results))


def test_a_tool_that_is_not_installed_stays_in_the_table_with_the_command_that_installs_it(
    at: Path, results: dict[str, Any]
):
    assert results["peers"][ABSENT]["installed"] is False
    for name in ("results.md", "stdout"):
        assert "restic: not installed, apt-get install restic" in (at / name).read_text()


def test_the_tables_name_every_regime_and_tool(at: Path):
    for name in ("results.md", "stdout"):
        text = (at / name).read_text()
        assert all(word in text for word in [*REGIMES, *PEERS, ABSENT])


def test_the_pictures_are_drawn(at: Path):
    for name in ("stored", "seconds", "growth"):
        assert "<svg" in (at / "plots" / f"{name}.svg").read_text()
        assert (at / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_states_are_really_trained(results: dict[str, Any]):
    for regime in REGIMES:
        training = results["regimes"][regime]
        assert training["loss_end"] < training["loss_start"] - 0.5
        assert all(save["changed"] > 0.1 for save in training["saves"])
    assert all(save["changed"] < 0.5 for save in results["regimes"]["experts"]["saves"][1:])


def test_the_same_seed_trains_the_same_bytes_and_another_does_not(tmp_path: Path, results: dict[str, Any]):
    def hashes(seed: int, *regimes: str) -> list[list[str]]:
        made = json.loads(run_bench("states.py", "--seed", seed, "--regimes", *regimes, "--cache", tmp_path))
        return [[save["sha256"] for save in training["saves"]] for training in made]

    first = [[save["sha256"] for save in results["regimes"][regime]["saves"]] for regime in REGIMES]
    assert hashes(0, *REGIMES) == first
    assert not set(hashes(1, "experts")[0]) & set(first[1])


@pytest.mark.usefixtures("bench")
def test_one_wrong_bit_type_or_shape_is_not_lossless():
    from measure import is_same

    zero = {"w": torch.zeros(2, 3)}
    assert is_same({"w": torch.zeros(2, 3)}, zero)
    assert not is_same({"w": -torch.zeros(2, 3)}, zero)
    assert not is_same({"w": torch.zeros(3, 2)}, zero)
    assert not is_same({"w": torch.zeros(2, 3, dtype=torch.int32)}, zero)
    assert not is_same({}, zero)


@pytest.mark.usefixtures("bench")
def test_the_memory_of_a_program_is_its_own(tmp_path: Path):
    from meter import run_tool

    ballast = bytearray(b"x") * (300 << 20)  # of this process, before the program is started
    size = run_tool(
        [sys.executable, "-c", "import time; x = b'x' * (60 << 20); time.sleep(0.2)"], tmp_path, {}
    )
    assert 60 << 20 < size < len(ballast)


@pytest.mark.usefixtures("bench")
def test_every_figure_in_which_a_peer_is_better_is_said():
    from tables import losses

    def figures(stored: float, seconds: float, lossless: bool = True) -> dict[str, Any]:
        measures = {
            key: {"median": 1.0, "min": 1.0, "max": 1.0}
            for key in ("save_memory_size", "restore_memory_size")
        }
        spread = {"median": seconds, "min": seconds - 1, "max": seconds + 1}
        stored_size = {"median": stored, "min": stored, "max": stored}
        return {
            **measures,
            "stored_size": stored_size,
            "save_s": spread,
            "restore_s": spread,
            "lossless": lossless,
        }

    peers = {
        "deltackpt": figures(50, 10),
        "a": figures(40, 20),
        "b": figures(60, 9),
        "c": figures(1, 1, False),
    }
    said = losses({"peers": peers, "regimes": {"r": {"peers": peers}}})
    assert said == [
        "bytes stored, all saves of the series, r: deltackpt 50 B; a 40 B (0.8 of it)",
        "seconds saving, all saves of the series, r: deltackpt 10 s; b 9 s (0.9 of it, spreads overlap)",
        "seconds restoring the last save, r: deltackpt 10 s; b 9 s (0.9 of it, spreads overlap)",
    ]


@pytest.mark.usefixtures("bench")
def test_a_slow_codec_is_better_than_a_slower_one_and_a_part_of_deltackpt_is_no_peer():
    from tables import losses

    def figures(ratio: float, speed: float) -> dict[str, Any]:
        spread = {"median": speed, "min": speed - 0.1, "max": speed + 0.1}
        exact = {"median": ratio, "min": ratio, "max": ratio}
        return {"ratio": exact, "encode_gb_s": spread, "decode_gb_s": spread, "lossless": True}

    peers = {"deltackpt": figures(0.5, 1.0), "whole": figures(0.4, 2.0), "a": figures(0.6, 1.5)}
    about = {peer: {"is_part": peer != "a"} for peer in peers}
    assert losses({"peers": about, "cases": {"c": {"peers": peers}}}) == [
        "encoding, GB/s of a core, c: deltackpt 1.00; a 1.50 (1.5 of it)",
        "decoding, GB/s of a core, c: deltackpt 1.00; a 1.50 (1.5 of it)",
    ]


# ---------------------------------------------------------------- bounds


def test_the_slowest_step_is_restored_against_the_same_state_alone(results: dict[str, Any]):
    for regime in REGIMES:
        peers = results["regimes"][regime]["peers"]
        assert peers["deltackpt"]["deep_restore"]["median"] > 0
        assert "deep_restore" not in peers["safetensors"]


@pytest.mark.usefixtures("bench")
def test_bounds_are_kept_or_not_or_not_measured():
    from bounds import checks
    from peers import PEERS as ALL

    def figures(stored: float, seconds: float) -> dict[str, Any]:
        return {"stored_size": {"median": stored}, "save_s": {"median": seconds}, "lossless": True}

    ours = figures(97, 2) | {"deep_restore": {"median": 2.1}}
    peers = {peer: figures(200, 4) for peer in ALL} | {"deltackpt (time)": figures(90, 1)}
    peers |= {"deltackpt": ours, "z4ai": figures(100, 8), "restic": {"failed": "no"}}
    peers["borg"] = figures(1, 1) | {"lossless": False}

    def told(peers: dict[str, Any]) -> dict[str, tuple[float | None, bool | None]]:
        checked = checks({"regimes": {"scratch-1": {"peers": peers}}})
        return {c.bound.name.removeprefix("scratch-1: "): (c.measured, c.is_kept) for c in checked}

    found = told(peers)
    expected = {
        "bytes, to the best of all others": (0.97, True),
        "saving by deltackpt (time), to writing every step raw with fsync (safetensors)": (0.25, True),
        "saving, times faster than z4ai": (4, False),
        "restoring the slowest step, to the same saved alone": (2.1, False),
    }
    assert {name: figures for name, figures in found.items() if figures[0] is not None} == expected
    assert len(found) > 30
    assert all(is_kept is None for measured, is_kept in found.values() if measured is None)
    # Who was not asked could have been better.
    peers.pop("z4ai")
    assert told(peers)["bytes, to the best of all others"] == (None, None)


def test_each_way_to_write_is_measured(at: Path):
    arguments = ["--size-mib", 40, "--repeats", 1, "--dir", at, "--parts", "writing", "--json"]
    took_s = json.loads(run_bench("effort.py", *arguments))["writing, s"]
    assert len(took_s) == 5
    assert all(seconds > 0 for seconds in took_s.values())


@pytest.mark.usefixtures("bench")
def test_every_bound_is_of_a_regime_or_a_case_that_is():
    import bounds
    from pairs import CASES
    from states import REGIMES as ALL

    assert set(bounds.STORED_MAX) == set(ALL)
    assert {*bounds.DEDUP_MAX, *bounds.DENSE, bounds.FROZEN} <= set(ALL)
    assert set(bounds.RATIO_MAX) <= set(CASES)


# ---------------------------------------------------------------- codecs

TRAINING = "bf16-1e-5"


@pytest.fixture(scope="module")
def coded(at: Path) -> dict[str, Any]:
    """The results of all codecs that are there, on two classes."""
    arguments = ["--cases", f"{TRAINING}-*-10", "--repeats", 1, "--cache", at / "cache"]
    arguments += ["--json", at / "codec.json", "--markdown", at / "codec.md"]
    (at / "codec.out").write_text(run_bench("codec.py", *arguments, PATH=str(at)))
    return json.loads((at / "codec.json").read_text())


def test_every_codec_brings_back_every_bit_of_every_class(coded: dict[str, Any]):
    assert list(coded["cases"]) == [f"{TRAINING}-weights-10", f"{TRAINING}-master-10"]
    ready = [peer for peer, facts in coded["peers"].items() if facts["installed"]]
    assert {"deltackpt", "whole", "sub", "rsub", "zstd -3"} <= set(ready)
    for case in coded["cases"].values():
        assert case["raw_size"] > 900_000
        assert list(case["peers"]) == ready
        for cell in case["peers"].values():
            assert cell["lossless"] is True
            assert cell["encode_gb_s"]["median"] > 0 < cell["decode_gb_s"]["median"]


def test_a_codec_that_is_not_installed_stays_in_the_table(at: Path, coded: dict[str, Any]):
    assert coded["peers"]["zstd --patch-from"]["installed"] is False
    for name in ("codec.md", "codec.out"):
        assert "zstd --patch-from: not installed, apt-get install zstd" in (at / name).read_text()


def test_a_delta_is_smaller_than_a_whole_chunk_and_the_choice_than_its_parts(coded: dict[str, Any]):
    weights, master = coded["cases"].values()
    assert (weights["dtype"], master["dtype"]) == ("bfloat16", "float32")
    assert 0.2 < weights["changed"] < 0.6 < 0.99 < master["changed"]
    for case in coded["cases"].values():
        ratio = {peer: cell["ratio"]["median"] for peer, cell in case["peers"].items()}
        parts = [ratio[name] for name in ("whole", "sub", "rsub")]
        ours = case["peers"]["deltackpt"]
        assert ratio["sub"] < 0.8 * ratio["whole"] < ratio["zstd -3"]
        assert ratio["deltackpt"] < 1.01 * min(parts)
        assert -1e-9 < ours["over_oracle"] < 0.01
        assert abs(sum(ours["taken"].values()) - 1) < 1e-9


@pytest.mark.usefixtures("bench")
def test_a_codec_that_changes_one_bit_is_found(tmp_path: Path):
    from codec import measure
    from coders import Zstd
    from pairs import Pair

    class Wrong(Zstd):
        def decode(self, payloads: bytes) -> bytes:
            return bytes([1]) + super().decode(payloads)[1:]

    given = Pair("c", "", {"w": torch.zeros(100)}, {"w": torch.zeros(100)})
    assert measure(Zstd(given, tmp_path), 1)[0]["lossless"] is True
    assert measure(Wrong(given, tmp_path), 1)[0]["lossless"] is False


@pytest.mark.usefixtures("bench")
def test_floats_as_integers_keep_their_order():
    import numpy as np
    from coders import ordered

    floats = np.array([-np.inf, -1.5, -1e-40, -0.0, 0.0, 1e-40, 1.5, np.inf], "<f4")
    assert (np.diff(ordered(floats.view(np.uint8), 4).astype(np.int64)) > 0).all()


@pytest.mark.usefixtures("bench")
def test_what_a_partial_load_reads_is_counted(tmp_path: Path):
    from partial import counted, names_of_a_share

    from deltackpt import delta

    torch.manual_seed(0)
    state = {"large": torch.randn(300_000), "small": torch.randn(3000), "tiny": torch.randn(30)}
    delta.save(state, tmp_path / "store", step=1)
    assert names_of_a_share(tmp_path / "store", 0.05) == (["tiny", "small"], 12_120)
    part_size, part = counted(tmp_path / "store", lambda backend: delta.load(backend, keys=["tiny", "small"]))
    whole_size, _ = counted(tmp_path / "store", delta.load)
    assert part.keys() == {"tiny", "small"}
    assert 6000 < part_size < 60_000
    assert 600_000 < whole_size - part_size < 1_200_000


def test_one_row_is_read_with_a_fraction_of_the_state(at: Path):
    found = json.loads(
        run_bench("partial.py", "--size", "small", "--cache", at / "cache", "--dir", at, "--json")
    )
    row, names = found["one row of an embedding"], found["a hundredth of the names"]
    assert row["wanted_size"] < 1000
    assert row["read_size"] < row["whole_read_size"] / 4
    assert names["wanted_size"] < names["read_size"] < names["whole_read_size"] / 10


@pytest.mark.usefixtures("bench")
def test_saves_and_restores_are_told_of_each_tool_in_each_regime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import saves
    import slowdown

    class Broken(saves.SAVERS["torch.save + fsync"]):
        name = "broken"

        def restores(self, step, into):
            raise OSError("the disk is gone")

    tools = ["Run.save", "Run.save_async", "torch.save + fsync", "save_file + fsync", "dcp.async_save"]
    monkeypatch.setattr(slowdown, "QUIET_S", 0.05)
    monkeypatch.setattr(slowdown, "NOTHING_S", 0.1)
    monkeypatch.setitem(saves.SAVERS, "broken", Broken)
    monkeypatch.setattr(saves.SAVERS["Orbax"], "is_installed", lambda: False)
    arguments = ["--size-mib", 1, "--repeats", 1, "--dir", tmp_path / "at", "--json", tmp_path / "found.json"]
    arguments += ["--markdown", tmp_path / "found.md", "--tools", *tools, "broken", "Orbax"]
    (tmp_path / "at").mkdir()
    monkeypatch.setattr(sys, "argv", ["saves.py", *map(str, arguments)])
    monkeypatch.setattr(saves.peak, "in_fresh_process", lambda function, *given: function(*given))
    saves.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["regimes"]) == [
        "adapter on a frozen base, first save",
        "adapter on a frozen base, each save after a step",
        "nothing changed",
        "full fine-tune, first save",
        "full fine-tune, each save after a step",
    ]
    for regime in found["regimes"].values():
        assert regime["floor_s"] > 0 < regime["state_size"]
        for tool in tools:
            figures = regime["tools"][tool]
            assert 0 < figures["stall_s"] <= figures["save_s"]
            assert figures["cpu_s"] > 0 < figures["joules"]
            assert figures["joules_ratio_min"] <= figures["joules_ratio"] <= figures["joules_ratio_max"]
            assert figures["method"].startswith(("measured: ", "estimated: "))
            assert tool.startswith("Run.") or figures["written_size"] >= regime["state_size"]
    assert found["regimes"]["nothing changed"]["tools"]["Run.save_async"]["written_size"] < 10_000
    assert found["regimes"]["nothing changed"]["tools"]["broken"] == {"failed": "OSError: the disk is gone"}
    for restored in found["restores"].values():
        assert {cell["tool"] for cell in restored} == set(tools)
        assert all(cell["lossless"] and cell["cold_s"] > 0 < cell["warm_s"] for cell in restored)
    assert {(f["tool"], f["n_changed"]) for f in found["memory"]} == {
        (tool, n) for tool in [*tools, "broken"] for n in (32, 1)
    }
    assert all(
        list(loop) == ["nothing", "Run.save_async", "dcp.async_save"] for loop in found["loops"].values()
    )
    notes = [note for note in found["notes"] if not note.startswith("broken failed on ")]
    assert notes == ["Orbax: not installed, pip install orbax-checkpoint"]
    text = (tmp_path / "found.md").read_text()
    assert all(f"**{title}" in text for title in [*found["regimes"], "Restores", "Peak", "Training beside"])
    assert not list((tmp_path / "at").iterdir())


@pytest.mark.usefixtures("bench")
def test_a_cold_restore_finds_nothing_in_the_page_cache(tmp_path: Path):
    from saves import drop_from_cache

    if subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True).stdout == b"tmpfs\n":
        pytest.skip("files in memory are always in memory")
    path = tmp_path / "store" / "packs" / "one"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(10_000_000))

    def is_cached() -> bool:
        fd = os.open(path, os.O_RDONLY)
        try:
            return os.preadv(fd, [bytearray(1)], 5_000_000, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        finally:
            os.close(fd)

    assert is_cached()
    drop_from_cache(tmp_path)
    assert not is_cached()


@pytest.mark.usefixtures("bench")
def test_what_a_loop_loses_is_the_share_of_its_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A loop of 10 ms, 40 of it with a save beside, of which 20 are of its own thread's CPU."""
    import slowdown

    clock = {"s": 0.0, "cpu_s": 0.0, "end_s": 0.0}

    class Clocks:
        perf_counter = staticmethod(lambda: clock["s"])
        thread_time = staticmethod(lambda: clock["cpu_s"])

    class Slow(slowdown.Nothing):
        def begin(self, state, step):
            clock["s"] += 0.5
            clock["end_s"] = clock["s"] + 1
            return slowdown.Saving(lambda: clock["s"] >= clock["end_s"], lambda: None)

    def loop() -> None:
        is_beside = clock["s"] < clock["end_s"]
        clock["s"] += 0.04 if is_beside else 0.01
        clock["cpu_s"] += 0.02 if is_beside else 0.01

    monkeypatch.setattr(slowdown, "time", Clocks)
    figures = slowdown.turn(Slow(tmp_path, 0), {}, 0, loop)
    expected = {"stall_s": 0.5, "save_s": 1.5, "loss": 0.75, "cpu_loss": 0.5, "lost_s": 1.25}
    assert figures == pytest.approx(expected)
    assert slowdown.pace([[], [slowdown.Stamp(0, 0)]]) is None


@pytest.mark.usefixtures("bench")
def test_memory_of_children_and_shared_memory_counts_once():
    import mmap

    from family import Watch

    size = 40_000_000
    child = f"import time; held = b'x' * {size}; print(1, flush=True); time.sleep(60)"
    with Watch() as watch:
        before_size = watch.most()
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
        try:
            process.stdout.readline()
            assert size < watch.most() - before_size < size + 20_000_000
            with_child_size = watch.most()
        finally:
            process.kill()
            process.communicate()
        watch.most()
        assert watch.most() < with_child_size - size / 2
        fd = os.memfd_create("bench")
        os.ftruncate(fd, size)
        before_size = watch.most()
        for _ in range(2):
            with mmap.mmap(fd, size) as mapped:
                for at in range(0, size, mmap.PAGESIZE):
                    mapped[at] = 1
                assert 0.8 * size < watch.most() - before_size < 1.2 * size
        assert 0.8 * size < watch.most() - before_size < 1.2 * size  # nobody has it mapped
        os.close(fd)
        watch.most()
        assert watch.most() - before_size < 0.2 * size


def test_peak_memory_is_that_of_a_fresh_process(tmp_path):
    arguments = ["--size-mib", 32, "--repeats", 1, "--n-changed", 1, "--dir", tmp_path, "--json"]
    arguments += [tmp_path / "found.json", "--tools", "save_file + fsync", "dcp.async_save"]
    run_bench("peak.py", *arguments)
    direct, staged = json.loads((tmp_path / "found.json").read_text())["memory"]
    assert direct["changed_size"] == staged["changed_size"] == 1 << 20
    assert 0 < direct["first_size"] < 16 << 20
    assert 28 << 20 < staged["first_size"] < 48 << 20
    assert 28 << 20 < staged["over_size"] < 64 << 20


def test_what_grows_is_told_for_each_thing_varied(tmp_path):
    arguments = ["--scale", 1e-4, "--repeats", 1, "--dir", tmp_path, "--json", "--only", "tensors", "steps"]
    found = json.loads(run_bench("scale.py", *arguments))["points"]
    assert [point["point"]["varied"] for point in found] == ["tensors", "tensors", "steps"]
    for point in found:
        figures = point["figures"]
        assert all(
            figures[name] > 0 for name in ("open_s", "save_s", "stall_s", "restore_s", "manifest_size")
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("bench")
def test_a_simulated_index_is_one(tmp_path):
    import numpy as np
    from scale import write_index

    from deltackpt.store import open_store

    store = open_store(tmp_path / "store", create=True)
    for n_rows in (10, 70, 20_000):
        write_index(tmp_path / "store", n_rows, np.random.default_rng(n_rows))
    segments = store.refresh(complete=True).segments
    assert sum(len(segment.rows) for segment in segments) == 20_080
    assert all((np.diff(segment.keys.astype(object)) > 0).all() for segment in segments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU here")
def test_without_a_gpu_its_benchmark_says_so_and_does_nothing(tmp_path: Path):
    assert run_bench("device.py", "--dir", tmp_path) == "no GPU here\n"
    assert not list(tmp_path.iterdir())


def test_the_benchmark_of_a_gpu_runs_as_far_as_it_can_without_one(bench: None, tmp_path: Path):
    import device

    found = device.measured(1 << 20, False, tmp_path / "at", 1, "cpu")
    assert list(found) == device.TOOLS
    for figures in found.values():
        assert 0 < figures["stall_s"] <= figures["save_s"]
        assert figures["bus_size"] == 0
    [table] = device.tables({"one tensor changes": found}, 1 << 20)
    assert "Run.save_async" in table.text()
    assert not list(tmp_path.iterdir())


def test_stages_and_phases_are_told(tmp_path):
    arguments = ["--size-mib", 1, "--repeats", 1, "--dir", tmp_path, "--json", tmp_path / "found.json"]
    run_bench("phases.py", *arguments)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["stages"]) == 9
    assert all(seconds > 0 for seconds in found["stages"].values())
    assert set(found["phases"]) == {"bytes", "time", "torch.save + fsync"}
    assert all(phases["all"] > 0 for phases in found["phases"].values())
