"""Opening a store, and what that takes."""

import subprocess
import sys

import pytest
from states import weights

from deltackpt import InvalidInputError, UnsupportedVersionError, open_run, open_store
from deltackpt.backends.memory import MemoryBackend
from deltackpt.format import seal, unseal
from deltackpt.store import DESCRIPTOR

MANY = """
import os, resource, sys, numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
import deltackpt, deltackpt.gc
from deltackpt import delta
for step in range(250):
    delta.save({"w": np.arange(step, step + 10)}, sys.argv[1], step=step)
for step in range(250):
    assert delta.load(sys.argv[1], step=step)["w"][0] == step
deltackpt.gc.collect(sys.argv[1])
print(len(os.listdir(sys.argv[1] + "/index")))
assert delta.load(sys.argv[1], step=7)["w"][0] == 7
"""


def test_many_saves_and_loads_need_few_open_files(tmp_path):
    if sys.platform != "linux":
        pytest.skip("counts files as Linux does")
    run = subprocess.run(
        [sys.executable, "-c", MANY, tmp_path / "s"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "1\n"  # index file, the merged one


def test_a_store_of_a_newer_format_is_refused():
    backend = MemoryBackend()
    open_store(backend, create=True)
    body = unseal(backend.read(DESCRIPTOR), "here")
    for change in ({"version": 2}, {"features": ["new"]}):
        newer = MemoryBackend()
        newer.create_once(DESCRIPTOR, seal({**body, **change}))
        with pytest.raises(UnsupportedVersionError, match="upgrade deltackpt"):
            open_store(newer)


def test_a_store_half_made_by_a_dead_process_is_finished(tmp_path):
    for name in ("packs", "tmp"):
        (tmp_path / name).mkdir()
    with open_run(tmp_path) as run:
        run.save({"w": weights(10)}, step=1)
        assert run.steps() == [1]


def test_a_copy_that_lost_its_empty_directories_can_be_saved_into(tmp_path):
    with open_run(tmp_path) as run:
        run.save({"w": weights(10)}, step=1)
    for name in ("tmp", "sessions", "gc", "quarantine"):
        (tmp_path / name).rmdir()
    with open_run(tmp_path) as run:
        run.save({"w": weights(20)}, step=2)
        assert run.steps() == [1, 2]


def test_other_peoples_files_are_not_built_upon(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(InvalidInputError, match="holds 'results'"):
        open_store(tmp_path, create=True)
