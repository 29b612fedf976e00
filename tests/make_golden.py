"""Write golden stores: ``python tests/make_golden.py`` makes those under tests/golden that are not there.

Read tests/golden/README.md first: golden stores are added, never regenerated, once released.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np
import zstandard

from deltackpt import codecs, gc
from deltackpt.backends import Backend
from deltackpt.backends.local import LocalBackend
from deltackpt.chunking import Chunker
from deltackpt.differences import RSUB
from deltackpt.energy import Energy
from deltackpt.format import MANIFEST_HEADER, VERSION, seal
from deltackpt.groups import Coded, GroupCost
from deltackpt.pack import PackName
from deltackpt.records import GC_RUN, Fence, Figures, GcRecord, Origin, SessionName, Slot
from deltackpt.repair import repair
from deltackpt.restore import fill
from deltackpt.run import Run
from deltackpt.store import DEPTH_MAX, DESCRIPTOR, DIRS, Store
from deltackpt.types import DTYPE_SIZES

GOLDEN = Path(__file__).parent / "golden"
#: Of all that is in golden stores, as ``sha256sum --check`` reads them; lines are added.
SUMS = GOLDEN / "SHA256SUMS"
#: Small chunks, so that a small store has lists, and lists of lists.
CHUNKER = Chunker(min_size=256, avg_size=1024, max_size=4096)


#: The dtypes that v1 holds: those there were when it was made.
V1_DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
]
_NOT_IN_NUMPY = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
#: Those that came with views, and those of them that ml_dtypes 0.5 does not have.
NEW_DTYPES = [
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e3m4",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float4_e2m1fn",
    "float4_e2m1fn_x2",
    "int4",
    "uint4",
    "int2",
    "uint2",
    "complex32",
]
ONLY_TORCH = ["float4_e2m1fn_x2", "complex32"]


def noise(size: int, seed: int) -> np.ndarray:
    """Bytes from integer arithmetic alone (splitmix64): the same on every machine, for ever."""
    z = (np.arange(-(-size // 8), dtype=np.uint64) + np.uint64(1 + (seed << 32))) * np.uint64(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).astype("<u8").view(np.uint8)[:size]


def weights(n: int, seed: int) -> np.ndarray:
    """float32 with few exponents: what byte planes are for."""
    return ((noise(4 * n, seed).view("<u4") >> 9) | 0x3C000000).view("<f4")


def state(step: int) -> dict[str, Any]:
    """A state with every tag and dtype there was in v1, every codec, and lists of one and two levels."""
    w = weights(3000, 1).reshape(60, 50)
    if step > 1:
        w = w.copy()
        w[7:9] = weights(100, step).reshape(2, 50)
    tied = noise(64, 2).view("<i4").reshape(4, 4)
    odd = np.array([0x7FC00001, 0x80000000, 0xFF800000, 1], "<u4").view("<f4")
    dtypes = [name for name in V1_DTYPES if name not in _NOT_IN_NUMPY and name != "bool"]
    return {
        "model": {"w": w, "tied": tied, "again": tied, "odd": odd, "scalar": np.array(step, "<i8")},
        "dtypes": {name: noise(6 * DTYPE_SIZES[name], 3).view(name) for name in dtypes},
        "mask": np.arange(500) % 7 == 0,
        "empty": np.zeros((0, 3), "<f8"),
        "frozen": np.zeros(4096 * 1100, np.uint8),
        "tokens": np.repeat(noise(400, 4).view("<u4"), 60) % 50_000,
        "random": noise(5000, 5),
        "notes": "once upon a checkpoint " * 300,
        "long": noise(2000, 6).tobytes(),
        "small": {
            "none": None,
            "flag": True,
            "step": step,
            "large": -(1 << 70),
            "lr": 3e-4,
            "inf": float("inf"),
            "text": "snow \u2603",
            "surrogate": "\ud800",
            "bytes": b"\0\xff",
            "betas": (0.9, 0.999),
            "empty": [{}, [], ()],
            "by_id": {0: "a", (1, "x"): "b", None: tied},
            "ordered": OrderedDict(b=1, a=2),
        },
    }


def torch_state() -> dict[str, Any]:
    """Tensors of torch, of the dtypes that NumPy does not have."""
    import torch

    half = torch.from_numpy((weights(900, 8).view("<u4") >> 16).astype("<u2").view("<i2"))
    bits = torch.from_numpy(noise(40, 9).copy())
    return {
        "bfloat16": half.view(torch.bfloat16).reshape(30, 30),
        "float32": torch.from_numpy(weights(3000, 1)),  # the same bytes as step 1's weights
        **{name: bits.clone().view(getattr(torch, name)) for name in ("float8_e4m3fn", "float8_e5m2")},
        "scalar": torch.tensor(2.5),
    }


class Place(NamedTuple):
    """A namedtuple of the user's."""

    x: Any
    y: Any


