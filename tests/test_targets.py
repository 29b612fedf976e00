"""What is put at a path is there whole, or what was there is as it was."""

import os
from pathlib import Path

import pytest

from deltackpt import targets
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
