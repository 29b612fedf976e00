"""Files and directories as steps: what comes back is what was there, to the byte, or nothing is."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import environment
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import TREE, facts, made, npz

import deltackpt
from deltackpt import delta, load_files, open_run, save_files
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import ConflictError, InvalidInputError, NotFoundError, StorageError
from deltackpt.folders import File, FolderSaver, Found, Stretch

try:
    import torch
except ImportError:
    torch = None

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


def comes_back(path: Path, store: Any, tmp_path: Path, step: int = 1) -> deltackpt.SaveReport:
    """Save a path, put it elsewhere and compare."""
    before = facts(path)
    report = save_files(path, store, step=step)
    out = load_files(store, tmp_path / f"out{step}", step=step)
    assert facts(out) == before == facts(path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".deltackpt")]
    return report


# -- what comes back


def test_a_directory_comes_back_with_names_modes_times_and_links(tmp_path):
    root = made(tmp_path / "checkpoint-7", TREE)
    (root / "config.json").chmod(0o640)
    (root / "large.bin").chmod(0o444)
    (root / "deep" / "er").chmod(0o500)
    (root / os.fsdecode(b"\xff\xfe.bin")).write_bytes(b"no text")
    for path in (root / "deep" / "er", root / "deep", root):
        os.utime(path, ns=(0, 1_500_000_000_987_654_321))
    try:
        comes_back(root, MemoryBackend(), tmp_path)
    finally:
        for path in (root, tmp_path / "out1"):
            (path / "deep" / "er").chmod(0o700)


def test_a_file_comes_back_as_a_file_under_its_name(tmp_path, monkeypatch):
    path = tmp_path / "step_7.npz"
    path.write_bytes(npz())
    path.chmod(0o604)
    comes_back(path, tmp_path / "store", tmp_path)
    monkeypatch.chdir(made(tmp_path / "there", {}))
    assert load_files(tmp_path / "store") == Path("step_7.npz")
    assert facts(Path("step_7.npz")) == facts(path)


def test_the_name_is_the_one_that_was_given_and_not_what_a_link_leads_to(tmp_path, monkeypatch):
    (tmp_path / "blob").write_bytes(npz())
    (tmp_path / "step_7.npz").symlink_to("blob")
    made(tmp_path / "c", {"checkpoint-8": {}})
    monkeypatch.chdir(tmp_path / "c" / "checkpoint-8")
    for path, name in ((tmp_path / "step_7.npz", "step_7.npz"), (".", "checkpoint-8"), ("..", "c")):
        assert Found(Path(path), 7).state["name"] == name


@needs_torch
def test_checkpoints_of_torch_safetensors_and_dcp_come_back_by_sha256(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    import torch.distributed.checkpoint as dcp

    root = made(tmp_path / "all", {"global_step7": {}})
    state = {
        "w": torch.randn(300, 70), "h": torch.randn(999).bfloat16(),
        "f8": torch.ones(500).to(torch.float8_e5m2),
    }  # fmt: skip
    torch.save({"model": state, "step": 7, "rng": torch.get_rng_state()}, root / "state.pt")
    torch.save(state, root / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save(state, root / "global_step7" / "mp_rank_00_model_states.pt")
    safetensors.save_file(state, root / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state, "step": 7}, checkpoint_id=root / "dcp", no_dist=True)
    store = MemoryBackend()
    first = comes_back(root, store, tmp_path)
    # The same tensors are in five files; they are stored once, but for the old format's.
    assert first.new_size < 2.2 * sum(t.nbytes for t in state.values()) + 20_000
    names = [row.name for row in open_run(store).manifest().tensors]
    for name in (
        "files.state.pt.model.w", "files.global_step7/mp_rank_00_model_states.pt.w",
        "files.model.safetensors.h", "files.dcp/__0_0.distcp.2.value",
    ):  # fmt: skip
        assert name in names, names


NAMES = st.text("abc.-_ \n\té\udc80", min_size=1, max_size=8).filter(lambda n: n not in (".", ".."))
KNOWN = [npz(), npz(1), npz(save=np.savez_compressed), b"PK\x03\x04"]
#: Bytes, or some behind what is known.
CONTENT = st.binary(max_size=3000) | st.tuples(st.integers(0, len(KNOWN) - 1), st.binary(max_size=40))
FOLDERS = st.recursive(
    st.dictionaries(NAMES, CONTENT, max_size=4),
    lambda inner: st.dictionaries(NAMES, inner | CONTENT, max_size=3),
)


def spelled(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: spelled(what)
        if isinstance(what, dict)
        else KNOWN[what[0]] + what[1]
        if isinstance(what, tuple)
        else what
        for name, what in tree.items()
    }


@settings(max_examples=40, deadline=None)
@given(FOLDERS, FOLDERS)
def test_any_two_directories_come_back_one_behind_the_other(tmp_path_factory, first, second):
    here = tmp_path_factory.mktemp("any")
    store = MemoryBackend()
    with open_run(store) as run:
        saver = FolderSaver(run)
        for step, tree in enumerate((first, second), 1):
            root = made(here / f"checkpoint-{step}", spelled(tree))
            before = facts(root)
            saver.save(Found(root, step))
            assert facts(root) == before
        for step in (1, 2):
            out = load_files(store, here / "out" if step == 1 else here / "again", step=step)
            assert facts(out) == facts(here / f"checkpoint-{step}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_saves_and_restores_files_too(tmp_path):
    root = made(tmp_path / "c", {"large": bytes(3 << 20)})
    save_files(root, tmp_path / "store", step=1)
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # what is waited for in vain ends by it
        try:
            save_files(root, tmp_path / "store", step=2)
            load_files(tmp_path / "store", tmp_path / "out")
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert facts(tmp_path / "out") == facts(root)


def test_what_is_loaded_is_the_plain_state(tmp_path):
    root = made(tmp_path / "c", {"w.npz": npz(), "small": b"x", "large": bytes(5000)})
    store = MemoryBackend()
    save_files(root, store, step=1)
    found = delta.load(store)
    with np.load(root / "w.npz") as arrays:
        assert found["files"]["w.npz"]["w"].tobytes() == arrays["w"].tobytes()
    assert found["files"]["small"] == b"x"
    assert found["files"]["large"].tobytes() == bytes(5000)
    assert [entry["path"] for entry in found["entries"]] == ["", "large", "small", "w.npz"]


# -- what it takes


def trained(n_steps: int) -> Any:
    """The states of a real training, each a few optimizer steps behind the one before."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        torch.nn.Embedding(500, 64), torch.nn.Linear(64, 256), torch.nn.Linear(256, 500)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(n_steps):
        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(model(torch.arange(64)), torch.arange(64))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}


