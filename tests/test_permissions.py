"""Who may read and write a store: the file system says, by umask, groups and modes, and nothing else does."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from deltackpt import delta, gc, open_run
from deltackpt.cli import cli
from deltackpt.errors import DeltackptError, StorageError
from deltackpt.export import export
from deltackpt.files import read_state
from deltackpt.store import open_store
from deltackpt.verify import verify

#: Users and a group that have nothing, whatever they are called here.
READER, OTHER, GROUP = 65534, 65533, 65532
is_root = os.geteuid() == 0
needs_root = pytest.mark.skipif(not is_root, reason="only root can be somebody else")


def state(step: int) -> dict[str, object]:
    return {"w": np.arange(20_000, dtype=np.float32) * step, "frozen": np.arange(5000), "step": step}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can reach; pytest's own are for one user."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)


def filled(store: Path) -> Path:
    """Make everything that there can be in a store."""
    with open_run(store) as run:
        for step in (1, 2, 3):
            run.save(state(step), step=step, metrics={"loss": 1 / step})
        run.pin(3)
        run.fork("other", step=2)
        run.save_async(state(4), step=4).wait()
        run.forget([1])
    gc.collect(open_store(store))
    return store


def modes(store: Path) -> tuple[set[int], set[int]]:
    """Modes of all files, and of all directories."""
    there = [store, *store.rglob("*")]
    found = [(path.is_dir(), stat.S_IMODE(path.lstat().st_mode)) for path in there]
    return {mode for is_dir, mode in found if not is_dir}, {mode for is_dir, mode in found if is_dir}


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o007, 0o022, 0o027, 0o077])
def test_all_that_is_made_has_the_modes_that_the_umask_leaves(place: Path, mask: int):
    with umask(mask):
        store = filled(place / "store")
        exported = export(open_run(store), 3, place / "x.safetensors").path
    assert modes(store) == ({0o666 & ~mask}, {0o777 & ~mask})
    assert stat.S_IMODE(exported.stat().st_mode) == 0o666 & ~mask


def test_what_a_group_shares_stays_the_groups(place: Path):
    """As docs/howto/share.md says: the directory hands its group down, the umask leaves the group rights."""
    store = place / "store"
    store.mkdir()
    if is_root:
        os.chown(store, -1, GROUP)
    store.chmod(0o2770)
    with umask(0o007):
        filled(store)
    assert modes(store) == ({0o660}, {0o2770})
    assert {path.stat().st_gid for path in store.rglob("*")} == {store.stat().st_gid}


def as_user(uid: int, gid: int, work: Callable[[], None], *, mask: int = 0o022) -> None:
    """Do something as another user, in a process of its own."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reads)
            os.umask(mask)
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            work()
        except BaseException:
            os.write(writes, traceback.format_exc().encode()[-4000:])
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as told:
        error = told.read().decode()
    os.waitpid(child, 0)
    assert not error, error


@needs_root
def test_two_users_of_a_group_save_thin_and_collect_in_one_store(place: Path):
    store = place / "store"
    store.mkdir()
    os.chown(store, -1, GROUP)
    store.chmod(0o2770)
    as_user(READER, GROUP, lambda: filled(store) and None, mask=0o007)

    def other() -> None:
        with open_run(store) as run:
            assert run.load(3)["step"] == 3
            run.save(state(5), step=5)
            run.forget([2, 4])
        assert gc.collect(open_store(store)).n_deleted
        assert verify(store, level="decode").clean

    as_user(OTHER, GROUP, other, mask=0o007)
    as_user(READER, GROUP, lambda: delta.save(state(6), store, step=6) and None, mask=0o007)

    def stranger() -> None:
        with pytest.raises(StorageError, match="EACCES"):
            delta.load(store)

    as_user(OTHER, OTHER, stranger)
    assert open_run(store).steps() == [3, 5, 6]


def reading(store: Path, out: Path) -> None:
    """All that can be done with a store without writing to it."""
    with open_run(store, create=False) as run:
        assert run.steps() == [2, 3, 4]
        assert run.pinned() == [3]
        assert np.array_equal(run.load(3)["w"], state(3)["w"])
        assert run.load("latest-good")["step"] == 4
        assert len(run.read(2, "w", slice(5))) == 5
        lazy = run.load(3, lazy=True)["w"]
        assert np.array_equal(lazy[:3], state(3)["w"][:3])
        assert not run.diff(2, 3).is_empty
        assert run.retention() is not None
        for suffix in (".safetensors", ".npz"):
            export(run, 3, out / f"x{suffix}")
            assert "w" in read_state(out / f"x{suffix}")
    for level in ("references", "stored", "decode"):
        assert verify(store, level=level).clean
    into = state(9)
    delta.load(store, step=3, into=into)
    assert into["step"] == 9
    assert np.array_equal(into["w"], state(3)["w"])
    commands = ["ls", "ls --run main", "show", "show --step 2", "diff 2 3", "diff 2 3 --lists", "stats"]
    commands += ["stats --over-time", "info", "verify", "verify --stored", "verify --decode", "gc --dry-run"]
    commands += [f"restore --step 3 -o {out}/y.safetensors", "forget --keep-last 1 --dry-run"]
    for command in commands:
        done = CliRunner().invoke(cli, ["-s", str(store), *command.split(), "--json"])
        assert done.exit_code == 0, (command, done.output, done.exception)
        json.loads(done.stdout)


def writing(store: Path) -> None:
    for use in (
        lambda: delta.save(state(5), store, step=5),
        lambda: open_run(store).forget([2]),
        lambda: open_run(store).pin(2),
        lambda: open_run(store).unpin(3),
        lambda: open_run(store).fork("more", step=2),
        lambda: gc.collect(open_store(store), force=True),
    ):
        with pytest.raises(DeltackptError, match=r"EACCES|EROFS|EPERM"):
            use()


def snapshot(store: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [store, *store.rglob("*")]}


@pytest.fixture
def locked(place: Path) -> Iterator[Path]:
    """A store that may be read and not written to, by whoever is not root."""
    store = filled(place / "store")
    with open_run(store) as run:  # so that gc has something to do
        run.save(state(5), step=5)
        run.forget([5])
    there = [store, *store.rglob("*")]
    for path in there:
        path.chmod(path.stat().st_mode & ~0o222)
    yield store
    for path in there:
        if path.exists():
            path.chmod(path.stat().st_mode | 0o200)


def test_a_reader_without_write_access_can_do_all_but_write(locked: Path, place: Path):
    out, ours = place / "out", place / "ours"
    for path in (out, ours):
        path.mkdir()
    out.chmod(0o777)
    before = snapshot(locked)
    reading(locked, ours)  # imports what it needs: Python may lie where the other user may not look

    def use() -> None:
        reading(locked, out)
        writing(locked)

    if is_root:
        as_user(READER, READER, use)
    else:
        use()
    assert snapshot(locked) == before
    assert len(list(out.iterdir())) == 3


def test_gc_takes_no_run_behind_a_link_for_no_run(tmp_path):
    store = tmp_path / "store"
    delta.save({"w": np.arange(9.0)}, store, step=1)
    (store / "refs/main").rename(tmp_path / "elsewhere")
    for there in ("elsewhere", "nowhere"):  # as of a disk that is not mounted
        (store / "refs/main").symlink_to(tmp_path / there)
        with pytest.raises(StorageError, match="symbolic link"):
            gc.collect(store)
        (store / "refs/main").unlink()
    (tmp_path / "elsewhere").rename(store / "refs/main")
    assert delta.load(store)["w"].tolist() == list(range(9))
