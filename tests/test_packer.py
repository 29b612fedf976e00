"""Records go to packs in order, by threads, in bounded memory; what fails there fails the save."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from faults import FailingBackend, Wrapper, contents
from plain import same, weights

import deltackpt.packer
import deltackpt.session
from deltackpt import StorageError, open_run
from deltackpt.backends.memory import MemoryBackend
from deltackpt.format import NO_BASE
from deltackpt.pack import Record
from deltackpt.packer import Packer
from deltackpt.rates import Rates
from deltackpt.session import Session
from deltackpt.store import open_store


@pytest.fixture(autouse=True)
def small_writes(monkeypatch):
    monkeypatch.setattr(deltackpt.packer, "_WRITE_SIZE", 10_000)
    monkeypatch.setattr(deltackpt.packer, "PACK_SIZE", 60_000)


def state(n=20):
    return {f"w{i}": weights(2000, seed=i) for i in range(n)}


def record(i: int, payload) -> Record:
    return Record.of(
        payload,
        codec=0,
        itemsize=1,
        raw_size=len(payload),
        chunk_id=i.to_bytes(32, "big"),
        depth=0,
        base=NO_BASE,
    )


def test_a_save_of_many_packs_comes_back():
    backend = MemoryBackend()
    open_run(backend).save(state(), step=1)
    assert len(backend.list("packs/")) > 2
    assert same(open_run(backend).load(1), state())


def test_a_write_or_a_flush_that_fails_in_a_thread_fails_the_save_and_leaves_what_was():
    n = FailingBackend(MemoryBackend(), 10**9)
    open_run(n).save(state(), step=1)
    n_ops = n.n_ops
    assert n_ops > 20
    for nth in range(n_ops):
        inner = MemoryBackend()
        open_run(inner).save({"w": weights(100)}, step=0)
        with suppress(StorageError):  # a full disk is not tried again
            open_run(FailingBackend(inner, nth, error=28)).save(state(), step=1)
        # After a decision whose answer was lost the step may be there.
        steps = open_run(inner).steps()
        assert steps in ([0], [0, 1])
        for step in steps:
            open_run(inner).load(step)


def test_a_save_that_fails_in_a_thread_leaves_no_file_open():
    class Counting(Wrapper):
        n_open = 0

        def create(self, name):
            writer = super().create(name)
            self.n_open += 1
            ended = threading.Event()

            def ending(end):
                def once():
                    self.n_open -= not ended.is_set()
                    ended.set()
                    return end()

                return once

            writer.inner.abort, writer.inner.commit = map(ending, (writer.inner.abort, writer.inner.commit))
            return writer

        def _do(self, op, name, call, *, mutates=True):
            if op == "write":
                self.n_writes = getattr(self, "n_writes", 0) + 1
                if self.n_writes == 4:
                    raise StorageError("failed on purpose", errno=28)
            return call()

    backend = Counting(MemoryBackend())
    with pytest.raises(StorageError, match="on purpose"):
        open_run(backend).save(state(), step=1)
    assert backend.n_open == 0


def test_memory_of_what_is_written_or_copied_is_free_again():
    backend = MemoryBackend()
    packer = Packer(backend, b"u" * 16, b"s" * 16, Rates())
    held = set()
    for i in range(1000):
        buffer = np.zeros(8000, np.uint8)
        held.add(id(buffer))
        payload = buffer[: 8000 if i % 2 else 100]
        for free in packer.add(record(i, payload), payload, buffer):
            free[:] = 255  # as whoever has it next
            held.discard(id(free))
        if i % 2 == 0:
            assert id(buffer) not in held, "a payload of so little is copied"
        while packer.unwritten_size > 50_000:
            packer.wait()
    assert len(held) < 50
    packer.finish()
    assert not any(b"\xff" * 100 in data for data in contents(backend, "packs/").values())


def test_records_lie_in_the_order_they_were_added_in_whatever_thread_wrote_them():
    backend = MemoryBackend()
    packer = Packer(backend, b"u" * 16, b"s" * 16, Rates())
    rng = np.random.default_rng(0)
    payloads = [rng.integers(0, 256, 1 + 97 * i % 4000, dtype=np.uint8) for i in range(200)]
    for i, payload in enumerate(payloads):
        packer.add(record(i, payload), payload, payload)
    packer.finish()
    rows = packer.rows()
    assert [int.from_bytes(row["id"].tobytes(), "big") for row in rows] == list(range(200))
    names = [done.name.key for done in packer.done]
    assert sum(map(len, contents(backend, "packs/").values())) == sum(done.size for done in packer.done)
    at = iter(rows)
    for done, name in zip(packer.done, names, strict=True):
        data = backend.read(name)
        for _, row in zip(range(len(done.rows)), at, strict=False):
            i = int.from_bytes(row["id"].tobytes(), "big")
            assert payloads[i].tobytes() in data


def test_what_writing_took_is_told(monkeypatch):
    rates = Rates(write_s=123.0)
    monkeypatch.setattr(deltackpt.packer, "PACK_SIZE", 1 << 30)
    packer = Packer(MemoryBackend(), b"u" * 16, b"s" * 16, rates)
    payload = np.zeros(1 << 20, np.uint8)
    for i in range(9):
        packer.add(record(i, payload), payload, payload)
    packer.finish()
    assert 0 < rates.write_s < 1


def test_an_interrupt_while_a_write_is_waited_for_does_not_close_the_file_under_it():
    begun, go_on, order = threading.Event(), threading.Event(), []

    class Slow(Wrapper):
        def create(self, name):
            writer = super().create(name)
            write, abort = writer.inner.write, writer.inner.abort

            def slowly(*buffers):
                begun.set()
                go_on.wait(10)
                write(*buffers)
                order.append("written")

            def aborting():
                order.append("aborted")
                abort()

            writer.inner.write, writer.inner.abort = slowly, aborting
            return writer

        def _do(self, op, name, call, *, mutates=True):
            return call()

    packer = Packer(Slow(MemoryBackend()), b"u" * 16, b"s" * 16, Rates())
    payload = np.zeros(10_000, np.uint8)
    packer.add(record(0, payload), payload, payload)
    assert begun.wait(10)
    main = threading.main_thread().ident
    threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        packer.wait()
    threading.Timer(0.1, go_on.set).start()
    packer.abort()
    assert order == ["written", "aborted"]


def test_records_copied_from_other_packs_wait_for_the_storage(monkeypatch):
    monkeypatch.setattr(deltackpt.session, "_WINDOW_SIZE", 50_000)
    monkeypatch.setattr(deltackpt.packer, "PACK_SIZE", 1 << 30)
    most = []

    class Slow(Wrapper):
        def _do(self, op, name, call, *, mutates=True):
            if op == "write":
                time.sleep(0.002)
            return call()

    store = open_store(Slow(MemoryBackend()), create=True)
    with Session.for_gc(store) as session:
        payload = np.zeros(10_000, np.uint8)
        for i in range(60):
            session.copy(record(i, payload), payload)
            most.append(session._packer.unwritten_size)
    assert max(most) <= 60_000
