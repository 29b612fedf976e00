"""What stands for a step at a path: what is no marker is none, and no step that one names is saved over."""

import json

import pytest

from deltackpt import open_run, targets
from deltackpt.errors import InvalidInputError, NotFoundError, StorageError
from deltackpt.markers import Marker, Runs, check_options, metadata_of, place_for, stand_in, take_away

GOOD = Marker("/somewhere", "main", 3, "00ff")


def save(runs, name, step, path, value):
    run, overwrite = runs.free(name, step, str(path))
    run.save({"n": value}, step=step, metadata=metadata_of(str(path)), overwrite=overwrite)
    return Marker.of(run, run.commit(step))


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "store", lambda name: {})


def test_it_comes_back_and_a_link_stands_for_what_it_leads_to(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    GOOD.put(path)
    link.symlink_to(path)
    assert Marker.at(path) == Marker.at(link) == Marker.at(path, follow=False) == GOOD
    assert Marker.at(link, follow=False) is None
    take_away(link)
    take_away(link)  # not there: nothing to do
    assert Marker.at(path) == GOOD


def test_a_link_stands_in_only_where_nothing_is_and_for_what_is_there(tmp_path):
    (tmp_path / "b").mkdir()
    path, link = tmp_path / "a", tmp_path / "b" / "link"
    assert not stand_in(link, path)
    GOOD.put(path)
    assert stand_in(link, path)
    assert (Marker.at(link), Marker.at(link, follow=False)) == (GOOD, None)
    assert not stand_in(path, link)
    assert not stand_in(tmp_path / "b" / "no" / "directory", path)
    other = Marker("/", "other", 1, "")
    other.put(link)  # in its place, not through it
    assert (Marker.at(path), Marker.at(link)) == (GOOD, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {**x, "kind": "another"},
        lambda x: {**x, "step": True},
        lambda x: {**x, "step": "3"},
        lambda x: {**x, "run": 3},
        lambda x: {**x, "more": 1},
        lambda x: {k: v for k, v in x.items() if k != "sid"},
        lambda x: [x],
    ],
)
def test_what_is_much_like_a_marker_is_none(tmp_path, change):
    path = tmp_path / "a"
    path.write_text(json.dumps(change(json.loads(GOOD.to_bytes()))))
    assert Marker.at(path) is None


def test_other_files_directories_and_urls_are_none(tmp_path):
    for data in (b"", b"PK\x03\x04", b"[" * 10_000, GOOD.to_bytes()[:-9], GOOD.to_bytes() + b" " * 20_000):
        (tmp_path / "a").write_bytes(data)
        assert Marker.at(tmp_path / "a") is None
    assert Marker.at(tmp_path) is None
    assert Marker.at(tmp_path / "none") is None
    assert Marker.at("s3://bucket/a") is None
    with pytest.raises(InvalidInputError, match="a local directory only"):
        place_for("s3://bucket/a")


def test_a_marker_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a"
    GOOD.put(path)

    def fails(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(targets.os, "fsync", fails)
    with pytest.raises(StorageError, match="No space left"):
        Marker("/", "other", 1, "").put(path)
    assert Marker.at(path) == GOOD
    assert list(tmp_path.iterdir()) == [path]


def test_a_step_is_saved_over_only_if_it_was_saved_for_the_path_and_no_marker_names_it(tmp_path, runs):
    a, b = tmp_path / "a", tmp_path / "b"
    first = save(runs, "main", 1, a, 1)
    assert (first.run, save(runs, "main", 1, a, 2).run) == ("main", "main")  # a kill left the first one
    marker = save(runs, "main", 1, a, 3)
    marker.put(a)
    other = save(runs, "main", 1, b, 4)
    assert other.run == "main-2"
    assert save(runs, "main", 1, a, 5).run == "main-3"
    assert runs.open("main").load(1) == {"n": 3}
    with pytest.raises(NotFoundError, match="saved over it since"):
        first.commit(runs.open("main"))
    runs.forget(first)  # that one is not there any more, and the one that is stays
    assert runs.open("main").steps() == [1]
    runs.forget(marker)
    assert runs.open("main").steps() == []
    with pytest.raises(NotFoundError, match=r"; the marker is of the store /somewhere"):
        GOOD.commit(runs.open("main"))


def test_what_is_pinned_is_not_forgotten_and_that_is_logged(tmp_path, runs, caplog):
    marker = save(runs, "main", 1, tmp_path / "a", 1)
    runs.open("main").pin(1)
    runs.forget(marker)
    assert runs.open("main").steps() == [1]
    assert "run 'main' step 1 is not forgotten" in caplog.text


def test_nothing_is_made_for_a_reader(tmp_path, runs):
    with pytest.raises(NotFoundError):
        runs.open("main")
    assert not (tmp_path / "store").exists()
    runs.open("main", create=True)
    runs.close()
    assert list(runs) == []
    assert open_run(tmp_path / "store").steps() == []


def test_options_that_are_not_about_saves_are_refused():
    check_options("x", {"shadow": 0, "memory_max": 1, "audit_every": 1, "optimize": "time"})
    with pytest.raises(InvalidInputError, match="x: found create, keep, expected options of saves"):
        check_options("x", {"keep": None, "create": True})


@pytest.mark.parametrize("follow", [True, False])
def test_what_the_system_refuses_as_a_path_is_named(follow):
    with pytest.raises(StorageError, match="xxx: File name too long"):
        Marker.at("x" * 9000, follow=follow)