@dataclass
class Config:
    """A dataclass of the user's."""

    lr: float
    place: Any


def types_state() -> dict[str, Any]:
    """A state with every tag, dtype and kind of view that v1 lacks, of NumPy alone."""
    flat = weights(2000, 11)
    table = noise(4 * 60, 12).view("<i4").reshape(6, 10)
    attributed = OrderedDict(w=flat[:10])
    attributed._metadata = OrderedDict({"": {"version": 2}})
    ml = [name for name in NEW_DTYPES if name not in ONLY_TORCH]
    return {
        "flat": flat,
        "w": flat[:600].reshape(20, 30).T,
        "bits": flat[1000:1100].view("<u2"),
        "repeated": np.broadcast_to(flat[50:60], (3, 10)),
        "storage": {"left": table[:, :4], "right": table[:, 3:]},
        "fortran": np.asfortranarray(noise(120, 13).reshape(2, 3, 20)),
        "backwards": noise(40, 14).view("<i2")[::-1],
        "cut": noise(400, 15).reshape(20, 20)[:, 3:7],
        "dtypes": {name: noise(6 * DTYPE_SIZES[name], 16).view(getattr(ml_dtypes, name)) for name in ml},
        "spelled": {
            text: noise(48, 17).view(text) for text in (">f4", ">c8", "<M8[ns]", "<m8[25us]", "|S3", "|V8")
        },
        "text": np.array(["a", "snow \u2603"], "<U6"),
        "scalars": [
            np.float32(0.1),
            np.int64(-5),
            np.datetime64("2026-01-05", "D"),
            np.str_("a\0"),
            np.bytes_(b"\0"),
        ],
        "complex": [1j, complex(float("inf"), -0.0)],
        "attributed": attributed,
        "counter": Counter({30: 1, "x": 2}),
        "place": Place(1, table[0]),
        "config": Config(lr=3e-4, place=Place("a", None)),
        "pickled": frozenset([7]),
    }


def types_torch_state() -> dict[str, Any]:
    """What only torch has."""
    import torch

    w = torch.from_numpy(weights(240, 18))
    images = torch.from_numpy(weights(96, 19)).reshape(1, 4, 3, 8).permute(0, 3, 1, 2)  # channels last
    bits = {name: torch.from_numpy(noise(24, 20).copy()) for name in ONLY_TORCH}
    return {
        "parameter": torch.nn.Parameter(w[:100]),
        "data": w,
        "frozen": torch.nn.Parameter(w[200:], requires_grad=False),
        "leaf": torch.from_numpy(weights(3, 21)).requires_grad_(),
        "images": images,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        **{name: x.view(getattr(torch, name)) for name, x in bits.items()},
    }


def write_types(store: Store, *, with_torch: bool = True) -> None:
    """Save what v1 lacks."""
    with reproducible():
        Run(store, "main").save(types_state(), step=1, allow_pickle=True)
        if with_torch:
            Run(store, "torch").save(types_torch_state(), step=1)


def make_store(backend: Backend) -> Store:
    """Make an empty store of small chunks and a fixed uuid."""
    backend.make_dirs(DIRS)
    body = {
        "format": "deltackpt",
        "version": VERSION,
        "uuid": "6f1c7f0a-2f8e-4c39-9d5b-3f1f8f8a0c11",
        "chunker": CHUNKER.to_json(),
        "depth_max": DEPTH_MAX,
        "features": [],
    }
    backend.create_once(DESCRIPTOR, seal(body))
    return Store(backend)


@contextmanager
def reproducible() -> Iterator[None]:
    """Names and clocks the same every time."""
    sids = (hashlib.sha256(b"golden %d" % i).digest()[:16] for i in itertools.count())
    with ExitStack() as stack:
        stack.enter_context(mock.patch("secrets.token_bytes", side_effect=sids))
        stack.enter_context(mock.patch("time.time", return_value=1767225600.0))
        stack.enter_context(mock.patch("time.perf_counter", return_value=0.0))
        stack.enter_context(mock.patch.object(Energy, "of", return_value=Energy()))
        yield


def write(store: Store, *, with_torch: bool = True) -> None:
    """Save, overwrite, fence, forget and collect; the same bytes every time."""
    with reproducible():
        run = Run(store, "main")
        for step in (1, 2, 3):
            run.save(state(step), step=step, metrics={"loss": 1 / step}, metadata={"lr": 3e-4})
        run.save(state(4), step=3, metrics={"loss": 0.25}, overwrite=True)
        store.refs.decide(Fence(Slot("main", 5, 1), bytes(16)))
        run.save(state(5), step=5)
        if with_torch:
            Run(store, "torch").save(torch_state(), step=10)
        run.forget([2])
        gc.collect(store)


