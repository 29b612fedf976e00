"""What is put at a path is there whole, or what was there is as it was."""

from deltackpt import targets


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