@needs_torch
def test_a_series_of_pt_files_takes_what_saving_the_states_takes_within_two_percent(tmp_path):
    states, files = MemoryBackend(), MemoryBackend()
    by_api = by_file = 0
    with open_run(states, optimize="bytes") as run, open_run(files) as beside:
        saver = FolderSaver(beside)
        for step, state in trained(6):
            path = tmp_path / f"step_{step}.pt"
            torch.save(state, path)
            by_api += run.save(state, step=step).written_size
            by_file += saver.save(Found(path, step)).written_size
    assert by_file <= 1.02 * by_api
    assert by_api <= 1.02 * by_file
    for step in range(6):
        out = load_files(files, tmp_path / "out", step=step, overwrite=True)
        assert out.read_bytes() == (tmp_path / f"step_{step}.pt").read_bytes()


@needs_torch
@pytest.mark.parametrize("name", ["global_step{}/state.pt", "state.pt", "epoch={}-step={}.ckpt"])
def test_the_next_step_finds_what_it_differs_from_whatever_number_is_in_its_path(tmp_path, name):
    store = MemoryBackend()
    sizes = []
    for step, state in trained(3):
        path = made(tmp_path / f"checkpoint-{step}", {}) / name.format(step, step)
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)
        sizes.append(comes_back(path.parents[len(name.split("/")) - 1], store, tmp_path, step))
    floats = [group for group in sizes[2].groups if group.dtype == "float32"]
    assert all(group.based_size == group.changed_size > 0 for group in floats), sizes[2].table()


def test_what_did_not_change_is_not_stored_again(tmp_path):
    store = MemoryBackend()
    made(tmp_path / "a", TREE)
    made(tmp_path / "b", {**TREE, "config.json": b'{"a": 2}'})
    save_files(tmp_path / "a", store, step=1)
    assert save_files(tmp_path / "b", store, step=2).new_size == 0


# -- what is refused


