"""The files of a step put back: all of them, or nothing, whatever a store says of them."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trees import TREE, facts, made

from deltackpt import delta, load_files, open_run, originals, save_files, targets
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import (
    AlreadyExistsError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    StorageError,
    UnsupportedVersionError,
)
from deltackpt.folders import MARK
from deltackpt.manifest import TensorRow

# -- where they are put


def test_a_target_that_is_there_is_replaced_only_when_told(tmp_path):
    root = made(tmp_path / "c", TREE)
    store = MemoryBackend()
    save_files(root, store, step=1)
    for there in ("directory", "file", "link"):
        out = tmp_path / there
        if there == "directory":
            made(out, {"old": b"x"})
        elif there == "file":
            out.write_bytes(b"x")
        else:
            out.symlink_to("c")
        with pytest.raises(AlreadyExistsError, match="is there already") as e:
            load_files(store, out)
        assert ("deletes all that is in this one" in e.value.hint) == (there == "directory")
        load_files(store, out, overwrite=True)
        assert not out.is_symlink()
        assert facts(out) == facts(root)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "directory", "file", "link"]
    with pytest.raises(NotFoundError, match="no such directory"):
        load_files(store, tmp_path / "none" / "out")


def test_a_target_that_no_file_can_have_is_refused(tmp_path):
    store = MemoryBackend()
    save_files(made(tmp_path / "c", {}), store, step=1)
    for name in ("", "..", "a\0b", "a\ud800"):
        with pytest.raises(InvalidInputError, match="is no name of a file or directory"):
            load_files(store, name)
    with pytest.raises(StorageError, match="File name too long"):
        load_files(store, tmp_path / ("n" * 300))
    with pytest.raises(NotFoundError, match="no such directory"):
        load_files(store, tmp_path / ("n" * 300) / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_directory_is_not_replaced_by_a_file(tmp_path):
    file = tmp_path / "step_1.pt"
    file.write_bytes(b"x" * 5000)
    store = MemoryBackend()
    save_files(file, store, step=1)
    runs = made(tmp_path / "runs", {"step_1.pt": b"all there is"})
    before = facts(runs)
    for overwrite in (False, True):
        with pytest.raises(InvalidInputError, match="runs: is a directory, expected a file name"):
            load_files(store, runs, overwrite=overwrite)
    assert facts(runs) == before
    (tmp_path / "link").symlink_to("runs")
    load_files(store, tmp_path / "link", overwrite=True)
    assert facts(tmp_path / "link") == facts(file)


def test_a_state_is_no_files_and_says_so(tmp_path):
    store = MemoryBackend()
    delta.save({"w": np.ones(3)}, store, step=1)
    with pytest.raises(InvalidInputError, match="run 'main' step 1: holds a state and no files"):
        load_files(store, tmp_path / "out")
    assert not originals.is_as_saved(open_run(store), 1, made(tmp_path / "c", {}))


# -- what hostile stores say

FILE = {"path": "f", "kind": "file", "mode": 0o644, "mtime_ns": 0, "key": "f", "gaps": []}
FILE["blake3"] = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"  # of nothing
ROOT = {"path": "", "kind": "directory", "mode": 0o755, "mtime_ns": 0}


def hostile(*entries: Any, files: Any = None, **other: Any) -> dict[str, Any]:
    files = {"f": b""} if files is None else files
    return {MARK: 1, "name": "c", "entries": list(entries), "files": files, **other}


@pytest.mark.parametrize(
    "state",
    [
        *(
            hostile(ROOT, {**FILE, "path": path})
            for path in (
                "../f",
                "/f",
                "a/../f",
                ".",
                "..",
                "a//f",
                "./f",
                "f/",
                "d/f",
                "f\0",
                7,
                None,
                "\ud800",
            )
        ),
        hostile(ROOT, FILE, FILE),
        hostile(ROOT, FILE, {**FILE, "path": "f/g"}),
        hostile(FILE, ROOT),
        hostile(ROOT, ROOT),
        hostile(),
        hostile(ROOT, {"path": "l", "kind": "link", "target": "/tmp"}),
        hostile(ROOT, {"path": "l", "kind": "link", "target": "../x"}),
        hostile(ROOT, {"path": "l", "kind": "link", "target": "f/../../x"}),
        hostile(ROOT, {"path": "l", "kind": "link", "target": ""}),
        hostile(ROOT, {"path": "l", "kind": "link", "target": "a\0"}),
        hostile(ROOT, {"path": "l", "kind": "link", "target": "f"}, {**FILE, "path": "l/f"}),
        hostile({"path": "", "kind": "link", "target": "x"}),
        hostile(ROOT, {**FILE, "kind": "socket"}),
        hostile(ROOT, {**FILE, "key": "g"}),
        hostile(ROOT, {**FILE, "mode": "rwx"}),
        hostile(ROOT, {**FILE, "mtime_ns": 1 << 80}),
        hostile(ROOT, {**FILE, "gaps": [1]}, files={"f": {"rest": b"a", "w": np.ones(3)}}),
        hostile(ROOT, {**FILE, "gaps": [-1, 2]}, files={"f": {"rest": b"a", "w": np.ones(3)}}),
        hostile(ROOT, {**FILE, "gaps": [1, 1]}, files={"f": {"rest": b"a", "w": np.ones(3)}}),
        hostile(ROOT, {**FILE, "gaps": None}),
        hostile(ROOT, FILE, files={"f": 7}),
        hostile(ROOT, FILE, files={"f": {"rest": 7, "w": b""}}),
        hostile(ROOT, FILE, files={"f": np.ones((4, 4)).T}),
        hostile(ROOT, FILE, files={"f": "text" * 5000}),
        hostile(ROOT, FILE, files={"f": b"another"}),
        hostile(ROOT, {**FILE, "blake3": None}),
        hostile(ROOT, FILE, name="../c"),
        hostile(ROOT, FILE, name=7),
        hostile(ROOT, FILE, entries=7),
        hostile(ROOT, FILE, files=7),
        hostile(7, FILE),
    ],
)
def test_what_a_hostile_store_says_of_files_is_refused_and_leaves_nothing(tmp_path, state, monkeypatch):
    store = MemoryBackend()
    delta.save(state, store, step=1)
    monkeypatch.chdir(made(tmp_path / "here", {}))
    for out in (Path("out"), None):
        with pytest.raises(CorruptError):
            load_files(store, out)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["here"]


def test_a_file_of_more_bytes_than_can_be_asked_for_is_refused():
    row = TensorRow("w", "uint8", (1 << 62,), "numpy", 1 << 62, 0, bytes(32), bytes(16))
    with pytest.raises(CorruptError, match="at most"):
        originals._checked_entry({**FILE, "gaps": [0, 0, 0]}, {"f": {"rest": b"", "a": row, "b": row}})


def test_a_strangers_set_uid_is_not_put_back(tmp_path):
    store = MemoryBackend()
    delta.save(hostile(ROOT, {**FILE, "mode": 0o106755}), store, step=1)
    assert stat.S_IMODE((load_files(store, tmp_path / "out") / "f").stat().st_mode) == 0o755


def test_files_written_down_by_a_later_version_say_so(tmp_path):
    store = MemoryBackend()
    delta.save({MARK: 2}, store, step=1)
    with pytest.raises(UnsupportedVersionError, match="version 2, expected 1"):
        load_files(store, tmp_path / "out")


def test_an_error_in_the_middle_leaves_the_old_directory_and_nothing_else(tmp_path, monkeypatch):
    root = made(tmp_path / "c", TREE)
    store = MemoryBackend()
    save_files(root, store, step=1)
    made(tmp_path / "out", {"old": b"x"})
    before = facts(tmp_path / "out")
    real, n = originals._write_file, []

    def failing(path: Path, *args: Any) -> None:
        n.append(path)
        if len(n) == 4:
            raise OSError(28, "No space left on device")
        real(path, *args)

    monkeypatch.setattr(originals, "_write_file", failing)
    with pytest.raises(StorageError, match="No space left") as e:
        load_files(store, tmp_path / "out", overwrite=True)
    assert e.value.is_full
    assert facts(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "out"]


def test_every_cut_of_putting_in_place_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """A kill between any two renames leaves both whole, one of them under a hidden name."""
    store = MemoryBackend()
    save_files(made(tmp_path / "c", TREE), store, step=1)
    old, new = facts(made(tmp_path / "out", {"old": b"x"})), facts(tmp_path / "c")
    real = Path.rename

    class Killed(BaseException):
        pass

    n_renamed = 0

    def rename(path: Path, target: Path) -> Path:
        nonlocal n_renamed
        n_renamed += 1
        if n_renamed == 2:
            raise Killed
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        load_files(store, tmp_path / "out", overwrite=True)
    assert facts(tmp_path / "out") == old
    load_files(store, tmp_path / "out", overwrite=True)
    assert facts(tmp_path / "out") == new


# -- what a kill leaves


def die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(nth: int, real: Any, act: Any) -> Any:
    """A function that does something else before its nth call."""
    calls: list[Any] = []

    def called(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            act(*args)
        return real(*args)

    return called


def forked(store: Any, out: Path, where: Any, name: str, new: Any) -> int:
    """Begin to restore over what is there in another process, with one function of it replaced."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # what is waited for in vain ends by it
        try:
            setattr(where, name, new)
            load_files(store, out, overwrite=True)
        finally:
            os._exit(0)
    return pid


