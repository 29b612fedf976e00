"""Every entry point of `_kernels.c`, by kernels.c: led by coverage (needs clang), or the corpus once (gcc).

    python tests/fuzz/kernels.py [--seconds 300] [--seed N]
    python tests/fuzz/kernels.py --replay [FILE ...]

builds kernels.c with the address and undefined-behaviour sanitizers and runs libFuzzer on it for so many
seconds, from ``tests/fuzz/corpus/kernels.hex``, an input a line.  What it finds is left as ``crash-...``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus" / "kernels.hex"
SANITIZED = ["-g", "-O1", "-fno-sanitize-recover=all"]
#: What the interpreter itself leaves behind at its end is not looked at.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "PYTHONMALLOC": "malloc"}


def build(compiler: str, out: Path, sanitizers: str, *more: str) -> None:
    """Compile the harness against the library of the Python that runs this."""
    library, name = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDVERSION")
    paths = [f"-I{sysconfig.get_paths()['include']}", f"-L{library}", f"-Wl,-rpath,{library}"]
    flags = [*SANITIZED, f"-fsanitize={sanitizers}", *more, *paths]
    subprocess.run(
        [compiler, *flags, str(HERE / "kernels.c"), f"-lpython{name}", "-lm", "-o", str(out)], check=True
    )


def clang() -> str | None:
    return next(
        filter(None, (shutil.which(name) for name in ("clang", *(f"clang-{n}" for n in range(22, 12, -1))))),
        None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--replay", nargs="*", type=Path)
    options = parser.parse_args()
    # The interpreter that is embedded looks for its library where this one's is.
    environment = {**os.environ, **ENVIRONMENT, "PYTHONHOME": sys.base_prefix}
    with tempfile.TemporaryDirectory() as at:
        out, inputs = Path(at) / "kernels", Path(at) / "inputs"
        inputs.mkdir()
        for number, line in enumerate(CORPUS.read_text().split()):
            (inputs / f"{number:04}").write_bytes(bytes.fromhex(line))
        if options.replay is not None:
            build("gcc", out, "address,undefined", "-DWITHOUT_LIBFUZZER")
            command = [out, *(options.replay or sorted(inputs.iterdir()))]
        else:
            compiler = clang()
            if compiler is None:
                sys.exit("there is no clang, which has libFuzzer: apt-get install clang, or --replay")
            build(compiler, out, "fuzzer,address,undefined")
            limits = [
                f"-max_total_time={options.seconds}",
                f"-seed={options.seed}",
                "-max_len=8192",
                "-timeout=10",
            ]
            print(f"seed {options.seed}, {options.seconds} s", flush=True)
            command = [out, f"-seed={options.seed}", *limits, "-print_final_stats=1", inputs]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
