"""The soak, for as long as CI has time; `python tests/soak.py` goes on for hours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = os.environ.get("SOAK_SECONDS", "50")
SEED = os.environ.get("SOAK_SEED")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_is_lost_whoever_is_killed_suspended_or_told_the_wrong_time(capsys):
    seed = ["--seed", SEED] if SEED else []
    soak = [sys.executable, Path(__file__).with_name("soak.py"), "--seconds", SECONDS, *seed]
    # A process of its own: its many children inherit no threads.
    done = subprocess.run(soak, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    label, _, figures = done.stdout.strip().rpartition("\n")[2].partition(": ")
    found = json.loads(figures)
    with capsys.disabled():
        print(f"\nsoak, {label}: {figures}")
    # All of it took place: or it would prove nothing.
    for what in ("saved", "raced", "refused_as_dead", "fences", "killed", "suspended", "deleted", "gcs"):
        assert found[what] > 5, what
    for what in ("forgot", "pinned", "forked", "failed_calls", "steps_compared", "read", "verified"):
        assert found[what] > 0, what
