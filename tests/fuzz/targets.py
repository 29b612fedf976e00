"""Everything that reads what others wrote, one small function each: bytes in, an answer or a refusal out.

A target takes any bytes.  Checksums would stop nearly all of them at the door, so a target makes them right
first (`sealed`, `mended`): what is tried is what stands behind them.  It raises one of its `refusals`, or
nothing.

Not here: `wire`, whose messages a process sends to its own child through a pipe that nobody else has, and the
kernels themselves (kernels.c, decoders.py).
"""

from __future__ import annotations

import json
import random
import resource
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import xxhash
import zstandard
from blake3 import blake3
from fuzz import mutations

from deltackpt import (
    arrays,
    codecs,
    dtypes,
    files,
    leaves,
    loader,
    manifest,
    overview,
    pack,
    process,
    records,
    series,
    tree,
)
from deltackpt.backends import is_name
from deltackpt.backends.memory import MemoryBackend
from deltackpt.cli import options, printing
from deltackpt.errors import DeltackptError, FormatError, InvalidInputError, NotFoundError
from deltackpt.format import MANIFEST_HEADER, PACK_HEADER, PACK_TRAILER, ROW, VERSION, load_json, unseal
from deltackpt.index import Segment, StoredSegment, keys_of
from deltackpt.manifest import Manifest
from deltackpt.pack import PackName
from deltackpt.records import GcRecord, Pin, SessionName, Slot
from deltackpt.report import human_size
from deltackpt.retention import best
from deltackpt.run import Run
from deltackpt.store import DESCRIPTOR, Store
from deltackpt.structure import name, where
from deltackpt.verify import verify

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CORPUS = Path(__file__).resolve().parent / "corpus"
#: A guard against what does not end: an input takes a millisecond.
SECONDS_MAX = 60
#: Address space beyond what is there: a MiB of input asks for no more, whatever it says of itself.
MEMORY_MAX = 2 << 30
SIZE_MAX = 1 << 16


class Target(NamedTuple):
    """What is to be tried.

    Parameters
    ----------
    parse : callable
        Of bytes.
    seeds : callable
        Good inputs to start from.
    refusals : tuple of exception types
    mutate : callable
        Of a random source and bytes.
    """

    parse: Callable[[bytes], Any]
    seeds: Callable[[], list[bytes]]
    refusals: tuple[type[Exception], ...] = (FormatError,)
    mutate: Callable[[random.Random, bytes], bytes] = mutations.as_bytes


# -- right checksums


def sealed(line: bytes) -> bytes:
    return line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"


def _check(data: bytearray, start: int, stop: int, at: int) -> None:
    """Write the checksum of a part where it belongs, if there is room."""
    if 0 <= start <= stop and at + 8 <= len(data):
        struct.pack_into("<Q", data, at, xxhash.xxh3_64_intdigest(bytes(data[start:stop])))


def mended_pack(given: bytes) -> bytes:
    data = bytearray(given)
    end = len(data) - PACK_TRAILER.size
    if end < PACK_HEADER.size:
        return given
    _check(data, 0, 56, 56)
    data[end : end + 4] = b"DCPE"
    footer = struct.unpack_from("<Q", data, end + 8)[0]
    for at in range(footer, end - ROW.itemsize + 1, ROW.itemsize):  # none if the footer is nowhere
        offset, stored_size = (
            struct.unpack_from("<Q", data, at + 64)[0],
            struct.unpack_from("<I", data, at + 76)[0],
        )
        if offset + 96 + stored_size <= end:
            _check(data, offset + 96, offset + 96 + stored_size, offset + 80)
            _check(data, offset, offset + 88, offset + 88)
    _check(data, footer, end, end + 16)
    _check(data, end, end + 24, end + 24)
    return bytes(data)


