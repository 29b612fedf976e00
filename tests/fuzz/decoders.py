"""Every decoder on hostile bytes, its C kernels built with the address and undefined-behaviour sanitizers.

    python tests/fuzz/decoders.py [--seconds 120] [--seed N]

builds `_kernels.c` with gcc, starts itself again with that build and the sanitizer's library, and decodes
payloads that were made, changed, cut and invented.  Whatever is no `CorruptError` and whatever a sanitizer
finds ends it with what was decoded; the seed, printed first, gives the same run again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

BUILT = "DELTACKPT_FUZZ_KERNELS"
SOURCE = Path(__file__).resolve().parents[2] / "deltackpt" / "_kernels.c"


def build(at: Path) -> Path:
    """Compile the kernels with both sanitizers."""
    out = at / "_kernels.abi3.so"
    include = sysconfig.get_paths()["include"]
    flags = ["-O1", "-g", "-shared", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, f"-I{include}", str(SOURCE), "-o", str(out)], check=True)
    return out


def start_again(seconds: float, seed: int) -> int:
    """Run the loop in a process that has the sanitizers."""
    with tempfile.TemporaryDirectory() as at:
        name = subprocess.run(
            ["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
        ).stdout.strip()
        environment = {
            **os.environ,
            BUILT: str(build(Path(at))),
            "LD_PRELOAD": name,
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "PYTHONMALLOC": "malloc",
        }
        arguments = [sys.executable, __file__, "--seconds", str(seconds), "--seed", str(seed)]
        return subprocess.run(arguments, env=environment, check=False).returncode


def load_built() -> None:
    """Make the sanitized kernels those that the package finds."""
    spec = importlib.util.spec_from_file_location("deltackpt._kernels", os.environ[BUILT])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["deltackpt._kernels"] = module
    from deltackpt import kernels

    if kernels.native() is not module:
        raise SystemExit("the sanitized kernels are not the ones in use")


def loop(seconds: float, seed: int) -> None:
    load_built()
    import numpy as np

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from coded import n_changed, payload_of

    from deltackpt import codecs, differences, kernels
    from deltackpt.errors import FormatError, InvalidInputError
    from deltackpt.scratch import Scratch

    # Memory that is used again is larger than what is asked for, and the sanitizer sees no step past the end.
    Scratch.of = lambda self, size: np.empty(size, np.uint8)
    rng = np.random.default_rng(seed)
    end, n_decoded, n_refused = time.monotonic() + seconds, 0, 0

    def some_bytes(size: int) -> np.ndarray:
        kind = rng.integers(4)
        if kind == 0:
            return rng.integers(0, 256, size, np.uint8)
        if kind == 1:
            return np.repeat(rng.integers(0, 256, size // 16 + 1, np.uint8), 16)[:size].copy()
        floats = rng.standard_normal(size // 4 + 1) * 10.0 ** rng.integers(-44, 38)
        return floats.astype("<f4").view(np.uint8)[:size].copy()

    def near(base: np.ndarray) -> np.ndarray:
        data = base.copy()
        if data.size:
            at = rng.integers(0, data.size, rng.integers(0, data.size + 1) // rng.integers(1, 40))
            data[at] += rng.integers(0, 4, at.size, np.uint8)
        return data

    def hostile(payload: np.ndarray) -> np.ndarray:
        bad = payload.copy()
        for _ in range(rng.integers(0, 4)):
            if bad.size:
                # Heads and tables more often than what they describe.
                where = rng.integers(0, min(bad.size, 64 if rng.integers(2) else bad.size))
                bad[where] = rng.integers(0, 256)
        if not rng.integers(4):
            bad = bad[: rng.integers(0, bad.size + 1)].copy()
        if not rng.integers(8):
            bad = np.concatenate([bad, some_bytes(int(rng.integers(1, 40)))])
        return bad

    def one() -> bool:
        itemsize = int(rng.choice(codecs.ITEMSIZES))
        kind = codecs.Kind(itemsize, bool(rng.integers(2)))
        size = int(rng.integers(0, 5000 if rng.integers(4) else 60))
        cast = int(
            rng.choice([0, *(k for k, (_, narrow) in differences.CAST_WIDTHS.items() if narrow == itemsize)])
        )
        wide = differences.CAST_WIDTHS[cast][0] if cast else itemsize
        offset = int(rng.integers(0, 3)) * wide
        base = some_bytes(offset + size // itemsize * wide + int(rng.integers(0, 2)) * 9)
        codec = int(rng.choice(list(codecs.NAMES)))
        same = (
            base[offset : offset + size] if not cast else codecs.cast(base[: size // itemsize * wide], cast)
        )
        data = near(same) if same.size == size and rng.integers(4) else some_bytes(size)
        if codec in codecs.DELTAS:
            scale = float(np.float32(rng.uniform(0.02, 1.99))) if not rng.integers(3) else 1.0
            map_ = int(rng.integers(3))
            delta = codecs.Base(base, offset, cast)
            if n_changed(data, kind, delta) > size // itemsize // 2:
                codec = codecs.dense.NUMBER
            payload = payload_of(codec, data, kind, delta, codecs.Mode(map_, scale))
        else:
            payload = payload_of(codec, data, kind)
        given = base if codec in codecs.DELTAS else None
        out = np.empty(size, np.uint8)
        codecs.decode(codec, np.array(payload), itemsize, out, "made", given)
        if not np.array_equal(out, data):
            raise SystemExit(f"{codecs.NAMES[codec]} does not give {size} bytes of {kind} back")
        bad = hostile(np.array(payload)) if rng.integers(8) else some_bytes(int(rng.integers(0, 200)))
        other = np.empty(size if rng.integers(4) else int(rng.integers(0, 5000)), np.uint8)
        cut = base[: rng.integers(0, base.size + 1)].copy() if not rng.integers(4) else base
        try:
            codecs.decode(codec, bad, itemsize, other, "bad", cut if given is not None else None)
        except FormatError:
            return False
        return True

    def raw_kernels() -> None:
        """The kernels themselves: arguments that fit, but for one buffer that may be too short or too long.

        Sizes all at random would end at the first check; each of the others must be what saves a call.
        """
        native = kernels.native()
        width, n, bitmap = (
            int(rng.choice(codecs.ITEMSIZES)),
            int(rng.integers(0, 2500)),
            bool(rng.integers(2)),
        )
        cast = int(rng.choice([0, *(k for k, (_, to) in differences.CAST_WIDTHS.items() if to == width)]))
        map_, scale = int(rng.integers(3)), float(rng.choice([1.0, 0.5]))
        wide = differences.CAST_WIDTHS[cast][0] if cast else width
        base = some_bytes(n * wide)
        same = codecs.cast(base, cast) if cast else base
        data = near(same) if rng.integers(4) else some_bytes(n * width)
        form = differences.Form(width, map_, cast)
        n_differ = n_changed(data, codecs.Kind(width, True), codecs.Base(base, 0, cast))
        room = (n + 7) // 8 if bitmap else n_differ + n // 255
        places, packed = np.empty(room, np.uint8), np.empty(n_differ * width, np.uint8)
        places = places[
            : differences.take(data, base, form, bitmap=bitmap, places=places, packed=packed)
        ].copy()
        n_samples, logs = int(rng.integers(0, 400)), np.zeros(int(rng.integers(1, 400)), np.int64)
        ends = np.empty(8 * int(rng.integers(1, 1 + data.size // 64 + 1)), np.uint8)
        align, cut_at = int(rng.choice([2, 4, 8])), int(rng.choice([0, 1 << 30, (1 << 32) - 1]))
        scaled = form._replace(scale=scale)
        room = np.empty(data.size + data.size // 8 + 8, np.uint8)
        [found] = differences.group_all([differences.Pair(data, base, scaled, room)])
        of = found.of
        sizes = differences.plane_sizes(of)
        grouped = room[: sum(sizes)].copy()
        planes = np.split(grouped, np.cumsum(sizes)[:-1]) if sizes else []
        wrong = {k + int(rng.integers(-1, 2)): v + int(rng.integers(-1, 2)) for k, v in of.items()}

        def off(buffer: np.ndarray) -> np.ndarray:
            """Its own memory, mostly as large as it should be."""
            size = buffer.size
            if not rng.integers(6):
                size = max(0, size + int(rng.choice([-9, -8, -width, -1, 1, width, 8, 9, 255])))
            out = np.zeros(size, np.uint8)
            out[: buffer.size] = buffer[:size]
            return out

        out = np.empty(n * width, np.uint8)
        calls = [
            lambda: native.delta_group(
                tuple(
                    (off(data), off(base), off(grouped), width, map_, cast, scale, few)
                    for few in rng.integers(-2, n + 2, rng.integers(4)).tolist()
                ),
                kernels.logs(300),
                int(rng.integers(-1, 302)),
            ),
            lambda: native.delta_ungroup(
                tuple(
                    (tuple(map(off, planes)), off(base), off(out), width, map_, cast, scale, of)
                    for _ in range(rng.integers(4))
                )
            ),
            lambda: native.delta_ungroup(
                (
                    (tuple(planes), base, out, width, map_, cast, scale, of),
                    (tuple(map(hostile, planes)), base, off(out), width, map_, cast, scale, of),
                )
            ),
            lambda: native.delta_ungroup(
                (
                    (
                        (hostile(planes[0]) if planes else None, *planes[1:]),
                        base,
                        out,
                        width,
                        map_,
                        cast,
                        scale,
                        of,
                    ),
                )
            ),
            lambda: native.sparse_take(
                off(data), off(base), off(places), off(packed), width, map_, cast, bitmap
            ),
            lambda: native.sparse_put(
                off(base), off(out), off(places), off(packed), width, map_, cast, bitmap
            ),
            lambda: native.sparse_put(
                base, off(out), hostile(places), off(packed), width, map_, cast, bool(rng.integers(2))
            ),
            lambda: native.split_planes(off(data), off(out), width, bitmap),
            lambda: native.join_planes(off(data), off(out), width, bitmap),
            lambda: native.entropies((data, base, data[:0]), logs, n_samples),
            lambda: native.cut(off(data), off(ends), align, 64, 128, cut_at),
            # Numbers that no caller may give.
            lambda: native.split_all(
                ((off(data), off(out), width, bitmap), (off(data), off(out), width, bitmap)),
                kernels.logs(300),
                int(rng.integers(-1, 302)),
            ),
            lambda: native.move(((off(data), int(rng.integers(-1, 10)), off(data)), (data, 1, data[1:]))),
            lambda: native.are_equal((off(data), base), (off(data), off(base))),
            lambda: native.delta_ungroup(((tuple(planes), base, out, width, map_, cast, scale, wrong),)),
            lambda: native.delta_group(
                ((data, base, out, int(rng.integers(-1, 10)), map_, 9 - cast, scale, -1),), kernels.logs(9), 9
            ),
            lambda: native.delta_ungroup((((None,) * 40, base, out, width, map_, cast, scale, {8: n}),)),
            lambda: native.sparse_put(base, out, places, packed, width, int(rng.integers(-2, 6)), -1, bitmap),
            lambda: native.entropies((data,), logs[:1], sys.maxsize),
        ]
        with contextlib.suppress(ValueError, InvalidInputError):
            calls[rng.integers(len(calls))]()

    while time.monotonic() < end:
        for _ in range(50):
            raw_kernels()
            if one():
                n_decoded += 1
            else:
                n_refused += 1
    print(f"{n_decoded} payloads decoded, {n_refused} refused, nothing found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", "120")))
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    options = parser.parse_args()
    if BUILT in os.environ:
        loop(options.seconds, options.seed)
        return
    print(f"seed {options.seed}, {options.seconds:g} s", flush=True)
    raise SystemExit(start_again(options.seconds, options.seed))


if __name__ == "__main__":
    main()
