"""Every decoder on hostile bytes, its C kernels built with the address and undefined-behaviour sanitizers.

    python tests/fuzz/decoders.py [--seconds 120] [--seed N]

builds `_kernels.c` with gcc, starts itself again with that build and the sanitizer's library, and decodes
payloads that were made, changed, cut and invented.  Whatever is no `CorruptError` and whatever a sanitizer
finds ends it with what was decoded; the seed, printed first, gives the same run again.
"""

from __future__ import annotations

import argparse
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
    """Decode and call until the time is over."""
    load_built()
    import numpy as np

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from fuzz import payloads

    from deltackpt import kernels
    from deltackpt.scratch import Scratch

    # Memory that is used again is larger than what is asked for, and the sanitizer sees no step past the end.
    Scratch.of = lambda self, size: np.empty(size, np.uint8)
    source, native = payloads.Source(seed), kernels.native()
    end, n_taken, n_tried = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        payloads.call_one(native, source)
        n_taken += payloads.decode_one(source)
        n_tried += 1
    print(f"{n_taken} payloads decoded, {n_tried - n_taken} refused, nothing found")


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
