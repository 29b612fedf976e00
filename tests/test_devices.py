"""Tensors on a device: what did not change stays there, what did comes over the bus, once there is room.

There is no device here: some tensors of the CPU count as on one, and go every way that a device's do, but for
the pinned buffers and the stream.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from deltackpt import arrays, devices, glances, open_run, staging
from deltackpt.backends.memory import MemoryBackend
from deltackpt.types import Deferred

torch = pytest.importorskip("torch")

REAL = "cuda:0" if torch.cuda.is_available() else "cpu"
PIECE = devices._PIECE_SIZE


class Device:
    """A device that some tensors are on.  The bus counts what comes from it."""

    def __init__(self) -> None:
        self._storages: list[object] = []
        self.bus = devices.bus_of(REAL)
        self._before = self.bus.crossed_size

    def put(self, x):
        x = x.to(REAL)
        self._storages.append(x.untyped_storage())
        return x

    def of(self, x) -> str | None:
        if not x.is_cpu or any(x.untyped_storage()._cdata == s._cdata for s in self._storages):
            return "device:0"
        return None

    def crossed(self) -> int:
        """Bytes since the last call."""
        crossed, self._before = self.bus.crossed_size - self._before, self.bus.crossed_size
        return crossed


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(devices, "device_of", found.of)
    glance_at = torch.zeros(1, dtype=torch.uint8, device=REAL)
    glances.imprints([glance_at])  # what is asked of a device once
    found.crossed()
    return found


def normal(n: int, seed: int = 0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(n).astype(np.float32))


def same(found, state) -> bool:
    return found.keys() == state.keys() and all(torch.equal(found[k], state[k].cpu()) for k in state)


@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 5 * PIECE + 7])
def test_a_bus_brings_every_byte(size: int):
    data = torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))
    bus = devices.bus_of(REAL)
    before = bus.crossed_size
    assert torch.equal(torch.from_numpy(devices.fetch(data.to(REAL))), data)
    assert bus.crossed_size - before == size


def test_a_buffer_is_emptied_before_it_is_filled_again_and_two_are_under_way(monkeypatch):
    told = []

    class Noted(devices._Buffers):
        def begin(self):
            told.append("begin")

        def fill(self, which, piece):
            if piece.numel() == 3:
                raise RuntimeError("the device is gone")
            told.append(("fill", which))
            super().fill(which, piece)

        def filled(self, which, size):
            told.append(("empty", which))
            return super().filled(which, size)

        def end(self):
            told.append("end")

    bus = devices.Bus(Noted("cpu"))
    bus.fetch(torch.zeros(3 * PIECE + 1, dtype=torch.uint8), np.empty(3 * PIECE + 1, np.uint8))
    fill, empty = [("fill", 0), ("fill", 1)], [("empty", 0), ("empty", 1)]
    assert told == ["begin", *fill, empty[0], fill[0], empty[1], fill[1], *empty, "end"]
    told.clear()
    with pytest.raises(RuntimeError, match="the device is gone"):
        bus.fetch(torch.zeros(PIECE + 3, dtype=torch.uint8), np.empty(PIECE + 3, np.uint8))
    assert told[-1] == "end"


@pytest.mark.parametrize("how", ["here", "thread", "process"])
def test_what_did_not_change_never_crosses_the_bus(device: Device, how: str, tmp_path):
    state = {
        "frozen": device.put(normal(3_000_000)),
        "trained": device.put(normal(100_000, 1)),
        "transposed": device.put(normal(90_000, 2)).reshape(300, 300).T,
        "rows": device.put(normal(80_000, 3)).reshape(200, 400)[:, ::2],
        "here": normal(1000, 4),
    }
    with open_run(tmp_path / "store" if how == "process" else MemoryBackend()) as run:
        for step in range(4):
            expected = {name: x.clone() for name, x in state.items()}
            report = run.save(state, step=step) if how == "here" else run.save_async(state, step=step)
            if how != "here":
                state["trained"].zero_()
                report = report.wait()
                state["trained"].copy_(expected["trained"])
            crossed = device.crossed()
            changed = sum(x.numel() * 4 for name, x in state.items() if name != "here")
            if step:
                changed = 4 * state["trained"].numel()
                assert report.new_size <= changed + 1000
            # 16 bytes for every 8 MiB of each tensor.
            assert changed <= crossed <= changed + 16 * 5
            assert same(run.load(step), expected)
            state["trained"].add_(1e-3)


def test_what_a_view_on_the_device_changes_is_seen(device: Device):
    flat = device.put(normal(500_000))
    state = {"a": flat[1:100_001], "b": flat[50_001:400_001].view(torch.int32), "tied": flat[1:100_001]}
    with open_run(MemoryBackend()) as run:
        for step, at in enumerate([5, 60_000, 399_999, 450_000]):
            flat[at] += 1
            run.save(state, step=step)
            assert same(run.load(step), state)
        device.crossed()
        run.save(state, step=9)
        assert device.crossed() <= 16


def test_a_write_that_torch_does_not_count_is_seen_on_a_device_too(device: Device):
    w = device.put(normal(200_000))
    with open_run(MemoryBackend(), audit_every=100) as run:
        for step in range(5):
            w.data[step] += 1
            run.save({"w": w}, step=step)
            assert same(run.load(step), {"w": w})


def test_a_save_that_failed_leaves_no_imprint_of_what_it_did_not_save(device: Device, monkeypatch):
    w = device.put(normal(200_000))
    backend = MemoryBackend()
    run = open_run(backend)
    run.save({"w": w}, step=0)
    w.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "create", lambda name: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.save({"w": w}, step=1)
    run.save({"w": w}, step=2)
    assert same(run.load(2), {"w": w})


def test_a_run_that_goes_on_copies_once_and_then_only_glances(device: Device):
    state = {"w": device.put(normal(200_000))}
    backend = MemoryBackend()
    open_run(backend).save(state, step=0)
    run = open_run(backend)
    for step, size in (1, 800_000), (2, 0):
        device.crossed()
        run.save(state, step=step)
        assert size <= device.crossed() <= size + 16
        assert same(run.load(step), state)


def test_where_a_device_has_no_room_for_imprints_it_is_copied(device: Device, monkeypatch):
    state = {"w": device.put(normal(200_000))}
    monkeypatch.setattr(glances, "imprints", lambda raws: [None for _ in raws])
    run = open_run(MemoryBackend())
    for step in range(3):
        run.save(state, step=step)
        assert device.crossed() == 800_000
        assert same(run.load(step), state)


def test_there_is_room_before_a_copy_is_made(device: Device, monkeypatch):
    """Eight tensors of 400 kB through a room of 1 MB: never more than two copies that are not saved."""
    state = {str(i): device.put(normal(100_000, i)) for i in range(8)}
    room, taken = [], []
    make_room, take = staging.Staging.make_room, Deferred.taken

    def noted(self, size):
        make_room(self, size)
        room.append(self._size)

    def noted_too(self):
        taken.append(len(room))
        return take(self)

    monkeypatch.setattr(staging.Staging, "make_room", noted)
    monkeypatch.setattr(Deferred, "taken", noted_too)
    with open_run(MemoryBackend(), memory_max=1_000_000) as run:
        for step in range(3):
            run.save_async(state, step=step).wait()
            assert same(run.load(step), state)
            for x in state.values():
                x.mul_(1.0001)
    assert taken == list(range(1, 25))
    assert max(room) <= 1_000_000


def test_what_had_to_be_copied_to_be_looked_at_and_is_the_same_gives_its_room_back(monkeypatch):
    state = {str(i): np.repeat(normal(100_000, i).numpy(), 2)[::2] for i in range(8)}
    settled = []
    settle = staging.Queue.settle
    monkeypatch.setattr(staging.Queue, "settle", lambda self: settled.append(1) or settle(self))
    with open_run(MemoryBackend(), memory_max=1_000_000) as run:
        run.save_async(state, step=0).wait()
        assert settled
        settled.clear()
        run.save_async(state, step=1).wait()
        assert not settled


def test_an_array_says_where_it_is(device: Device):
    x, y = device.put(normal(10)), normal(10)
    facts = arrays.look(x)
    assert (facts.device, facts.is_direct, arrays.look(y).device) == ("device:0", False, None)
    assert np.array_equal(arrays.memory(facts, *facts.layout.span), x.cpu().numpy().view(np.uint8))


@pytest.mark.skipif(REAL == "cpu", reason="no GPU here")
def test_a_gpu_is_a_device(device: Device):  # pragma: no cover
    assert devices.bus_of(REAL)._buffers._both[0].is_pinned()
    assert os.environ.get("CUDA_LAUNCH_BLOCKING") != "1"
