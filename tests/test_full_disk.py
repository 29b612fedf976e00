"""A disk that is full to the last byte: saves say so, nothing is lost, and what is forgotten can be freed."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from deltas import nearly, taken
from faults import HookedOs
from steps import collect, floats, noise, opened, visible

from deltackpt import process
from deltackpt.backends.local import LocalBackend
from deltackpt.errors import StorageError
from deltackpt.format import seal
from deltackpt.records import SessionName, Slot

SEED = int(os.environ.get("FULL_DISK_SEED") or random.SystemRandom().randrange(1 << 32))
#: In a namespace of its own nobody has to be asked for a mount, and none is left behind.
SPACES = (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"])


def on_small_disk(path, size, *command):
    """Run a command in a small file system; None if none can be mounted here."""
    path.mkdir()
    for space in SPACES:
        # `exit 77`: there is no such file system here.
        script = 'mount -t tmpfs -o size="$1" none "$2" || exit 77; shift 2; exec "$@"'
        try:
            done = subprocess.run(
                [*space, "sh", "-c", script, "sh", size, path, *command],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                check=False,
            )
        except FileNotFoundError:
            continue
        if done.returncode != 77 and "unshare" not in done.stderr[:20]:
            return done
    pytest.skip("no small file system can be mounted here")
    return None


def script(name):
    return [sys.executable, str(Path(__file__).parent / "full_disk.py"), name]


def test_a_store_on_a_full_disk_saves_frees_and_loses_nothing_a_hundred_times(tmp_path):
    disk = tmp_path / "disk"
    done = on_small_disk(disk, "12m", *script("cycles"), disk, str(SEED))
    assert done.returncode == 0, f"seed {SEED}: {done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    print(f"seed {SEED}: {found}")
    assert found["cycles"] == 100
    assert found["from nothing free"] > 30
    assert found["writers killed"] > 5
    assert found["rewritten"] > 5
    assert found["freed"] > 100_000_000


def test_the_command_line_says_that_the_disk_is_full_and_frees_it(tmp_path):
    disk = tmp_path / "disk"
    done = on_small_disk(disk, "2m", *script("commands"), disk, "0")
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout)
    assert codes == {"save": 0, "save, full": 6, "ls": 0, "forget": 0, "gc": 0, "verify": 0, "save again": 0}


# -- where the disk is full by hook


class Full:
    """A disk with so many bytes of room for what is written from now on; a file that goes gives its back."""

    def __init__(self, path):
        self.left_size = 1 << 40
        self.path = path
        self.os = HookedOs(self.hook)

    def hook(self, call, *args):
        if call == "writev":
            size = sum(map(len, args[1]))
            if size > self.left_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left_size -= size
        if call == "unlink" and Path(args[0]).exists():
            status = Path(args[0]).stat()
            self.left_size += status.st_size if status.st_nlink == 1 else 0


@pytest.fixture
def full(tmp_path):
    return Full(tmp_path)


def in_packs(path):
    return sum(file.stat().st_size for file in (path / "packs").iterdir())


def test_a_gc_with_no_room_for_a_copy_frees_what_is_dead_first_and_then_what_is_half_in_use(full):
    backend = LocalBackend(full.path, calls=full.os)
    run = opened(backend)
    kept = {}
    for step in range(6):  # of 0, 2 and 4 a third is in use by 10
        run.save({"a": noise(step, 200_000), "b": noise(100 + step, 100_000)}, step=step)
        kept[f"b{step}"] = noise(100 + step, 100_000)
    run.save({name: kept[name] for name in ("b0", "b2", "b4")}, step=10)
    run.forget(range(6))
    full.left_size = 0
    before = in_packs(full.path)
    result = collect(backend)
    assert result.n_dead >= 3
    assert result.n_repacked >= 1
    assert in_packs(full.path) < 0.4 * before
    assert visible(full.path).keys() == {10}
    assert collect(backend).n_deleted == 0


def test_a_gc_that_can_free_nothing_says_that_the_disk_is_full(full):
    backend = LocalBackend(full.path, calls=full.os)
    run = opened(backend)
    run.save({"a": noise(1, 400_000), "b": noise(2, 400_000)}, step=1)
    run.save({"a": noise(1, 400_000)}, step=2)
    run.forget([1])
    full.left_size = 0
    with pytest.raises(StorageError, match="ENOSPC") as caught:
        collect(backend)
    assert caught.value.is_full
    assert visible(full.path).keys() == {2}
    full.left_size = 1 << 20
    assert collect(backend).n_repacked == 1


@pytest.mark.parametrize("is_more_dead", [False, True])
def test_a_gc_with_no_room_to_store_deltas_whole_says_so(full, monkeypatch, caplog, is_more_dead):
    taken(monkeypatch)
    backend = LocalBackend(full.path, calls=full.os)
    run, array = opened(backend), floats(1, 3000)
    for step in range(9):
        run.save({"w": array}, step=step)
        array = nearly(array, step)
    opened(backend, "other").save({"x": noise(1, 1000)}, step=1)
    run.forget(range(8))
    if is_more_dead:
        opened(backend, "other").forget([1])
    full.left_size = 0
    if is_more_dead:
        assert collect(backend).freed_size
    else:
        with pytest.raises(StorageError, match="ENOSPC") as caught:
            collect(backend)
        assert caught.value.is_full
    assert "no room to store 1 deltas whole" in caplog.text
    full.left_size = 1 << 20
    assert collect(backend).n_rebased == 1
    assert visible(full.path).keys() == {8}


def test_what_a_dead_writer_left_makes_room_for_its_fence(full):
    backend = LocalBackend(full.path, calls=full.os)
    opened(backend).save({"a": noise(1, 1000)}, step=1)
    name = SessionName(bytes(16), 0, Slot("main", 2, 1))
    backend.create_once(name.key, seal(process.identity()))
    left = full.path / "tmp" / f"{name.sid.hex()}-0-0.pack.00000000"
    left.write_bytes(noise(2, 10_000))
    (full.path / ".reserve").unlink()
    full.left_size = 0
    result = collect(backend)
    assert (result.fenced, result.freed_size) == (["run main step 2"], 10_000)
    assert not left.exists()
    assert visible(full.path).keys() == {1}


def test_the_reserve_is_taken_again_as_far_as_there_is_room(tmp_path):
    reserve = tmp_path / ".reserve"
    full = Full(tmp_path)
    backend = LocalBackend(tmp_path, calls=full.os)
    run = opened(backend)
    whole = reserve.stat().st_size
    run.save({"a": noise(1, 1000)}, step=1)
    run.save({"a": noise(2, 1000)}, step=2)
    full.left_size = 0
    run.forget([1])
    assert whole / 8 <= reserve.stat().st_size < whole
    full.left_size = 1 << 20
    collect(backend)
    assert reserve.stat().st_size == whole
    assert not backend.list("tmp/")


def test_a_run_kept_open_does_not_keep_the_space_of_what_another_process_deleted(tmp_path):
    backend = LocalBackend(tmp_path)
    run = opened(backend)
    run.save({"a": noise(1, 1000)}, step=1)
    run.load(1)
    with opened(tmp_path) as other:
        other.forget([1])
    collect(tmp_path)
    assert held(tmp_path)
    run.save({"a": noise(2, 1000)}, step=2)
    assert not held(tmp_path)
    run.load(2)
    run.close()
    assert not open_files(tmp_path)


def open_files(path):
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [name for name in (str(link.readlink()) for link in links) if str(path) in name]


def held(path):
    return [name for name in open_files(path) if name.endswith("(deleted)")]
