"""The packs of one session: records gathered, written and flushed by threads of their own, in order.

Owns   the pack being filled, when it is full, the two threads, and what waits for them.
Never  knows what a record holds, or makes a pack findable: the session does, once all are closed.

Hashing and encoding need the cores while the system copies what is written and the device takes it: one
thread writes, another closes packs that are full.  What is small is written by whoever asks for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from deltackpt.backends import Backend, Writer
from deltackpt.errors import ConflictError
from deltackpt.format import ROW
from deltackpt.index import Rows
from deltackpt.pack import PackBuilder, PackName, Payload, Record
from deltackpt.rates import Rates
from deltackpt.types import U8
from deltackpt.workers import submit

#: A pack is closed when it has grown this large; above 64 MiB its fsync costs nothing measurable a byte.
PACK_SIZE = 128 << 20
#: Records are gathered up to this much before they are written: small tensors cost few system calls.
_WRITE_SIZE = 1 << 20
#: A payload that would keep so many times its size of memory is copied: 60 us for 64 KiB of 256.
_N_SPARE = 4
#: Writes that took so many times their CPU seconds waited for the storage; of fewer, for a core.
_N_WAITED = 10
#: Packs that are being closed: beyond, the disk is slower than the encoders, and they wait for it.
_N_CLOSING_MAX = 2


class Done(NamedTuple):
    """A pack without room for more: its name, its bytes, a row of each record."""

    name: PackName
    size: int
    rows: Rows


class Packer:
    """Puts records into packs.

    Parameters
    ----------
    backend : Backend
    uuid, sid : bytes
        Of the store, and of the session.
    rates : Rates
        Told what writing took.
    """

    def __init__(self, backend: Backend, uuid: bytes, sid: bytes, rates: Rates) -> None:
        self.done: list[Done] = []
        #: Bytes that the thread was told to write and has not written.
        self.unwritten_size = 0
        self._backend = backend
        self._uuid = uuid
        self._sid = sid
        self._rates = rates
        self._pack: _Pack | None = None
        self._gathered: list[Payload] = []
        self._gathered_size = 0
        self._held: list[U8] = []
        self._free: list[U8] = []
        self._writer: ThreadPoolExecutor | None = None
        self._closer: ThreadPoolExecutor | None = None
        self._writing: deque[tuple[int, list[U8], Future[None]]] = deque()
        self._closing: deque[Future[None]] = deque()

    def add(self, record: Record, payload: Payload, buffer: U8) -> list[U8]:
        """Append a record whose payload may live in `buffer`; return the buffers that are free now."""
        pack = self._room()
        pack.builder.add(record)
        header = record.to_bytes()
        if len(payload) * _N_SPARE < buffer.size:  # else ever so many chunks' memory would wait for one write
            payload = bytes(payload)
            self._free.append(buffer)
        else:
            self._held.append(buffer)
        self._gathered += header, payload
        self._gathered_size += len(header) + len(payload)
        if self._gathered_size >= _WRITE_SIZE:
            self._write()
        while self._writing and self._writing[0][2].done():
            self._wait()
        free, self._free = self._free, []
        return free

    def wait(self) -> None:
        """Wait until the oldest of what is to be written is; raise what made it fail."""
        if self._writing:
            self._wait()

    def settle(self) -> None:
        """Write what was added so far: no payload is read any more."""
        if self._gathered:
            self._write()
        while self._writing:
            self._wait()

    def finish(self) -> None:
        """Close the last pack; all of them are flushed on return."""
        if self._pack is not None:
            if self._writer is None:
                gathered, self._gathered = self._gathered, []
                self._fill().close(self._rates, gathered)
            else:
                self.settle()
                self._close()
        for closing in self._closing:
            closing.result()
        self._stop()

    def abort(self) -> None:
        """Drop the pack being filled; those that are full stay, since somebody may rely on them already."""
        # All that threads were told, noted here or not: a file must not be closed under whoever writes it.
        self._stop(wait=True)
        if self._pack is not None:
            self._pack.writer.abort()
        self._gathered, self._held, self._writing = [], [], deque()  # they hold what was to be written

    def names(self) -> set[PackName]:
        """Return the packs so far, that being filled included."""
        names = {done.name for done in self.done}
        return names | {self._pack.builder.name} if self._pack else names

    def rows(self) -> Rows:
        """Return a row of each record added, in order; `pack` says nothing."""
        open_pack = [self._pack.builder.rows()] if self._pack else []
        return np.concatenate([np.zeros(0, ROW), *(done.rows for done in self.done), *open_pack])

    def _room(self) -> _Pack:
        """Return a pack with room for one more record."""
        if self._pack is not None and self._pack.builder.size >= PACK_SIZE:
            if self._gathered:
                self._write()
            self._close()
            while len(self._closing) > _N_CLOSING_MAX:
                self._closing.popleft().result()
        if self._pack is None:
            name = PackName(self._sid, 0, len(self.done))
            self._pack = _Pack(PackBuilder(self._uuid, name), self._backend.create(name.key))
            self._gathered = [self._pack.builder.header()]
        return self._pack

    def _write(self) -> None:
        """Tell the thread to write what is gathered."""
        assert self._pack is not None
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "deltackpt-write")
        told = self._told(self._writer, self._pack, self._pack.write, self._gathered)
        self._writing.append((self._gathered_size, self._held, told))
        self.unwritten_size += self._gathered_size
        self._gathered, self._gathered_size, self._held = [], 0, []

    def _wait(self) -> None:
        size, held, written = self._writing.popleft()
        self.unwritten_size -= size
        written.result()
        self._free += held

    def _fill(self) -> _Pack:
        """Note that the pack has no more room; whoever is interrupted then closes no file twice."""
        pack, self._pack = self._pack, None
        assert pack is not None
        self.done.append(Done(pack.builder.name, pack.builder.total_size, pack.builder.rows()))
        return pack

    def _close(self) -> None:
        """Tell the other thread to close the pack."""
        if self._closer is None:
            self._closer = ThreadPoolExecutor(1, "deltackpt-flush")
        pack = self._fill()
        self._closing.append(self._told(self._closer, pack, pack.close, self._rates))

    def _told(
        self, pool: ThreadPoolExecutor, pack: _Pack, do: Callable[..., None], *args: Any
    ) -> Future[None]:
        """Have a thread do something with a pack once it is through with what it was told before."""

        def after(before: Future[None] | None) -> None:
            # At the interpreter's end, where pools take nothing, the calling thread does it: in its turn.
            try:
                if before is not None:
                    before.result()
                do(*args)
            except BaseException:
                pack.writer.abort()
                raise

        pack.last = submit(pool, after, pack.last)
        return pack.last

    def _stop(self, *, wait: bool = False) -> None:
        for pool in (self._writer, self._closer):
            if pool is not None:
                pool.shutdown(wait=wait)


class _Pack:
    """A pack being filled: its builder, its file, and the last thing that a thread was told to do with it."""

    def __init__(self, builder: PackBuilder, writer: Writer) -> None:
        self.builder = builder
        self.writer = writer
        self.last: Future[None] | None = None
        self._write_s = self._write_cpu_s = 0.0

    def write(self, buffers: list[Payload]) -> None:
        """Append."""
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        self.writer.write(*buffers)
        self._write_s += time.perf_counter() - start_s
        self._write_cpu_s += time.thread_time() - start_cpu_s

    def close(self, rates: Rates, rest: Sequence[Payload] = ()) -> None:
        """Write the rest and the footer, flush and publish."""
        self.write([*rest, self.builder.footer()])
        start = time.perf_counter()
        if not self.writer.commit():
            raise ConflictError(f"{self.builder.name.key}: exists already", hint="save again")
        flush_s = time.perf_counter() - start
        write_s = self._write_s if self._write_s > _N_WAITED * self._write_cpu_s else self._write_cpu_s
        rates.wrote(self.builder.total_size, write_s + flush_s)