def test_what_is_neither_file_nor_directory_is_refused_and_not_waited_for(tmp_path):
    root = made(tmp_path / "c", {"a": b"x"})
    os.mkfifo(root / "pipe")
    with pytest.raises(InvalidInputError, match="pipe: is neither a file nor a directory"):
        save_files(root, tmp_path / "store", step=1)
    (root / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(root / "socket"))
        with pytest.raises(InvalidInputError, match="socket: is neither"):
            save_files(root, tmp_path / "store", step=1)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "..", "../x", "deep/../../x", "deep/../a", "deep/er/../../../x"]
)
def test_a_link_that_leads_out_is_refused(tmp_path, target):
    root = made(tmp_path / "c", {"deep": {"er": {}}, "bad": target})
    with pytest.raises(InvalidInputError, match=r"bad: is a link to .*, which leads out"):
        save_files(root, MemoryBackend(), step=1)


@pytest.mark.parametrize("kind", ["path", "link"])
def test_a_path_that_could_not_be_given_back_is_refused(tmp_path, kind):
    """A byte that is no UTF-8 takes three: 1,400 of them are more than stands in a manifest."""
    root = made(tmp_path / "c", {})
    odd = os.fsdecode(b"\xff" * 200)
    if kind == "path":
        root.joinpath(*[odd] * 7).mkdir(parents=True)
    else:
        (root / "link").symlink_to("/".join([odd] * 7))
    with pytest.raises(InvalidInputError, match="takes 4206 bytes, at most 4000 allowed"):
        save_files(root, MemoryBackend(), step=1)


def test_what_is_not_there_is_not_found_and_no_store_is_made(tmp_path):
    with pytest.raises(NotFoundError, match="nothing: no such file or directory"):
        save_files(tmp_path / "nothing", tmp_path / "store", step=1)
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(StorageError, match="round: Too many levels of symbolic links"):
        save_files(tmp_path / "round", tmp_path / "store", step=1)
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_read_is_a_storage_error_that_names_it(tmp_path):
    root = made(tmp_path / "c", {"secret": b"x"})
    (root / "secret").chmod(0)
    with pytest.raises(StorageError, match="secret: Permission denied"):
        save_files(root, MemoryBackend(), step=1)


def change(root: Path, how: str) -> None:
    path = root / "w.npz"
    if how == "written":
        with path.open("r+b") as file:
            file.write(b"X")
    elif how == "grown":
        with path.open("ab") as file:
            file.write(b"X")
    elif how == "replaced":
        (root / "new").write_bytes(path.read_bytes())
        (root / "new").rename(path)
    elif how == "gone":
        path.unlink()
    else:
        (root / "another").write_bytes(b"")


@pytest.mark.parametrize("how", ["written", "grown", "replaced", "gone", "another"])
@pytest.mark.parametrize("has_one", [False, True])
@pytest.mark.parametrize("content", [npz(), b"mapped" * 1_000_000], ids=["read", "mapped"])
def test_what_changes_while_it_is_read_is_refused_and_nothing_is_saved_or_lost(
    tmp_path, how, has_one, content
):
    root = made(tmp_path / "c", {"w.npz": content})
    store = MemoryBackend()
    with open_run(store) as run:
        saver = FolderSaver(run)
        if has_one:
            saver.save(Found(root, 1))
        before = facts(root)
        found = Found(root, 1)
        change(root, how)
        with pytest.raises(ConflictError, match="changed while it was read; nothing is saved"):
            saver.save(found, overwrite=has_one)
        assert run.steps() == [1] * has_one
        if has_one:
            assert facts(load_files(store, tmp_path / "out")) == before
        saver.save(Found(root, 1), overwrite=has_one)  # and it goes on


@pytest.mark.parametrize("place", ["out", "out/in/store"])
def test_what_holds_the_store_is_neither_replaced_nor_saved(tmp_path, place, monkeypatch):
    root = made(tmp_path / "c", TREE)
    save_files(root, tmp_path / place, step=1)
    (tmp_path / "alias").symlink_to("out")
    monkeypatch.chdir(tmp_path)
    before = facts(tmp_path / "out")
    for out in ("out", tmp_path / "out", tmp_path):
        with pytest.raises(InvalidInputError, match="holds the store"):
            load_files(Path("alias") / Path(place).relative_to("out"), out, overwrite=True)
        with pytest.raises(InvalidInputError, match="holds the store"):
            save_files(out, tmp_path / place, step=2)
    assert facts(tmp_path / "out") == before
    assert open_run(tmp_path / place).steps() == [1]


# -- as commands


