"""Every parser, led by the branches that an input reaches (libFuzzer, by atheris).

    pip install -r tests/fuzz/requirements.txt
    PYTHONPATH=$PWD python tests/fuzz/parsers.py [TARGET ...] [--seconds 60] [--seed N]

fuzzes the targets named, or all that targets.py has, one after another, so many seconds each; the seed is
printed.  An input that a parser neither takes nor refuses is left as ``crash-TARGET-...`` where this was
called; with its name after ``--replay TARGET`` it is tried alone.  Mended, it belongs into
``tests/fuzz/corpus/TARGET/``, which tests/test_fuzz.py tries, with mutations of its own, in every pytest.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def fuzz(called: str, seconds: int, seed: int) -> None:
    """Fuzz one target; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["deltackpt"]):
        from fuzz import mutations, targets
    target = targets.TARGETS[called]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    def one(data: bytes) -> None:
        targets.try_one(target, data)

    def mutate(data: bytes, size_max: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if target.mutate is mutations.as_bytes or rng.random() < 0.5:
            return bytes(atheris.Mutate(data, size_max))
        return target.mutate(rng, data)[:size_max]

    with tempfile.TemporaryDirectory() as at:
        for number, data in enumerate([*target.seeds(), *targets.corpus(called)]):
            (Path(at) / str(number)).write_bytes(data)
        limits = [f"-timeout={targets.SECONDS_MAX}", "-rss_limit_mb=4096", f"-max_len={targets.SIZE_MAX}"]
        run = [
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-artifact_prefix=crash-{called}-",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *limits, *run, at], one, custom_mutator=mutate)
        atheris.Fuzz()


def replay(called: str, path: Path) -> None:
    """Try one input."""
    from fuzz import targets

    with targets.bounded():
        taken = targets.try_one(targets.TARGETS[called], path.read_bytes())
    print("taken" if taken else "refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"))
    options = parser.parse_args()
    if options.replay:
        replay(options.replay[0], Path(options.replay[1]))
        return
    if len(options.targets) == 1:
        fuzz(options.targets[0], options.seconds, options.seed)
        return
    from fuzz import targets

    failed = []
    for called in options.targets or targets.TARGETS:
        print(f"{called}: {options.seconds} s, seed {options.seed}", flush=True)
        command = [
            sys.executable,
            __file__,
            called,
            "--seconds",
            str(options.seconds),
            "--seed",
            str(options.seed),
        ]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        shown = done.stdout.splitlines()
        print(
            "\n".join(line for line in shown if done.returncode or line.startswith("stat::number_of")),
            flush=True,
        )
        failed += [called] if done.returncode else []
    sys.exit(f"found something in {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