def hidden(directory: Path) -> list[str]:
    return sorted(p.name.rpartition(".")[2] for p in directory.iterdir() if p.name.startswith(".deltackpt-"))


@pytest.mark.parametrize(
    ("where", "name", "new", "left"),
    [
        (originals, "_write_file", at(4, originals._write_file, die), ["tmp"]),
        (Path, "rename", at(2, Path.rename, die), ["old", "tmp"]),
        (targets, "discard", at(1, targets.discard, die), ["old"]),
    ],
    ids=["while it is written", "between the renames", "before the old one is deleted"],
)
def test_what_a_killed_restore_left_goes_with_the_next_to_the_same_target(tmp_path, where, name, new, left):
    store = tmp_path / "store"
    root = made(tmp_path / "c", TREE)
    save_files(root, store, step=1)
    made(tmp_path / "out", {"old": b"x"})
    _, status = os.waitpid(forked(store, tmp_path / "out", where, name, new), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert hidden(tmp_path) == left
    load_files(store, tmp_path / "another")
    assert hidden(tmp_path) == left
    load_files(store, tmp_path / "out", overwrite=True)
    assert hidden(tmp_path) == []
    assert facts(tmp_path / "out") == facts(root)


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    store = tmp_path / "store"
    root = made(tmp_path / "c", TREE)
    save_files(root, store, step=1)
    made(tmp_path / "out", {"old": b"x"})
    ends = [os.pipe(), os.pipe()]

    def waits(*args: Any) -> None:
        os.write(ends[0][1], b"x")
        os.read(ends[1][0], 1)

    pid = forked(store, tmp_path / "out", originals, "_write_file", at(4, originals._write_file, waits))
    os.read(ends[0][0], 1)
    load_files(store, tmp_path / "out", overwrite=True)
    assert hidden(tmp_path) == ["tmp"]
    os.write(ends[1][1], b"x")
    os.waitpid(pid, 0)
    assert hidden(tmp_path) == []
    assert facts(tmp_path / "out") == facts(root)


# -- what is as it was saved


def test_a_directory_is_as_saved_until_something_in_it_changes(tmp_path):
    store = MemoryBackend()
    root = made(tmp_path / "c", TREE)
    save_files(root, store, step=1)
    with open_run(store) as run:
        for by_content in (False, True):
            assert originals.is_as_saved(run, 1, root, by_content=by_content)
            for change in ({"more": b""}, {"link": "deep"}, {"empty": {}}, {"empty": b"x"}):
                other = made(tmp_path / "other", {**TREE, **change})
                # By content, what others put beside it does not count; by time no file of it is the same.
                is_same = by_content and "more" in change
                assert originals.is_as_saved(run, 1, other, by_content=by_content) == is_same
                targets.remove(other)
            assert not originals.is_as_saved(run, 1, tmp_path / "none", by_content=by_content)
        of = (root / "large.bin").stat()
        (root / "large.bin").write_bytes(bytes(of.st_size))
        assert not originals.is_as_saved(run, 1, root)
        os.utime(root / "large.bin", ns=(of.st_atime_ns, of.st_mtime_ns))
        assert originals.is_as_saved(run, 1, root)  # it looks at the time alone
        assert not originals.is_as_saved(run, 1, root, by_content=True)