def test_the_commands_save_show_compare_and_restore_directories(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from deltackpt.cli import cli

    monkeypatch.chdir(tmp_path)
    for step in (10, 20):
        made(
            tmp_path / f"checkpoint-{step}",
            {"w.npz": npz(step), "config.json": b"{}", "state.json": b"%d" % step},
        )

    def ok(*args: str) -> str:
        done = CliRunner().invoke(cli, args)
        assert done.exit_code == 0, done.output
        return done.output

    assert "checkpoint-10: main step 10: " in ok("save", "checkpoint-*")
    assert "files.w.npz.w" in ok("show")
    assert "changed  files.w.npz.w" in ok("diff", "10", "20")
    assert "main" in ok("ls")
    ok("restore", "--step", "10", "-o", "back")
    assert facts(Path("back")) == facts(Path("checkpoint-10"))
    ok("restore", "--keys", "files.w.npz.w", "-o", "w.npz")
    with np.load("w.npz") as some, np.load("checkpoint-20/w.npz") as whole:
        assert some["files.w.npz.w"].tobytes() == whole["w"].tobytes()
    refused = CliRunner().invoke(cli, ["restore", "--step", "20"])
    assert refused.exit_code == 1
    assert "checkpoint-20: is there already" in refused.output
    ok("restore", "--step", "20", "--overwrite")


# -- memory


#: Saves and restores a directory; the memory of its own that it takes for that, in bytes.
MEASURED = """
import sys, threading, time
from pathlib import Path
import numpy as np
import deltackpt

def own():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10

def watched():
    while True:
        most[0] = max(most[0], own())
        time.sleep(0.002)

here = Path(sys.argv[1])
deltackpt.save_files(__import__("os").__file__, here / "warm", step=1)
before = own()
most = [before]
threading.Thread(target=watched, daemon=True).start()
deltackpt.save_files(here / "c", here / "store", step=1)
deltackpt.load_files(here / "store", here / "out")
print(most[0] - before)
"""


@needs_proc
@pytest.mark.parametrize("n_files", [1, 96])
def test_a_directory_larger_than_the_memory_is_saved_and_restored(tmp_path, n_files):
    random = np.random.default_rng(0)
    root = made(tmp_path / "c", {str(i): random.bytes((96 << 20) // n_files) for i in range(n_files)})
    for i in range(n_files):
        np.savez(root / f"{i}.npz", w=random.standard_normal((24 << 20) // n_files, np.float32))
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 20  # of 192 MiB
    assert facts(tmp_path / "out") == facts(root)


def descriptors() -> set[int]:
    """The open files of this process, by number."""
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("how", ["written", "grown", "replaced", "gone"])
@pytest.mark.parametrize("content", [npz(), b"mapped" * 1_000_000], ids=["read", "mapped"])
def test_a_file_that_is_not_what_was_found_any_more_is_not_read(tmp_path, how, content):
    path = made(tmp_path / "c", {"w.npz": content}) / "w.npz"
    found = File.of(path, path.lstat())
    assert found.content().tobytes() == content
    assert found.read(Stretch(3, 5), Stretch(1, 2)).tobytes() == content[3:8] + content[1:3]
    change(tmp_path / "c", how)
    with pytest.raises(ConflictError, match="npz: changed while it was read"):
        found.content()


@needs_proc
def test_of_what_was_found_no_bytes_are_held(tmp_path):
    root = made(tmp_path / "c", {f"{i}.npz": npz(i) for i in range(50)} | {"large": bytes(3 << 20)})
    before = descriptors()
    tracemalloc.start()
    try:
        found = Found(root, 1)
        held_size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.state["files"]) == 51
    assert held_size < 50 * len(npz()) / 2
    assert descriptors() == before


@needs_proc
def test_a_directory_may_have_more_files_than_may_be_open(tmp_path):
    root = made(tmp_path / "c", {})
    for i in range(50):
        with (root / str(i)).open("wb") as file:
            file.truncate((2 << 20) + 1 + i)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = sorted(set(range(before[0])) - descriptors())
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[30], before[1]))
    try:
        comes_back(root, MemoryBackend(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_is_remembered_of_a_file_is_a_copy_which_no_later_write_to_it_changes(tmp_path):
    random = np.random.default_rng(0)
    first = random.standard_normal(1 << 20, np.float32).tobytes()
    root = made(tmp_path / "c", {"w": first})
    with open_run(MemoryBackend()) as run:
        saver = FolderSaver(run)
        saver.save(Found(root, 1))
        with (root / "w").open("r+b") as file:
            file.write(bytes(len(first)))
        row = run.manifest().tensors[0]
        assert saver._saver.shadow.get(row.name, row.root).tobytes() == first