def mended_index(given: bytes) -> bytes:
    data = bytearray(given)
    if len(data) < 64:
        return given
    _check(data, 0, 56, 56)
    n_packs, n_rows = struct.unpack_from("<I", data, 40)[0], struct.unpack_from("<Q", data, 48)[0]
    n_blocks = -(-n_rows // 64)
    checks = 64 + 32 * n_packs + 8 * n_rows
    rows = checks + 8 * n_blocks + 16
    if rows + 88 * n_rows != len(data):
        return bytes(data)
    for i in range(n_blocks):
        _check(data, rows + 88 * 64 * i, min(len(data), rows + 88 * 64 * (i + 1)), checks + 8 * i)
    data[rows - 16 : rows] = xxhash.xxh3_128_digest(bytes(data[: rows - 16]))
    return bytes(data)


def mended_manifest(given: bytes) -> bytes:
    data = bytearray(given)
    _check(data, MANIFEST_HEADER.size, len(data), 24)
    _check(data, 0, 32, 32)
    return bytes(data)


def mended(key: str, data: bytes) -> bytes:
    """Make the checksums of a store's file right."""
    kind = key.partition("/")[0]
    if kind in ("packs", "index", "manifests"):
        return {"packs": mended_pack, "index": mended_index, "manifests": mended_manifest}[kind](data)
    return sealed(data.partition(b"\n")[0])


def manifest_of(document: bytes) -> bytes:
    frame = zstandard.ZstdCompressor().compress(document)
    check = xxhash.xxh3_64_intdigest(frame)
    return MANIFEST_HEADER.pack(VERSION, 0, len(document), len(frame), check) + frame


# -- good inputs


@cache
def golden(version: str) -> dict[str, bytes]:
    """The files of a golden store by name."""
    root = GOLDEN / version / "store"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _versions() -> list[str]:
    return sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def _kind(prefix: str, *, version: str = "") -> list[bytes]:
    """Files of the golden stores, or of one, whose names start so, the smallest first."""
    versions = [version] if version else _versions()
    found = [data for version in versions for key, data in golden(version).items() if key.startswith(prefix)]
    return sorted((data for data in found if len(data) <= SIZE_MAX), key=len)


def _line(data: bytes) -> bytes:
    return data.partition(b"\n")[0]


def _decisions() -> list[bytes]:
    bodies = []
    for data in _kind("refs/"):
        with suppress(ValueError):  # one store has a damaged one
            bodies.append(json.loads(_line(data)))
    bodies = [
        body | {"run": "main", "step": 1, "attempt": 1}
        for body in bodies
        if body["kind"] in ("commit", "fence")
    ]
    return [json.dumps(body).encode() for body in bodies]


def _documents(version: str = "") -> list[bytes]:
    files = [data for data in _kind("manifests/", version=version) if data.startswith(MANIFEST_HEADER.magic)]
    return [zstandard.decompress(data[MANIFEST_HEADER.size :]) for data in files]


@cache
def _one_document() -> Any:
    return json.loads(max(_documents("v1"), key=len))


def _structures() -> list[bytes]:
    return [json.dumps(json.loads(document)["structure"]).encode() for document in _documents()]


def _names() -> list[bytes]:
    keys = [key for version in _versions() for key in golden(version)]
    return [key.encode() for key in [*keys, "sessions/" + "0a" * 16 + ".3.1.70.main", "refs/main/7.pin-1"]]


def _lists() -> list[bytes]:
    rows = np.zeros(3, manifest.LIST_ROW)
    rows["size"] = 5
    return [manifest.list_to_bytes(1, rows), manifest.list_to_bytes(2, rows[:1])]


def _payloads() -> list[bytes]:
    """Records of the golden packs, their headers shortened to what `payload` reads."""
    found = []
    for data in _kind("packs/"):
        for row in pack.read_footer(
            lambda offset, size, data=data: data[offset : offset + size], len(data), "golden"
        ):
            if row["raw_size"] < 4096 and row["stored_size"] < 4096:
                at = int(row["offset"]) + 96
                head = struct.pack(
                    "<BBHI", row["codec"], row["itemsize"], row["raw_size"], row["stored_size"]
                )
                found.append(head + data[at : at + int(row["stored_size"])])
    return found[:200]


def _files(suffix: str) -> list[bytes]:
    arrays = {"w": np.arange(6, dtype="<f4").reshape(2, 3), "n": np.array(3), "e": np.zeros((0, 2), "u1")}
    with tempfile.TemporaryDirectory() as at:
        path = Path(at) / f"x{suffix}"
        if suffix == ".pt":
            files.write_pt(path, {"model": arrays, "step": 7, "betas": (0.9, 0.99), "name": "x"})
            return [path.read_bytes()]
        if suffix == ".npz":
            np.savez(path, **arrays)
            plain = path.read_bytes()
            np.savez_compressed(path, **arrays)
            return [plain, path.read_bytes()]
        specs = [files.TensorSpec(key, array.dtype.name, array.shape) for key, array in arrays.items()]
        with files.create_file(path, specs, "{}") as out:
            for key, array in arrays.items():
                out.buffer(key)[:] = (
                    array.view(np.uint8).ravel() if array.ndim else np.frombuffer(array.tobytes(), "u1")
                )
                out.done(key)
        return [path.read_bytes()]


# -- what is tried


def descriptor(data: bytes) -> None:
    backend = MemoryBackend()
    backend.create_once(DESCRIPTOR, sealed(data))
    Store(backend)


def sealed_record(data: bytes) -> None:
    unseal(data, "here")


def decision(data: bytes) -> None:
    found = records.decision_from_bytes(sealed(data), Slot("main", 1, 1))
    if isinstance(found, records.Commit):  # and what people are shown of it
        told = overview.step_line(found)
        json.dumps(told)
        printing.when(told["created_s"])
        printing.figures(told["metrics"])
        printing.percent(told["ratio"])
        for group in found.figures.groups:
            human_size(group.logical_size)
        human_size(told["logical_size"])
        human_size(told["written_size"])
        assert records.decision_from_bytes(found.to_bytes(), found.slot) == found


def gc_record(data: bytes) -> None:
    body = load_json(data, "here")
    key = f"gc/{body.get('kind')}-{body.get('cycle')}" if isinstance(body, dict) else ""
    found = GcRecord.from_bytes(sealed(data), key if records.parse_gc_key(key) else "gc/sweep-0")
    assert GcRecord.from_bytes(found.to_bytes(), found.key) == found


def session(data: bytes) -> None:
    process.is_dead(unseal(sealed(data), "here"))


def names(data: bytes) -> None:
    """Names in a store: whatever is taken for ours is written back as the same name, and is a legal one."""
    key = data.decode("utf-8", "replace")
    for found in (Slot.from_key(key), SessionName.from_key(key), Pin.from_key(key), PackName.from_key(key)):
        assert found is None or (found.key == key and is_name(key)), key
    records.parse_gc_key(key)
    assert records.sid_of(key) is None or is_name(key)
    parts = key.split("/")
    assert not is_name(key) or not {"", ".", ".."} & set(parts)
    assert not records.is_run(key) or (is_name(key) and "/" not in key)


def whole_pack(data: bytes) -> None:
    for some in (data, mended_pack(data)):

        def read_at(offset: int, size: int, some: bytes = some) -> bytes:
            return some[offset : offset + size]

        with suppress(FormatError):
            pack.read_header(some, "here")
        rows = pack.read_footer(read_at, len(some), "here")
        assert sum(1 for _ in pack.scan(read_at, len(some), rows, "here")) <= len(rows)


def index(data: bytes) -> None:
    for some in (data, mended_index(data)):
        store = some[8:24]
        if some is data:
            with suppress(FormatError):
                Segment.from_bytes(some, store, "here")
            continue
        segment = Segment.from_bytes(some, store, "here")

        def fill(offset: int, buffers: Any, some: bytes = some) -> None:
            for buffer in buffers:
                buffer[:] = np.frombuffer(some, np.uint8, buffer.size, offset)
                offset += buffer.size

        stored = StoredSegment.open(fill, len(some), store, "here")
        ids = np.concatenate([np.zeros((1, 32), np.uint8), segment.rows["id"]])
        allowed = np.ones(len(segment.packs), np.bool_)
        for one in (segment, stored):
            one.find(ids, keys_of(ids), allowed)


def manifest_file(data: bytes) -> None:
    Manifest.from_bytes(mended_manifest(data), "here")


def manifest_document(data: bytes) -> None:
    found = Manifest.from_bytes(manifest_of(data), "here")
    rows = found.tensors
    for leaf in leaves.named(found.structure, len(rows)):
        loader.check_inside(rows[leaf.at], leaf)
    leaves.leaf_names(found.structure, [row.name for row in rows])
    store = Store(_backend(golden("v1")))
    for lazy in (True, False):
        if lazy or sum(row.size for row in rows) < 1 << 20:
            loader.load(store, found, lazy=lazy)


def _backend(objects: dict[str, bytes]) -> MemoryBackend:
    backend = MemoryBackend()
    for key, data in objects.items():
        backend.create_once(key, data)
    return backend


def structure(data: bytes) -> None:
    """A structure alone, over three tensors: everything that walks one."""
    node = load_json(data, "here")
    tensors = [np.arange(48, dtype=np.uint8), np.arange(6, dtype="<f4"), np.frombuffer(b"text", np.uint8)]
    called = ["a", "b", "c"]

    def value(leaf: Any) -> Any:
        layout = leaf.view.layout
        if layout is not None:
            start, stop = layout.span
            if start < 0 or stop > tensors[leaf.at].nbytes:
                raise FormatError("outside")
        return (
            arrays.view(tensors[leaf.at], leaf.view, where("state", leaf.path))
            if leaf.is_array
            else tensors[leaf.at]
        )

    tree.check(node, len(tensors))
    every = leaves.leaf_names(node, called)
    leaves.plain_leaves(node, called)
    leaves.rewritten(node, called, lambda leaf, text: {"tensor": leaf.at})
    if every:
        with suppress(NotFoundError):
            leaves.select(node, called, every[0])
    leaves.without(node, len(tensors), {0})
    tree.unflatten(node, len(tensors), value)


def list_chunk(data: bytes) -> None:
    level, size = (
        (struct.unpack_from("<H", data, 4)[0], struct.unpack_from("<Q", data, 16)[0])
        if len(data) > 24
        else (1, 9)
    )
    manifest.list_from_bytes(data, level, size, "here")


def payload(data: bytes) -> None:
    """A record's payload; what follows the size that it has is its base."""
    if len(data) < 8:
        return
    codec, itemsize, size, stored_size = struct.unpack_from("<BBHI", data)
    body = np.frombuffer(data, np.uint8, offset=8)
    base = np.resize(
        body[stored_size:] if stored_size < body.size else np.arange(256, dtype=np.uint8), size + 64
    )
    out = np.empty(size, np.uint8)
    codecs.decode(
        codec, body[:stored_size].copy(), itemsize, out, "here", base if codec in codecs.DELTAS else None
    )


def _file(suffix: str) -> Callable[[bytes], None]:
    def parse(data: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            file.write(data)
            file.flush()
            files.read_state(Path(file.name))

    return parse


def series_names(data: bytes) -> None:
    found = data.decode("utf-8", "replace").splitlines()
    if found:
        steps = series.steps_of(found)
        assert list(steps.values()) == sorted(steps.values())
        assert all(0 <= step <= records.STEP_MAX for step in steps.values())


def words(data: bytes) -> None:
    """Values of options, and names of runs and steps."""
    text = data.decode("utf-8", "surrogateescape")
    context = click.Context(click.Command("x"))
    option = click.Option(["--x"])
    for parse in (options.step_word, options.step_of_run):
        with suppress(click.BadParameter):
            parse(context, option, text)
    for parse_all in (options.metric_values, options.best_rules):
        with suppress(click.BadParameter):
            parse_all(context, option, [text])
    with suppress(InvalidInputError):
        assert records.check_run(text) == text
    with suppress(InvalidInputError):
        str(best.parse(text))
    printing.plain(text)
    with suppress(DeltackptError):
        dtypes.numpy_dtype(text)
        dtypes.carrier(text)


def keys(data: bytes) -> None:
    """Patterns of names, against a golden step's."""
    document = _one_document()
    called = document["tensors"]["name"]
    leaves.select(document["structure"], called, data.decode("utf-8", "replace").splitlines())
    name(((None, data), data.decode("latin-1")))


def store(data: bytes) -> None:
    """A store of which one file is other bytes: verified, loaded step by step, listed."""
    if len(data) < 2:
        return
    objects = dict(golden("v1-runs"))
    key = sorted(objects)[data[0] % len(objects)]
    objects[key] = mended(key, data[2:]) if data[1] % 4 else data[2:]
    if key.startswith("manifests/") and data[1] % 4:
        # The commit says what the manifest's digest is.
        for ref, body in list(objects.items()):
            if ref.startswith("refs/") and key[10:42].encode() in body:
                told = json.loads(_line(body)) | {"manifest": blake3(objects[key]).hexdigest()}
                objects[ref] = sealed(json.dumps(told).encode())
    backend = _backend(objects)
    with suppress(FormatError):
        verify(backend, level="decode")
    opened = Store(backend)
    for run in opened.refs.runs():
        for step in (1, 2, 3, 4):
            with suppress(FormatError, NotFoundError):
                Run(opened, run).load(step)
    with suppress(FormatError):
        overview.listing(opened)


def _stores() -> list[bytes]:
    objects = golden("v1-runs")
    return [
        bytes([i, 1]) + (_line(data) if data[:1] == b"{" else data)
        for i, (_, data) in enumerate(sorted(objects.items()))
    ]


_ASKED = (FormatError, InvalidInputError)  # of what names a class, or is no array
TARGETS: dict[str, Target] = {
    "descriptor": Target(descriptor, lambda: [_line(d) for d in _kind(DESCRIPTOR)], mutate=mutations.as_json),
    "sealed": Target(sealed_record, lambda: [sealed(b"{}"), *_kind("refs/")]),
    "decision": Target(decision, _decisions, mutate=mutations.as_json),
    "gc-record": Target(gc_record, lambda: [_line(d) for d in _kind("gc/")], mutate=mutations.as_json),
    "session": Target(
        session,
        lambda: [json.dumps(process.identity()).encode(), *map(_line, _kind("sessions/"))],
        mutate=mutations.as_json,
    ),
    "names": Target(names, _names),
    "pack": Target(whole_pack, lambda: _kind("packs/")),
    "index": Target(index, lambda: _kind("index/")),
    "manifest-file": Target(manifest_file, lambda: _kind("manifests/")),
    "manifest": Target(manifest_document, lambda: _documents("v1"), (DeltackptError,), mutations.as_json),
    "structure": Target(structure, _structures, (DeltackptError,), mutations.as_json),
    "list": Target(list_chunk, _lists),
    "payload": Target(payload, _payloads),
    "safetensors": Target(_file(".safetensors"), lambda: _files(".safetensors"), _ASKED),
    "npz": Target(_file(".npz"), lambda: _files(".npz"), _ASKED),
    "pt": Target(_file(".pt"), lambda: _files(".pt"), _ASKED),
    "series": Target(
        series_names,
        lambda: [b"run2/step_000100.pt\nrun2/step_000020.pt", b"epoch=3-step=1200.pt\nepoch=4-step=1600.pt"],
        (InvalidInputError,),
    ),
    "words": Target(
        words, lambda: [b"latest", b"main@7", b"loss=0.5", b"loss:3:max", b"exp-1", b"<M8[ns]", b">f4"]
    ),
    "keys": Target(
        keys, lambda: [b"*.w", b"[ab]*\n*\n*", b"frozen", b"model"], (NotFoundError, InvalidInputError)
    ),
    "store": Target(store, _stores),
}


# -- trying


@contextmanager
def bounded() -> Iterator[None]:
    """Let what runs here have so much more memory and so much time, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def too_long(*_: object) -> None:
        raise AssertionError(f"took more than {SECONDS_MAX} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS_MAX)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_MAX, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_one(target: Target, data: bytes) -> bool:
    """Whether an input is taken; whatever is neither an answer nor a refusal goes through."""
    try:
        target.parse(data)
    except target.refusals:
        return False
    return True


def corpus(called: str) -> list[bytes]:
    """What once was a bug, by the file."""
    return [path.read_bytes() for path in sorted((CORPUS / called).glob("*"))]


def some(called: str, seed: int, n: int) -> Iterator[bytes]:
    """Seeds, the corpus, and so many of them made hostile."""
    target = TARGETS[called]
    seeds = [*target.seeds(), *corpus(called)]
    yield from seeds
    rng = random.Random(f"{called} {seed}")
    for _ in range(n):
        data = mutations.spliced(rng, seeds) if rng.random() < 0.1 else rng.choice(seeds)
        yield (target.mutate if rng.random() < 0.8 else mutations.as_bytes)(rng, data)
