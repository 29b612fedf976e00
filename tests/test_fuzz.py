"""Every parser on its corpus and on seeded mutations: an answer or a refusal, in bounded memory and time.

FUZZ_INPUTS (2000) is how many mutations each parser gets; FUZZ_SEED (0) which.  Led by coverage, for longer:
tests/fuzz/parsers.py, tests/fuzz/kernels.c; under sanitizers: tests/fuzz/decoders.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from fuzz import targets

N_INPUTS = int(os.environ.get("FUZZ_INPUTS", "2000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
#: Each of these inputs is a store that is verified and loaded.
N_SLOW = {"store": 4}

try:
    import torch  # noqa: F401 - for .pt
except ImportError:
    del targets.TARGETS["pt"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("called", targets.TARGETS)
def test_a_parser_takes_or_refuses_any_bytes(called: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL)
    target = targets.TARGETS[called]
    n_taken = n_refused = 0
    for number, data in enumerate(targets.some(called, SEED, N_INPUTS // N_SLOW.get(called, 1))):
        try:
            with targets.bounded():
                is_taken = targets.try_one(target, data)
        except Exception as error:
            error.add_note(
                f"FUZZ_SEED={SEED} FUZZ_INPUTS={N_INPUTS}, {called}, input {number}: {data[:2000]!r}"
            )
            raise
        n_taken, n_refused = n_taken + is_taken, n_refused + (not is_taken)
    assert n_taken, "not even what is right is taken: the target is wrong"
    assert n_refused or not N_INPUTS or called in ("names", "words", "store"), (
        "nothing is refused: nothing is tried"
    )


def test_the_kernels_go_through_their_corpus_under_the_sanitizers():
    library = Path(sysconfig.get_config_var("LIBDIR") or "") / (sysconfig.get_config_var("LDLIBRARY") or "")
    if shutil.which("gcc") is None or not library.is_file():
        pytest.skip("no gcc, or no library of Python")
    script = Path(__file__).parent / "fuzz" / "kernels.py"
    done = subprocess.run([sys.executable, script, "--replay"], capture_output=True, text=True, check=False)
    n_inputs = len((targets.CORPUS / "kernels.hex").read_text().split())
    assert (done.returncode, done.stdout) == (0, f"{n_inputs} inputs\n"), done.stderr


def test_the_corpus_is_small_and_every_part_of_it_is_tried():
    assert {path.name for path in targets.CORPUS.iterdir()} <= targets.TARGETS.keys() | {"kernels.hex", "pt"}
    assert sum(path.stat().st_size for path in targets.CORPUS.rglob("*") if path.is_file()) < 300_000
