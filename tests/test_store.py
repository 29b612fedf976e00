"""Opening a store, and what that takes."""

import shutil
import subprocess
import sys

import pytest
from faults import HookedOs
from plain import weights

from deltackpt import InvalidInputError, UnsupportedVersionError, delta, open_run, open_store
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.format import seal, unseal
from deltackpt.gc import collect
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
n_files = len(os.listdir(sys.argv[1] + "/index"))
deltackpt.gc.collect(sys.argv[1])
print(n_files)
assert delta.load(sys.argv[1], step=7)["w"][0] == 7
"""


def test_many_saves_and_loads_need_few_open_files(tmp_path):
    if sys.platform != "linux":
        pytest.skip("counts files as Linux does")
    run = subprocess.run(
        [sys.executable, "-c", MANY, tmp_path / "s"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 40  # index files: who saves merges them


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


@pytest.fixture
def copied(tmp_path):
    """A store as a tool that drops empty directories copies it."""
    delta.save({"w": weights(10)}, tmp_path / "there", step=1)
    shutil.copytree(tmp_path / "there", tmp_path / "here")
    for name in ("tmp", "sessions", "gc", "quarantine"):
        (tmp_path / "here" / name).rmdir()
    return tmp_path / "here"


def test_a_copy_that_lost_its_empty_directories_can_be_resumed_from(copied):
    assert delta.load(copied, step=1)["w"].size == 10  # the same run is remembered for the save
    delta.save({"w": weights(20)}, copied, step=2)
    assert open_run(copied).steps() == [1, 2]


def test_a_copy_that_lost_its_empty_directories_can_be_thinned(copied):
    open_run(copied, create=False).forget([1])
    assert collect(copied).freed_size > 0
    assert open_run(copied).steps() == []


def test_a_save_after_a_load_costs_as_few_flushes_as_any(tmp_path):
    open_run(tmp_path).save({"w": weights(10)}, step=1)
    backend = LocalBackend(tmp_path, calls=HookedOs())
    delta.load(backend, step=1)
    delta.save({"w": weights(20)}, backend, step=2)
    assert backend._os.n_calls["fsync"] <= 9


def test_other_peoples_files_are_not_built_upon(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(InvalidInputError, match="holds 'results'"):
        open_store(tmp_path, create=True)


class OfBytes:
    def __fspath__(self):
        return b"store"


@pytest.mark.parametrize("where", [3, "", None, OfBytes()])
def test_what_is_no_place_of_a_store_is_refused_in_words(where):
    with pytest.raises(InvalidInputError) as caught:
        open_store(where)
    assert caught.value.message == f"store: found {where!r}, expected a directory, a Backend or a Store"
    assert caught.value.hint == "give the store's directory"


def test_a_file_and_other_peoples_directories_are_no_place_for_a_store(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(InvalidInputError) as caught:
        open_store(path)
    assert caught.value.message == f"{path}: is a file, expected a directory"
    assert caught.value.hint == "give the store's directory"
    with pytest.raises(InvalidInputError) as caught:
        open_store(tmp_path, create=True)
    assert caught.value.message == f"{tmp_path}: not a deltackpt store, and it holds 'file'"
    assert caught.value.hint == "choose an empty or a new directory"
