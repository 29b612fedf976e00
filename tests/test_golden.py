"""Stores written by releases load for ever, and new saves still meet the chunks in them."""

from __future__ import annotations

import json
import operator
import re
import shutil
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import make_golden
import numpy as np
import pytest
from anystate import picture

from deltackpt import codecs, gc
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import CorruptError, InvalidInputError
from deltackpt.format import INDEX_BLOCK_ROWS
from deltackpt.records import GC_RUN, Commit, Fence, Figures, Origin, Slot
from deltackpt.restore import fill
from deltackpt.run import Run
from deltackpt.store import DIRS, Store
from deltackpt.structure import TAGS
from deltackpt.types import DTYPE_SIZES
from deltackpt.verify import verify

try:
    import torch
except ImportError:
    torch = None

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def opened(version: str) -> tuple[Store, dict[str, Any]]:
    expected = json.loads((GOLDEN / version / "expected.json").read_text())
    return Store(LocalBackend(GOLDEN / version / "store")), expected


def plain(value: Any) -> Any:
    """A state as something that compares by bits: arrays as dtype, shape and bytes."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return type(value).__name__, [(repr(k), plain(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [plain(v) for v in value]
    return type(value).__name__, value


@pytest.mark.parametrize("version", VERSIONS)
def test_every_step_of_a_golden_store_comes_back(version: str):
    store, expected = opened(version)
    assert make_golden.describe(store) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_store_verifies(version: str):
    report = verify(LocalBackend(GOLDEN / version / "store"), level="decode")
    assert report.damage == []
    assert report.foreign == []


def test_v1_loads_as_the_states_that_were_saved():
    store, _ = opened("v1")
    run = Run(store, "main")
    assert run.steps() == [1, 3, 5]
    for step, saved_as in [(1, 1), (3, 4), (5, 5)]:
        loaded = run.load(step)
        assert plain(loaded) == plain(make_golden.state(saved_as))
        assert loaded["model"]["tied"] is loaded["model"]["again"]
    assert run.commit(3).metrics == {"loss": 0.25}
    assert (run.commit(1).metadata, run.commit(3).parent) == ({"lr": 3e-4}, 2)


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_v1_loads_torch_tensors():
    store, _ = opened("v1")
    loaded, saved = Run(store, "torch").load(10), make_golden.torch_state()
    assert list(loaded) == list(saved)
    for name, tensor in saved.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        same = [
            x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for x in (loaded[name], tensor)
        ]
        assert same[0] == same[1]


def test_every_golden_store_has_its_writer():
    assert sorted(make_golden.STORES) == VERSIONS


def test_no_golden_store_was_changed():
    noted = dict(line.split("  ")[::-1] for line in make_golden.SUMS.read_text().splitlines())
    found = {
        path: digest for version in VERSIONS for path, digest in make_golden.sums(GOLDEN / version).items()
    }
    assert found == noted, "golden stores are added to, never changed: see tests/golden/README.md"


#: What a store's names say that it holds, as docs/format.md lists them.
KINDS = {
    "the descriptor": r"deltackpt\.json",
    "a pack": r"packs/\w{32}-\d+-\d+\.pack",
    "an index": r"index/\w{32}\.idx",
    "a manifest": r"manifests/\w{32}\.man",
    "a session": r"sessions/\w{32}\.\d+\.\d+\.\d+\.\w+",
    "a decision": r"refs/\w+/\d+\.\d+",
    "a decision of gc's": r"refs/~gc/\d+\.\d+",
    "a tombstone": r"refs/\w+/\d+\.\d+\.gone",
    "a pin": r"refs/\w+/\d+\.pin-\d*[13579]",
    "the end of a pin": r"refs/\w+/\d+\.pin-\d*[02468]",
    "what is condemned": r"gc/condemn-\d+",
    "what is swept": r"gc/sweep-\d+",
    "a chunk in quarantine": r"quarantine/\w{64}",
    "a file set aside": r"quarantine/\w+~.+",
    "a file not published": r"tmp/.+",
}


def test_every_kind_of_file_of_the_format_is_in_some_golden_store():
    names = [
        path.relative_to(GOLDEN / version / "store").as_posix()
        for version in VERSIONS
        for path in (GOLDEN / version / "store").rglob("*")
        if path.is_file()
    ]
    for what, pattern in KINDS.items():
        assert any(re.fullmatch(pattern, name) for name in names), what
    assert all(any(re.fullmatch(pattern, name) for pattern in KINDS.values()) for name in names)
    table = (Path(__file__).parents[1] / "docs/format.md").read_text().partition("| name | content |")[2]
    told = re.findall(r"^\| `(\S+?)` \|", table.partition("\n\n")[0], re.M)
    assert len(told) == 11, (
        "format.md tells of another kind of file: put it into KINDS, and into a golden store"
    )


def test_every_member_of_a_decision_and_every_codec_is_in_some_golden_store():
    commits, codecs_seen, depths, levels = [], set(), set(), set()
    for version in VERSIONS:
        store, expected = opened(version)
        commits += [commit for run in store.refs.runs() for commit in store.refs.commits(run)]
        for segment in store.refresh(complete=True).segments:
            codecs_seen |= set(segment.rows["codec"].tolist())
            depths |= set(segment.rows["depth"].tolist())
        levels |= {
            t["level"] for run in expected.values() for step in run.values() for t in step["tensors"].values()
        }
    assert codecs_seen == set(codecs.NAMES)
    assert max(depths) > 1
    assert levels >= {0, 1, 2}  # of level 3 are tensors of 256 GiB, or of a million chunks
    members = [*(field.name for field in fields(Commit)), *(f"figures.{f.name}" for f in fields(Figures))]
    for member in members:
        assert any(operator.attrgetter(member)(commit) for commit in commits), member
    groups = [group for commit in commits for group in commit.figures.groups]
    assert any(group.codecs and group.based_size for group in groups)
    assert any(len(commit.figures.energy.parts) > 1 for commit in commits if commit.figures.energy)


def test_v1_midway_holds_what_its_readme_says():
    store, _ = opened("v1-midway")
    index = store.refresh(complete=True)
    assert len(index.unlisted) == 1
    assert (
        max(len(store.read_segment(name).rows) for name in store.backend.names("index/")) > INDEX_BLOCK_ROWS
    )
    assert max(len(store.read_segment(name).packs) for name in store.backend.names("index/")) > 1
    assert store.gc_state()[0] == 1
    assert not store.backend.exists("gc/sweep-0")
    assert isinstance(store.refs.decision(Slot(GC_RUN, 0, 1)), Fence)
    assert [name.slot.step for name in store.sessions()] == [10, 9]
    assert Run(store, "main").steps() == [1, 2, 3, 4, 5]
    assert Run(store, "main").commit(4).origin == Origin("elsewhere", 4)
    size = sum(path.stat().st_size for path in (GOLDEN / "v1-midway").rglob("*") if path.is_file())
    assert size < 150_000


def test_v1_midway_goes_on_from_there(tmp_path: Path):
    # With times of their own: of a checkout of an hour ago gc would give all writers up.
    shutil.copytree(GOLDEN / "v1-midway" / "store", tmp_path / "store", copy_function=shutil.copyfile)
    backend = LocalBackend(tmp_path / "store")
    backend.make_dirs(DIRS)
    waiting = gc.collect(Store(backend))
    assert [who.partition(" (")[0] for who in waiting.waiting_for] == ["run main step 9"]
    done = gc.collect(Store(backend), patience_s=0)
    assert [done.n_deleted > 0, len(done.waiting_for)] == [True, 0]
    assert backend.exists("gc/sweep-0")
    assert backend.names("sessions/") == backend.names("tmp/") == []
    store = Store(backend)
    assert not store.refresh(complete=True).unlisted
    for step in (1, 2, 3, 5):
        assert picture(Run(store, "main").load(step)) == picture(make_golden.midway_state(step))
    Run(store, "main").save(make_golden.midway_state(7), step=11)
    assert verify(store, level="decode").clean


def test_v1_delta_holds_what_its_readme_says():
    store, _ = opened("v1-delta")
    rows = np.concatenate([segment.rows for segment in store.refresh(complete=True).segments])
    names = [name for segment in store.refresh().segments for name in segment.packs]
    deltas = rows[rows["depth"] > 0]
    assert set(deltas["codec"].tolist()) == set(codecs.DELTAS)
    assert rows["depth"].max() > 1
    heads = []
    for row in deltas:
        data = store.backend.read(
            names[int(row["pack"])].key, int(row["offset"]) + 96, int(row["stored_size"])
        )
        map_, cast, _, _, offset = struct.unpack_from("<BBBBI", data)
        scale = struct.unpack_from("<f", data, 8)[0] if row["codec"] == 3 else 1.0
        heads.append((int(row["codec"]), map_ & 0x7F, map_ >> 7, cast, offset > 0, scale != 1.0))
    codec, map_, is_bitmap, cast, is_part, is_scaled = map(set, zip(*heads, strict=True))
    assert (codec, map_, cast) == ({3, 4}, {0, 1, 2}, {0, 1, 2, 3})
    assert is_bitmap == {0, 1}
    assert is_part == is_scaled == {False, True}


def test_v1_delta_loads_as_the_states_that_were_saved():
    store, _ = opened("v1-delta")
    for step in (2, 3, 4):
        assert picture(Run(store, "main").load(step)) == picture(make_golden.delta_state(step))
    state = make_golden.delta_state(6)
    moments = {"moment": state["moment"], "first": state["first"]}
    assert picture(Run(store, "branch").load(3)) == picture(moments)


def test_v1_types_load_as_the_states_that_were_saved():
    store, _ = opened("v1-types")
    loaded = Run(store, "main").load(1, allow_pickle=True)
    assert picture(loaded) == picture(make_golden.types_state())
    with pytest.raises(InvalidInputError, match=r"state\['pickled'\]: was pickled"):
        Run(store, "main").load(1)


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_v1_types_load_torch_tensors_as_they_were():
    store, _ = opened("v1-types")
    assert picture(Run(store, "torch").load()) == picture(make_golden.types_torch_state())


def test_v1_types_hold_every_tag_and_dtype_that_v1_lacks():
    tags, dtypes_seen = set(), set()
    for version in ("v1", "v1-types"):
        _, expected = opened(version)
        for step in (step for run in expected.values() for step in run.values()):
            tags |= {tag for tag in TAGS if f'"{tag}": ' in json.dumps(step["structure"])}
            dtypes_seen |= {tensor["dtype"] for tensor in step["tensors"].values()}
    assert tags == set(TAGS)
    assert dtypes_seen == set(DTYPE_SIZES)


def test_v1_holds_what_its_readme_says():
    store, expected = opened("v1")
    rows = np.concatenate([segment.rows for segment in store.refresh(complete=True).segments])
    assert set(rows["codec"].tolist()) == {0, 1, 2}
    tensors = [t for run in expected.values() for step in run.values() for t in step["tensors"].values()]
    assert {t["level"] for t in tensors} == {0, 1, 2}
    assert {t["dtype"] for t in tensors} == set(make_golden.V1_DTYPES)
    decisions = [store.refs.decision(Slot("main", *at)) for at in [(3, 1), (3, 2), (5, 1), (5, 2)]]
    assert [type(d) for d in decisions] == [Commit, Commit, Fence, Commit]
    assert store.gc_state()[0] == 1
    assert store.gc_record("gc/sweep-0").packs == store.gc_record("gc/condemn-0").packs
    size = sum(path.stat().st_size for path in (GOLDEN / "v1").rglob("*") if path.is_file())
    assert size < 150_000


def test_v1_runs_holds_what_its_readme_says():
    store, _ = opened("v1-runs")
    run, branch = Run(store, "main"), Run(store, "branch")
    assert (run.steps(), run.pinned()) == ([1, 3, 4], [1, 3])
    assert {pin.key for pin in store.refs.listing("main").pins} == {
        f"refs/main/{name}" for name in ("1.pin-1", "2.pin-1", "2.pin-2", "3.pin-1")
    }
    assert store.backend.exists("refs/main/3.1.gone")
    assert not store.refs.is_gone(Slot("main", 3, 1))
    assert branch.steps() == [2, 3]
    assert [commit.origin for commit in branch.commits()] == [Origin("main", 2), None]
    assert branch.load(2)["step"] == 2
    assert run.load(3)["w"].tobytes() == make_golden.weights(300, 3).tobytes()
    assert store.gc_state()[0] == 1
    size = sum(path.stat().st_size for path in (GOLDEN / "v1-runs").rglob("*") if path.is_file())
    assert size < 40_000


@pytest.mark.parametrize("version", make_golden.STORES)
def test_a_state_saved_anew_has_the_chunks_and_the_manifest_of_the_golden_store(version: str):
    _, expected = opened(version)
    store = make_golden.make_store(MemoryBackend())
    make_golden.STORES[version](store, with_torch=torch is not None)
    assert make_golden.describe(store).items() <= expected.items()


def test_a_golden_store_goes_on_as_if_written_today(tmp_path: Path):
    shutil.copytree(GOLDEN / "v1" / "store", tmp_path / "store")
    backend = LocalBackend(tmp_path / "store")
    backend.make_dirs(DIRS)  # git keeps no empty directory
    store = Store(backend)
    run = Run(store, "main")
    report = run.save(make_golden.state(5), step=6)
    assert report.new_size == 0
    run.save(make_golden.state(7), step=7)
    run.forget([1, 3, 5, 6])
    gc.collect(store)
    assert verify(store, level="decode").clean
    assert plain(Run(Store(backend), "main").load(7)) == plain(make_golden.state(7))


def test_one_damaged_byte_of_a_golden_pack_is_an_error_and_never_a_guess():
    store, _ = opened("v1")
    memory = MemoryBackend()
    for path in sorted((GOLDEN / "v1" / "store").rglob("*")):
        if path.is_file():
            data = bytearray(path.read_bytes())
            if path.suffix == ".pack":
                data[100::400] = [b ^ 1 for b in data[100::400]]
            memory.create_once(path.relative_to(GOLDEN / "v1" / "store").as_posix(), bytes(data))
    damaged, wrong = Store(memory), 0
    for row in Run(store, "main").manifest(5).tensors:
        good, bad = np.empty(row.size, np.uint8), np.empty(row.size, np.uint8)
        fill(store, [(row, good)])
        try:
            fill(damaged, [(row, bad)])
        except CorruptError:
            wrong += 1
        else:
            assert good.tobytes() == bad.tobytes()
    assert wrong
