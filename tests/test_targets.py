"""What is put at a path is there whole, or what was there is as it was."""

import os
from pathlib import Path

import pytest

from deltackpt import process, targets
from deltackpt.errors import StorageError


def test_a_removal_that_is_cut_short_leaves_no_half_by_the_name_and_is_made_up_for(tmp_path, monkeypatch):
    root = tmp_path / "c"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "a").write_bytes(b"x")
    (root / "deep").chmod(0o500)
    with monkeypatch.context() as patched:
        patched.setattr(targets, "discard", lambda path: None)
        targets.remove(root)
    assert not root.exists()
    assert len(list(tmp_path.iterdir())) == 1
    targets.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_each_directory_that_is_made_is_flushed_into_the_one_above_once_it_is_there(tmp_path, monkeypatch):
    there, flushed, real, mkdir = [tmp_path], [], os.fsync, Path.mkdir

    def fsync(fd):
        number = os.fstat(fd).st_ino
        flushed.extend((p.name, len(list(p.iterdir()))) for p in there if p.stat().st_ino == number)
        real(fd)

    def made(path, **how):
        mkdir(path, **how)
        there.append(path)

    monkeypatch.setattr(Path, "mkdir", made)
    monkeypatch.setattr(os, "fsync", fsync)
    targets.make_directory(tmp_path / "a" / "b" / "c")
    assert flushed == [(tmp_path.name, 1), ("a", 1), ("b", 1)]
    targets.make_directory(tmp_path / "a" / "b" / "c")
    assert len(flushed) == 3  # nothing was made


@pytest.mark.parametrize("path", ["file", "file/a", "dangling", "dangling/a"])
def test_a_directory_that_cannot_be_made_is_a_storage_error_that_names_what_is_in_the_way(tmp_path, path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(StorageError, match=f"/{path.partition('/')[0]}: File exists"):
        targets.make_directory(tmp_path / path)


def test_only_what_a_dead_process_left_of_the_same_target_is_deleted(tmp_path, monkeypatch):
    mine = targets.beside(tmp_path / "a", "tmp")
    with monkeypatch.context() as dead:
        dead.setattr(process, "_start", lambda pid: 7)
        theirs = [targets.beside(tmp_path / name, kind) for name in "ab" for kind in ("tmp", "old", "gone")]
    odd = [tmp_path / ".deltackpt-00ff.tmp", tmp_path / mine.name.replace(process.tag(), "x")]
    for path in (mine, *theirs, *odd):
        path.write_bytes(b"x")
    with targets.replacing(tmp_path / "a") as file:
        file.write(b"new")
        assert not theirs[0].exists()
        assert theirs[1].exists()
    assert {*tmp_path.iterdir()} == {tmp_path / "a", mine, *theirs[2:], *odd}


def test_a_tag_tells_a_process_that_is_dead_and_no_other(monkeypatch):
    me = process.tag()
    assert len(me) < 60
    assert not process.is_dead_by(me)
    host, boot, space, pid, start = me.split("-")
    for tag, is_dead in {
        f"{host}-{boot}-{space}-{pid}-{int(start) + 1}": True,
        f"{host}-00000000-{space}-{pid}-{start}": True,  # the host was started anew
        f"00000000-00000000-{space}-{pid}-{start}": False,  # another host's
        f"{host}-{boot}-00000000-{pid}-{int(start) + 1}": False,  # another container's
        f"{host}--{space}-{pid}-{start}": False,
        "": False,
        "x" + me: False,
    }.items():
        assert process.is_dead_by(tag) == is_dead, tag
    monkeypatch.setattr(process, "_here", lambda: {"host": "h", "boot": "", "pid_ns": ""})
    assert not process.is_dead_by(process.tag())  # a system that does not say
