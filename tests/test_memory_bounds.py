"""What a save in the background takes beyond the state, of real processes: all of them, each page once."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
MIB = 1 << 20
#: What is on its way between reading and writing; and the interpreter of the process that saves, with NumPy
#: and all else: 22 MiB when it begins.
SLACK_SIZE = (64 + 32) * MIB

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="/proc says nothing of memory here"
)

# Three saves of tensors of 16 MiB, of which some change between them; bytes of memory in each beyond what
# there was before the first.
SAVES = """
import json, sys
import numpy as np
from deltackpt import open_run
sys.path.insert(0, sys.argv[1])
from family import Watch

store, size, n_changed, memory_max = sys.argv[2], *map(int, sys.argv[3:])
random = np.random.default_rng(0)
state = {str(i): random.random(4 << 20, np.float32) for i in range(size >> 24)}
with open_run(store + "-small") as run:
    run.save_async({"w": np.ones(1)}, step=0).wait()
beyond = []
with Watch() as watch:
    before = watch.most()
    with open_run(store, memory_max=memory_max or None) as run:
        for step in range(3):
            run.save_async(state, step=step).wait()
            beyond.append(watch.most() - before)
            for i in range(n_changed):
                for part in np.split(state[str(i)], 64):
                    part *= 1 + np.float32(1e-4) * random.random(part.size, np.float32)
print(json.dumps(beyond))
"""


def beyond(store: Path, *, size: int, n_changed: int, memory_max: int = 0) -> list[int]:
    arguments = [str(BENCH), str(store), *map(str, (size, n_changed, memory_max))]
    # -P: not the sources in the current directory, which may have no kernels.
    command = [sys.executable, "-P", "-c", textwrap.dedent(SAVES), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_save_takes_what_changed_and_the_shadow_and_little_more(tmp_path):
    """The shadow is a copy of what changed in the save before."""
    size, changed_size = 256 * MIB, 64 * MIB
    first, second, third = beyond(tmp_path / "store", size=size, n_changed=changed_size >> 24)
    assert first <= size + SLACK_SIZE
    assert second <= changed_size + size + SLACK_SIZE
    assert changed_size < third <= 2 * changed_size + SLACK_SIZE


def test_copies_and_shadow_stay_within_memory_max(tmp_path):
    memory_max = 64 * MIB
    for size in beyond(tmp_path / "store", size=512 * MIB, n_changed=32, memory_max=memory_max):
        assert memory_max / 4 < size <= memory_max + SLACK_SIZE