def write_runs(store: Store, *, with_torch: bool = True) -> None:
    """Pin, unpin, forget what is pinned, and fork; the same bytes every time."""
    with reproducible():
        run = Run(store, "main")
        for step in range(5):
            run.save({"w": weights(300, step), "frozen": noise(3000, 7), "step": step}, step=step)
        for step in (1, 2, 3):
            run.pin(step)
        run.unpin(2)
        run.fork("branch", step=2).save({"w": weights(300, 9), "step": 3}, step=3)
        run.forget([0, 2])
        # By one who looked for a pin before it was there.
        store.refs.forget([run.commit(3).slot])
        gc.collect(store)


def delta_state(step: int) -> dict[str, Any]:
    """What a training state of every kind of delta looks like after so many steps."""
    w = weights(3000, 1)
    moment = np.abs(weights(6000, 2))
    first = weights(4000, 6)
    wide = weights(2000, 3).astype(np.float64)
    rows = weights(4000, 4).astype(ml_dtypes.bfloat16)
    counts = np.arange(3000, dtype=np.int64)
    flat = noise(16_000, 5)
    for i in range(1, step + 1):
        w = w * (1 + np.float32(1e-5) * weights(3000, 10 + i) * 50)
        moment = moment * np.float32(0.875) + np.float32(1e-6) * np.abs(weights(6000, 20 + i))
        first = first * np.float32(0.9) + np.float32(0.2) * weights(4000, 30 + i)
        wide = wide + 1e-9 * i
        rows.view(np.uint16)[i::97] += 1
        rows.view(np.uint16)[1000 + i : 2000 : 3] += 1
        counts[::2] += i
    return {
        "master": w,
        "bf16": w.astype(ml_dtypes.bfloat16),
        "fp16": w.astype(np.float16),
        "moment": moment,
        "first": first,
        "wide": wide,
        "fp32": wide.astype(np.float32),
        "rows": rows,
        "counts": counts,
        "shards": np.split(flat, 2 + step % 3) if step % 3 != 1 else [flat[:7000], flat[7000:]],
    }


def write_delta(store: Store, *, with_torch: bool = True) -> None:
    """Save what becomes deltas of every form, fork, forget bases, collect; the same bytes every time."""
    with reproducible():
        run = Run(store, "main")
        for step in range(5):
            run.save(delta_state(step), step=step)
        branch = run.fork("branch", step=2)
        # A map that small chunks of these states do not happen to choose.
        rotated = codecs.Mode(RSUB)
        with (
            mock.patch.object(codecs.encoder, "best_mode", return_value=rotated),
            mock.patch.object(codecs, "best_mode", return_value=rotated),
        ):
            branch.save({k: v for k, v in delta_state(6).items() if k in ("first", "moment")}, step=3)
        Run(store, "kin", shadow=0).save({**delta_state(1), "counts": np.arange(9)}, step=1)
        run.forget([0, 1])
        gc.collect(store)


def midway_state(step: int) -> dict[str, Any]:
    """Weights of which some move, and rows enough for an index of several blocks."""
    w = weights(20_000, 31)
    w = w.copy() if step > 1 else w
    if step > 1:
        w[7 * step : 9 * step] = weights(2 * step, step)
    return {"w": w, "step": step}


def write_midway(store: Store, *, with_torch: bool = True) -> None:
    """Leave a store in the middle of it: writers at work and dead, a cycle not swept, an index lost."""
    with reproducible():
        run = Run(store, "main")
        for step in (1, 2, 3):
            run.save(midway_state(step), step=step)
        with mock.patch.object(gc, "N_FILES_MAX", 1):  # one index file of all
            gc.collect(store)
        run.save(midway_state(4), step=4)
        packs = set(store.backend.names("packs/"))
        commit = run.commit(4)
        cost = GroupCost("weights", "float32", 80_000, 75, 4096, {"planes": Coded(3, 4096, 3000)})
        energy = Energy(1.75, "measured: rapl package", {"rapl package": 1.5, "cpu seconds": 0.25})
        told = Figures(80_000, 4096, 5000, 1, 75, 3, {"save": 0.5}, [cost], energy)
        store.refs.decide(
            replace(commit, slot=Slot("main", 4, 2), figures=told, origin=Origin("elsewhere", 4))
        )
        store.refs.forget([Slot("main", 4, 1)])
        # A pack that only its own footer knows.
        index = set(store.backend.names("index/"))
        run.save(midway_state(5), step=5)
        for name in set(store.backend.names("index/")) - index:
            store.backend.delete(name)
        run.save(midway_state(6), step=6)
        run.forget([6])
        condemned = {PackName.from_key(name) for name in set(store.backend.names("packs/")) - packs}
        names = frozenset(name for name in condemned if name and run.commit(5).sid != name.sid)
        n_cycles = store.gc_state()[0]
        record = GcRecord("condemn", n_cycles, names, 7, len(packs) + 2)
        store.backend.create_once(record.key, record.to_bytes())
        store.refs.decide(Fence(Slot(GC_RUN, n_cycles, 1), bytes(16)))
        who = {"host": "elsewhere", "boot": "b", "pid_ns": "pid:[1]", "pid": 7, "start": 7}
        for sid, body in ((b"w" * 16, seal(who)), (b"t" * 16, seal(who)[:20])):
            name = SessionName(sid, n_cycles, Slot("main", 9 + (body != seal(who)), 1))
            store.backend.create_once(name.key, body)
        store.backend.create_once("quarantine/" + "5a" * 32, b"")
        store.backend.create_once(f"manifests/{(b't' * 16).hex()}.man", b"cut short")
        store.backend.create_once(f"tmp/{(b't' * 16).hex()}-0-0.pack.00c0ffee", b"DCPK")
    store.backend.barrier()


def write_repaired(store: Store, *, with_torch: bool = True) -> None:
    """Damage a pack, what is forgotten, and gc's records, and repair; the same bytes every time."""

    def spoil(name: str, at: int) -> None:
        data = bytearray(store.backend.read(name))
        data[at] ^= 1
        store.backend.delete(name)
        store.backend.create_once(name, data)

    with reproducible():
        run = Run(store, "main")
        states = [{"w": weights(300, step), "frozen": noise(3000, 7), "step": step} for step in range(5)]
        for step in (1, 2, 3, 4):
            run.save(states[step], step=step)
        run.forget([3, 4])
        gc.collect(store)
        spoil(max(store.backend.list("packs/"), key=lambda entry: entry.size).name, 200)
        for name in ("refs/main/3.1", "refs/main/4.1.gone", "gc/condemn-0", "gc/sweep-0"):
            spoil(name, 30)
        repair(store)
        Run(Store(store.backend), "main").save(states[1], step=5)
        store.backend.create_once("quarantine/" + "5a" * 32, b"")


def describe(store: Store) -> dict[str, Any]:
    """Tell every step's structure and tensors, with the SHA-256 of their bytes and of the manifest's JSON."""
    told: dict[str, Any] = {}
    for name in store.refs.runs():
        run = Run(store, name)
        told[name] = {}
        for step in run.steps():
            manifest = run.manifest(step)
            datas = [np.empty(row.size, np.uint8) for row in manifest.tensors]
            fill(store, list(zip(manifest.tensors, datas, strict=True)))
            tensors = {
                row.name: {
                    "dtype": row.dtype,
                    "shape": list(row.shape),
                    "framework": row.framework,
                    "level": row.level,
                    "root": row.root.hex(),
                    "fingerprint": row.fingerprint.hex(),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
                for row, data in zip(manifest.tensors, datas, strict=True)
            }
            file = store.backend.read(run.commit(step).manifest_key)
            told[name][str(step)] = {
                "json_sha256": hashlib.sha256(zstandard.decompress(file[MANIFEST_HEADER.size :])).hexdigest(),
                "structure": manifest.structure,
                "tensors": tensors,
            }
    return told


STORES = {
    "v1": write,
    "v1-types": write_types,
    "v1-runs": write_runs,
    "v1-delta": write_delta,
    "v1-midway": write_midway,
    "v1-repaired": write_repaired,
}


def sums(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a golden store, by its path under tests/golden."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(GOLDEN).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def make(name: str) -> None:
    """Make one golden store, whole or not at all, and note its sums."""
    target = GOLDEN / name
    try:
        store = make_store(LocalBackend(target / "store"))
        STORES[name](store)
        (target / "store" / ".reserve").unlink(missing_ok=True)  # space that the backend keeps, no object
        expected = json.dumps(describe(store), indent=1, sort_keys=True)
        (target / "expected.json").write_text(expected + "\n")
        with SUMS.open("a") as noted:
            noted.writelines(f"{digest}  {path}\n" for path, digest in sums(target).items())
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size} bytes")


def main() -> None:
    missing = [name for name in STORES if not (GOLDEN / name).exists()]
    if not missing:
        sys.exit("all are there: golden stores are added, never regenerated (tests/golden/README.md)")
    for name in missing:
        make(name)


if __name__ == "__main__":
    # As the tests import it: the classes above are stored under the module's name.
    import make_golden

    make_golden.main()
