"""The command as people and scripts meet it: output, exit codes, and files other libraries read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner, Result

import deltackpt
from deltackpt import delta, files
from deltackpt.cli import cli

COMMANDS = [
    "completion", "demo", "diff", "forget", "fork", "gc", "import", "info", "ls", "pin", "repair", "restore",
    "save", "show", "stats", "verify",
]  # fmt: skip


class Done(NamedTuple):
    """How a process ended."""

    returncode: int
    stdout: str
    stderr: str


def arrays(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "a.w": rng.standard_normal((300, 500)).astype(np.float32),
        "b": rng.integers(0, 9, 5000),
        "empty": np.zeros((0, 3), np.int8),
        "scalar": np.array(2.5),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DELTACKPT_STORE", raising=False)


@pytest.fixture
def store(tmp_path) -> Path:
    """A store with steps 10, 20 and 30 of run main, in its default place."""
    for step in (10, 20, 30):
        delta.save(arrays(step), tmp_path / "checkpoints", step=step, metrics={"loss": 100 / step})
    return tmp_path / "checkpoints"


def call(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def ok(*args: object) -> Any:
    """What a command prints with --json."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def run_it(*args: object, stdout: int, stderr: int, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "deltackpt", *map(str, args)]
    path = str(Path(deltackpt.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": path, **env}
    return subprocess.run(command, env=env, stdout=stdout, stderr=stderr, check=False)


def process(*args: object, **env: str) -> Done:
    """The same command in a process of its own."""
    done = run_it(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **env)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def steps(result: Any) -> list[int]:
    return [line["step"] for line in result["steps"]]


# -- as real processes


def test_a_day_of_commands_in_real_processes(tmp_path):
    np.savez("s.npz", **arrays())
    done = process("save", "s.npz", "--step", 1, "--metric", "loss=2.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("main step 1: ")
    assert process("save", "s.npz", "--step", 2, DELTACKPT_STORE="checkpoints").returncode == 0
    listed = process("ls").stdout.splitlines()
    assert listed[0].split() == ["run", "step", "saved", "in", "written", "ratio", "note", "metrics"]
    assert "loss=2.5" in listed[1]
    assert "a.w     float32  300x500" in process("show", "--step", 1).stdout
    done = process("restore", "-o", "out.npz")
    assert done.stdout.startswith("out.npz: main step 2, ")
    assert same(dict(np.load("s.npz")), files.read_state(Path("out.npz")))
    forgotten = process("forget", "--step", 1).stdout.splitlines()
    assert [line.split() for line in forgotten[1:]] == [
        ["1", "forgotten", "named"],
        ["2", "stays", "not", "named"],
    ]
    assert "freed " in process("gc").stdout
    assert process("verify", "--decode").stdout.startswith("clean: 1 steps, ")
    assert json.loads(process("info", "--json").stdout)["store"]["n_steps"] == 1


def test_an_error_goes_to_stderr_with_its_hint_and_code():
    done = process("ls", "--json")
    assert (done.returncode, done.stdout) == (3, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert error.endswith("checkpoints: no deltackpt store here")
    assert hint.startswith("hint: ")


def test_starting_imports_neither_torch_nor_rich():
    code = "import sys, deltackpt.cli; print({'torch', 'rich'} & sys.modules.keys())"
    path = str(Path(deltackpt.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("command", [["ls"], ["ls", "--json"], ["info"]])
def test_a_broken_pipe_is_quiet(store, command):
    read, write = os.pipe()
    os.close(read)
    done = run_it(*command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


# -- help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Examples:\n    deltackpt {command}" in result.output.replace(
        "deltackpt -s /data/ckpt", "deltackpt"
    )
    assert ("--json" in result.output) == (command != "completion")


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_terminal(command, columns):
    result = CliRunner().invoke(cli, [*command.split(), "--help"], terminal_width=columns)
    assert max(map(len, result.output.splitlines())) <= columns


def test_help_lists_the_commands_in_the_order_of_their_use():
    listed = re.findall(r"^  (\w+)  +\w", call("--help").output.partition("Commands:")[2], re.M)
    assert listed[:4] == ["save", "restore", "import", "ls"]
    assert sorted(listed) == COMMANDS


def test_there_are_these_commands():
    assert sorted(cli.commands) == COMMANDS


@pytest.mark.parametrize(
    "args",
    [
        ["save"],
        ["save", "x.npz", "--step", "1", "--metric", "loss"],
        ["save", "x.npz", "--step", "1", "--metric", "=3"],
        ["restore", "--step", "newest"],
        ["forget"],
        ["forget", "--step", "1", "--keep-last", "1"],
        ["forget", "--keep-last", "0"],
        ["forget", "--keep-best", "loss"],
        ["forget", "--keep-seconds", "0"],
        ["pin"],
        ["pin", "latest"],
        ["fork"],
        ["diff", "1"],
        ["completion", "tcsh"],
        ["gc", "--patience", "-1"],
        ["nothing"],
    ],
)
def test_wrong_usage_exits_2(store, args):
    assert call(*args).exit_code == 2
    assert steps(ok("ls")) == [10, 20, 30]


# -- which store


def test_the_store_is_named_or_in_the_environment_or_here_or_below(tmp_path, store, monkeypatch):
    assert ok("ls")["store"] == str(store)
    monkeypatch.chdir(store)
    assert ok("ls")["store"] == str(store)
    delta.save({}, tmp_path / "other", step=1)
    monkeypatch.setenv("DELTACKPT_STORE", str(tmp_path / "other"))
    assert ok("ls")["store"] == str(tmp_path / "other")
    assert ok("-s", store, "ls")["store"] == str(store)


@pytest.mark.parametrize(
    "args", [["ls"], ["show"], ["restore"], ["gc"], ["forget", "--step", "1"]], ids=lambda args: args[0]
)
def test_a_missing_store_exits_3_and_is_not_made(args):
    assert call(*args).exit_code == 3
    assert not Path("checkpoints").exists()


def test_info_says_that_there_is_no_store():
    assert ok("info")["store"] is None
    assert "none at checkpoints" in call("info").output


# -- save and restore


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("source", [".npz", ".safetensors"])
def test_tensors_come_back_bit_for_bit_in_every_container(source, suffix):
    numpy_io = pytest.importorskip("safetensors.numpy")
    state = arrays()
    if source == ".npz":
        np.savez("in.npz", **state)
    else:
        numpy_io.save_file(state, "in.safetensors")
    ok("save", f"in{source}", "--step", 5)
    if suffix == ".pt":
        torch = pytest.importorskip("torch")
        ok("restore", "-o", "out.pt")
        back = {k: v.numpy() for k, v in torch.load("out.pt", weights_only=True).items()}
    else:
        ok("restore", "-o", f"out{suffix}")
        back = dict(np.load("out.npz")) if suffix == ".npz" else numpy_io.load_file("out.safetensors")
        back.pop("deltackpt.json", None)
    assert same(back, state)


def test_a_torch_state_comes_back_whole_as_pt_and_its_tensors_as_safetensors():
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    state = {
        "w": torch.randn(40, 30).bfloat16(),
        "opt": [{"step": torch.tensor(3.0)}],
        "lr": 0.1,
        "x": "é" * 5000,
    }
    torch.save(state, "in.pt")
    ok("save", "in.pt", "--step", 1)
    done = ok("restore", "-o", "out.pt")
    assert (done["step"], done["file_size"]) == (1, Path("out.pt").stat().st_size)
    back = torch.load("out.pt", weights_only=True)
    assert torch.equal(back["w"].view(torch.int16), state["w"].view(torch.int16))
    assert torch.equal(back["opt"][0]["step"], state["opt"][0]["step"])
    assert (back["lr"], back["x"]) == (0.1, state["x"])
    ok("restore")
    tensors = load_file("main-step-1.safetensors")
    assert torch.equal(tensors["w"].view(torch.int16), state["w"].view(torch.int16))
    assert bytes(tensors["x"].numpy()).decode() == state["x"]


def test_values_that_are_no_tensors_travel_as_json():
    safe_open = pytest.importorskip("safetensors").safe_open
    delta.save({"w": np.ones(3), "lr": 0.5, "b": (1, None)}, "checkpoints", step=7)
    ok("restore", "-o", "x.safetensors")
    with safe_open("x.safetensors", "numpy") as file:
        beside = json.loads(file.metadata()["deltackpt"])
    assert beside == {
        "run": "main",
        "step": 7,
        "structure": {"map": {"w": {"tensor": 0}, "lr": 0.5, "b": {"tuple": [1, None]}}},
        "tensors": {"0": "w"},
    }


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_keys_choose_what_is_restored(suffix):
    pytest.importorskip("torch")
    delta.save({"m": {"a": np.ones(3), "b": np.zeros(2)}, "o": np.ones(9)}, "checkpoints", step=7)
    ok("restore", "--keys", "m.*", "-o", f"x{suffix}")
    ok("-s", "again", "save", f"x{suffix}", "--step", 1)
    assert [t["name"] for t in ok("-s", "again", "show")["tensors"]] == ["m.a", "m.b"]
    result = call("restore", "--keys", "m.c", "-o", "y.npz")
    assert result.exit_code == 3
    assert "'m.a'" in result.stderr


def test_a_restore_in_small_batches_is_the_same(store, monkeypatch):
    monkeypatch.setattr("deltackpt.export._BATCH_SIZE", 1)
    ok("restore", "--step", 20, "-o", "x.npz")
    assert same(files.read_state(Path("x.npz")), arrays(20))


def test_restore_replaces_a_file_only_when_told(store):
    Path("x.npz").write_bytes(b"mine")
    result = call("restore", "-o", "x.npz")
    assert (result.exit_code, Path("x.npz").read_bytes()) == (1, b"mine")
    assert "hint: " in result.stderr
    ok("restore", "-o", "x.npz", "--overwrite")
    assert same(files.read_state(Path("x.npz")), arrays(30))


@pytest.mark.parametrize(("out", "code"), [("x.h5", 2), ("x", 2), ("no/such/x.npz", 3)])
def test_restore_refuses_a_target_it_cannot_write(store, out, code):
    assert call("restore", "-o", out).exit_code == code
    assert os.listdir() == ["checkpoints"]  # noqa: PTH208


def test_what_a_container_cannot_hold_leaves_no_file():
    torch = pytest.importorskip("torch")
    delta.save({"w": torch.ones(3, dtype=torch.bfloat16)}, "checkpoints", step=1)
    result = call("restore", "-o", "x.npz")
    assert result.exit_code == 2
    assert "write .safetensors" in result.stderr
    assert os.listdir() == ["checkpoints"]  # noqa: PTH208


def test_an_unknown_step_exits_3_and_names_the_nearest(store):
    for command in (["restore", "--step", 24], ["show", "--step", 24], ["forget", "--step", 24]):
        result = call(*command)
        assert result.exit_code == 3
        assert "nearest: 20 and 30" in result.stderr
    assert call("forget", "--step", 24, "--dry-run").exit_code == 3
    assert call("ls", "--run", "mian").exit_code == 3
    assert steps(ok("ls")) == [10, 20, 30]


def test_a_step_is_saved_twice_only_when_told(store):
    np.savez("s.npz", **arrays(1))
    assert call("save", "s.npz", "--step", 20).exit_code == 1
    report = ok("save", "s.npz", "--step", 20, "--overwrite", "--metric", "loss=1e-3", "--metric", "a=b=2")
    assert (report["step"], report["logical_size"]) == (20, sum(a.nbytes for a in arrays().values()))
    assert ok("ls")["steps"][1]["metrics"] == {"loss": 1e-3, "a=b": 2.0}


def test_an_object_in_a_pt_file_is_refused_and_no_store_made():
    torch = pytest.importorskip("torch")
    torch.save({"x": Path("x")}, "bad.pt")
    result = call("save", "bad.pt", "--step", 1)
    assert result.exit_code == 2
    assert "bad.pt: " in result.stderr
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "code"), [("none.npz", 3), ("x.h5", 2), ("bad.npz", 5), ("bad.safetensors", 5)]
)
def test_a_file_that_cannot_be_read_is_refused(name, code):
    Path("x.h5").write_bytes(b"")
    Path("bad.npz").write_bytes(b"PK\x03\x04 not")
    Path("bad.safetensors").write_bytes(b"\xff" * 40)
    assert call("save", name, "--step", 1).exit_code == code


def test_a_store_that_cannot_be_made_exits_6():
    np.savez("s.npz", **arrays())
    Path("file").write_bytes(b"")
    result = call("-s", "file/store", "save", "s.npz", "--step", 1)
    assert result.exit_code == 6
    assert "file" in result.stderr


def test_a_read_only_directory_exits_6(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    np.savez("s.npz", **arrays())
    (tmp_path / "ro").mkdir(mode=0o500)
    assert call("-s", "ro/store", "save", "s.npz", "--step", 1).exit_code == 6


def test_a_store_is_not_made_among_other_files(tmp_path):
    np.savez("s.npz", **arrays())
    assert call("-s", ".", "save", "s.npz", "--step", 1).exit_code == 2


# -- damage


def truncate_a_pack(store: Path) -> None:
    pack = max(store.joinpath("packs").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(pack, pack.stat().st_size // 2)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_truncated_pack_fails_the_restore_and_leaves_no_file(tmp_path, suffix):
    pytest.importorskip("torch")
    delta.save(arrays(), "checkpoints", step=1)
    truncate_a_pack(tmp_path / "checkpoints")
    result = call("restore", "-o", f"x{suffix}")
    assert result.exit_code == 5, result.output
    assert "error: run 'main' step 1: " in result.stderr
    assert "/packs/" in result.stderr
    assert os.listdir() == ["checkpoints"]  # noqa: PTH208


def test_a_failed_restore_leaves_the_older_file(tmp_path):
    delta.save(arrays(), "checkpoints", step=1)
    truncate_a_pack(tmp_path / "checkpoints")
    Path("x.npz").write_bytes(b"mine")
    assert call("restore", "-o", "x.npz", "--overwrite").exit_code == 5
    assert Path("x.npz").read_bytes() == b"mine"


def test_verify_exits_1_and_names_the_damage(tmp_path):
    delta.save(arrays(), "checkpoints", step=1)
    assert ok("verify", "--stored")["clean"] is True
    truncate_a_pack(tmp_path / "checkpoints")
    result = call("verify")
    assert result.exit_code == 1
    assert "damaged pack packs/" in result.stdout
    assert "lost: main 1: a.w" in result.stdout
    result = call("verify", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["clean"]) == (1, False)
    assert any(damage["key"].startswith("packs/") for damage in report["damage"])


def test_verify_exits_2_when_it_could_not_check():
    result = call("verify")
    assert result.exit_code == 2
    assert "no deltackpt store here" in result.stderr


def test_repair_exits_1_while_some_of_it_is_damaged_and_0_then(tmp_path):
    delta.save(arrays(), "checkpoints", step=1)
    assert ok("repair")["actions"] == []
    assert call("-s", "checkpoints", "repair").stdout == "clean: nothing to do\n"
    delta.save(arrays(), "other", step=7)
    truncate_a_pack(tmp_path / "checkpoints")
    told = call("repair", "--dry-run")
    assert told.exit_code == 1
    assert "rewrite packs/" in told.stdout
    assert "lost: main 1: a.w" in told.stdout
    result = call("repair")
    assert result.exit_code == 1
    assert "damaged still: " in result.stdout.splitlines()[-1]
    assert call("-q", "repair", "--from", "other").stdout == ""
    assert ok("verify", "--decode")["clean"] is True


def test_repair_exits_2_when_it_could_not(tmp_path):
    result = call("repair")
    assert result.exit_code == 2
    assert "no deltackpt store here" in result.stderr
    delta.save(arrays(), "checkpoints", step=1)
    assert call("repair", "--from", tmp_path).exit_code == 2
    assert call("repair", "--from", "checkpoints").exit_code == 2


def test_foreign_files_in_the_store_disturb_no_command(store):
    (store / "notes").mkdir()
    for place in (
        "notes/x",
        "README",
        "packs/x",
        "packs/x.pack",
        "refs/main/x",
        "sessions/x",
        "gc/x",
        "refs/x",
    ):
        (store / place).write_text("mine")
    np.savez("s.npz", **arrays(1))
    ok("save", "s.npz", "--step", 40)
    assert steps(ok("ls")) == [10, 20, 30, 40]
    ok("show")
    ok("restore", "-o", "x.npz")
    ok("forget", "--step", 10)
    ok("gc")
    assert ok("verify", "--decode")["clean"] is True
    assert ok("info")["store"]["n_runs"] == 1
    assert (store / "README").read_text() == (store / "packs/x.pack").read_text() == "mine"
    assert same(files.read_state(Path("x.npz")), arrays(1))


# -- listing


def test_ls_gives_figures_of_every_run(store):
    delta.save({"w": np.zeros(10)}, store, step=1, run="other", metadata={"note": "x"})
    lines = ok("ls")["steps"]
    assert [(line["run"], line["step"]) for line in lines] == [
        ("main", 10),
        ("main", 20),
        ("main", 30),
        ("other", 1),
    ]
    assert lines[3]["logical_size"] == 80
    assert lines[3]["metadata"] == {"note": "x"}
    assert steps(ok("ls", "--run", "other")) == [1]
    assert lines[0]["ratio"] == lines[0]["written_size"] / lines[0]["logical_size"]


def test_ls_of_an_empty_store_says_so(tmp_path):
    deltackpt.open_store(tmp_path / "checkpoints", create=True)
    assert ok("ls")["steps"] == []
    assert "no steps" in call("ls").output


def test_show_gives_tensors_chunks_record_and_structure(store):
    found = ok("show", "--step", 20)
    assert [(t["name"], t["dtype"], t["shape"]) for t in found["tensors"][:2]] == [
        ("a.w", "float32", [300, 500]),
        ("b", "int64", [5000]),
    ]
    assert [t["n_chunks"] for t in found["tensors"]][1:] == [1, 0, 1]
    assert found["structure"]["map"]["a.w"] == {"tensor": 0}
    assert found["commit"]["metrics"] == {"loss": 5.0}
    assert (store / found["commit"]["manifest_key"]).is_file()
    energy = found["commit"]["figures"]["energy"]
    assert energy["joules"] == pytest.approx(sum(energy["parts"].values()), abs=1e-5)
    assert energy["joules"] > 0
    assert energy["method"].startswith(("measured: ", "estimated: "))


def test_names_cannot_command_the_terminal():
    delta.save({"\x1b[31m[bold]x": np.zeros(1)}, "checkpoints", step=1, metrics={"\x1b]0;": 1})
    for command in ("show", "ls"):
        assert "\x1b" not in call(command).output
    assert "\\x1b[31m[bold]x" in call("show").output


def test_a_row_is_a_line_and_columns_stand_below_each_other_whatever_the_names():
    delta.save(
        {"two\nlines": np.zeros(1), "重み": np.zeros(1), "e\u0301": np.zeros(1)}, "checkpoints", step=1
    )
    tensors, groups = call("show").stdout.split("\n\n")
    assert groups.startswith(
        "group    dtype      in  changed  stored      same           raw\n"
        "weights  float64  24 B      8 B     8 B  16 B (2)  8 B (1) 1.00\n"
        "energy: "
    )
    assert tensors == (
        "tensor      dtype    shape  size  chunks\n"
        "two\\nlines  float64  1       8 B       1\n"
        "重み        float64  1       8 B       1\n"
        "e\u0301           float64  1       8 B       1"
    )


# -- forget and gc


def test_forget_by_rules_says_why_each_step_stays_or_goes(store):
    args = ["forget", "--keep-last", 1, "--keep-best", "loss:1:max"]
    expected = [
        {"step": 10, "stays": True, "why": "highest loss, 1 of 1"},
        {"step": 20, "stays": False, "why": "no rule keeps it"},
        {"step": 30, "stays": True, "why": "latest; last 1"},
    ]
    assert ok(*args, "--dry-run") == {"run": "main", "dry_run": True, "steps": expected}
    assert steps(ok("ls")) == [10, 20, 30]
    assert ok(*args)["steps"] == expected
    assert steps(ok("ls")) == [10, 30]


def test_forget_keeps_what_is_named_and_what_is_seconds_apart(store):
    decided = ok("forget", "--keep-seconds", 1e6, "--keep-step", 20, "--dry-run")["steps"]
    assert [(line["step"], line["why"]) for line in decided] == [
        (10, "1e+06 s apart"), (20, "named"), (30, "latest")
    ]  # fmt: skip
    assert [line["stays"] for line in ok("forget", "--keep-step", 20)["steps"]] == [False, True, True]
    assert steps(ok("ls")) == [20, 30]


def test_a_step_to_keep_that_is_not_there_forgets_nothing(store):
    result = call("forget", "--keep-step", 25)
    assert result.exit_code == 3
    assert "nearest: 20 and 30" in result.stderr
    assert steps(ok("ls")) == [10, 20, 30]


def test_a_pinned_step_stays_until_it_is_unpinned(store):
    np.savez("s.npz", **arrays(1))
    assert ok("pin", 10) == {"run": "main", "step": 10, "pinned": True, "all_pinned": [10]}
    assert call("pin", 10).stdout == "main step 10: pinned\n"
    assert [line["pinned"] for line in ok("ls")["steps"]] == [True, False, False]
    assert call("ls").output.splitlines()[1].split()[-2:] == ["pinned", "loss=10"]
    for refused in (["forget", "--step", 10], ["save", "s.npz", "--step", 10, "--overwrite"]):
        result = call(*refused)
        assert (result.exit_code, "is pinned" in result.stderr) == (2, True)
    kept = ok("forget", "--keep-last", 1)["steps"]
    assert [(line["step"], line["why"]) for line in kept if line["stays"]] == [
        (10, "pinned"),
        (30, "latest; last 1"),
    ]
    assert ok("pin", 10, "--undo") == {"run": "main", "step": 10, "pinned": False, "all_pinned": []}
    ok("forget", "--step", 10)
    assert steps(ok("ls")) == [30]
    assert call("pin", 11).exit_code == 3


def test_a_fork_is_a_run_of_its_own_that_says_where_it_came_from(store):
    line = ok("fork", "branch", "--step", 20)
    assert (line["run"], line["step"], line["origin"]) == ("branch", 20, {"run": "main", "step": 20})
    assert line["written_size"] < 2000
    assert "from main@20" in call("ls", "--run", "branch").output
    ok("forget", "--step", 20)
    ok("gc")
    ok("restore", "--run", "branch", "-o", "x.npz")
    assert same(files.read_state(Path("x.npz")), arrays(20))
    assert call("fork", "branch").exit_code == 1
    assert call("fork", "no such name").exit_code == 2
    assert call("fork", "b", "--step", 20).exit_code == 3


def test_diff_compares_steps_of_one_run_or_of_two(store):
    delta.save(arrays(10) | {"lr": 0.1}, store, step=5, run="other")
    found = ok("diff", 10, "latest")
    assert (found["old"], found["new"]) == ("main step 10", "main step 30")
    assert {t["name"]: t["fate"] for t in found["tensors"]} == {
        "a.w": "changed", "b": "changed", "empty": "same", "scalar": "same"
    }  # fmt: skip
    assert ok("diff", 10, "main@10")["is_empty"] is True
    moved = next(t for t in found["tensors"] if t["name"] == "b")["distance"]
    assert moved["n_differing"] > 0
    assert 0 < moved["byte_share"] <= 1
    assert all(t["distance"] is None for t in ok("diff", 10, "latest", "--lists")["tensors"])
    across = ok("diff", "main@10", "other@latest")
    assert [value["name"] for value in across["values"]] == ["lr"]
    assert ok("diff", "5", "main@10", "--run", "other")["old"] == "other step 5"
    assert call("diff", 10, "other@7").exit_code == 3
    for wrong in ("other", "@5", "other@x"):
        assert call("diff", 10, wrong).exit_code == 2


def test_latest_good_passes_over_a_damaged_step(store):
    np.savez("s.npz", **arrays(30))
    packs = set((store / "packs").iterdir())
    delta.save(arrays(40), store, step=40)
    (new,) = set((store / "packs").iterdir()) - packs
    os.truncate(new, new.stat().st_size // 2)
    assert call("restore", "-o", "x.npz").exit_code == 5
    assert ok("restore", "--step", "latest-good", "-o", "x.npz")["step"] == 30
    assert same(files.read_state(Path("x.npz")), arrays(30))
    assert ok("show", "--step", "latest-good")["step"] == 30
    assert ok("fork", "good", "--step", "latest-good")["step"] == 30


def test_a_misspelt_metric_forgets_nothing(store):
    result = call("forget", "--keep-best", "los:1")
    assert result.exit_code == 3
    assert "there are 'loss'" in result.stderr
    assert steps(ok("ls")) == [10, 20, 30]


def test_every_step_can_be_forgotten_by_name_and_gc_frees_it(store):
    ok("forget", "--step", 10, "--step", 20, "--step", 30)
    assert steps(ok("ls")) == []
    assert call("forget", "--keep-last", 1).exit_code == 3
    would = ok("gc", "--dry-run")
    assert (would["n_dead"], would["freed_size"]) == (3, 0)
    assert "3 to delete" in call("gc", "--dry-run").output
    freed = ok("gc", "--patience", 60)
    assert freed["freed_size"] >= would["dead_size"] > 0
    assert ok("info")["store"]["n_packs"] == 0


def test_gc_says_what_it_waits_for(store):
    from deltackpt.session import Session

    opened = deltackpt.open_store(store)
    with Session(opened, "main", 40, overwrite=False):
        ok("forget", "--step", 10)
        result = call("gc")
        assert result.exit_code == 0
        assert f"waiting for: run main step 40 (process {os.getpid()}" in result.stdout
        assert ok("gc")["freed_size"] == 0
    assert ok("gc")["freed_size"] > 0


# -- the unforeseen


def test_an_interrupt_exits_130_quietly(store, monkeypatch):
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deltackpt.delta.save", interrupted)
    np.savez("s.npz", **arrays())
    result = call("save", "s.npz", "--step", 1)
    assert (result.exit_code, result.output) == (130, "")


def test_an_unforeseen_error_keeps_its_traceback(store, monkeypatch):
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("deltackpt.overview.commits", broken)
    assert isinstance(call("ls").exception, ZeroDivisionError)


def test_progress_is_shown_on_a_terminal_only(store):
    pty = pytest.importorskip("pty")
    assert process("restore", "-o", "x.npz").stderr == ""
    ours, theirs = pty.openpty()
    done = run_it("restore", "-o", "y.npz", "--json", stdout=subprocess.PIPE, stderr=theirs, TERM="xterm")
    os.close(theirs)
    assert b"restoring" in os.read(ours, 1 << 16)
    assert json.loads(done.stdout)["path"] == "y.npz"
    os.close(ours)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


def test_a_step_whose_record_is_damaged_can_be_given_up_as_its_error_says(store):
    damage(store / "refs" / "main" / "20.1")
    refused = call("ls")
    assert refused.exit_code == 5
    assert "`deltackpt forget --run main --step 20` gives the step up" in refused.output
    assert "refs/main/20.1" in call("info").stdout
    ok("forget", "--step", 20)
    assert steps(ok("ls")) == [10, 30]
    ok("gc")


def test_a_dry_run_refuses_what_the_real_one_would(store):
    ok("pin", 20)
    for more in ([], ["--dry-run"]):
        done = call("forget", "--step", 20, *more)
        assert done.exit_code == 2
        assert "deltackpt pin 20 --run main --undo" in done.output


def test_flags_that_exclude_each_other_are_told_and_those_that_include_do(store):
    np.savez("a.npz", **arrays())
    assert call("save", "a.npz", "--step", 10, "--overwrite", "--skip-existing").exit_code == 2
    assert ok("verify", "--decode", "--stored")["level"] == "decode"


def test_a_series_with_a_pinned_step_is_refused_before_the_first_is_overwritten(store):
    for step in (10, 20, 30):
        np.savez(f"step_{step}.npz", **arrays(7))
    ok("pin", 20)
    done = call("save", "step_*.npz", "--overwrite")
    assert done.exit_code == 2
    assert "run 'main' step 20 is pinned" in done.output
    assert same(delta.load(store, step=10), arrays(10))


def test_a_folder_of_checkpoints_is_imported_and_restored_and_can_be_gone_on_with(tmp_path):
    Path("runs").mkdir()
    for step in (10, 20):
        np.savez(f"runs/step_{step}.npz", **arrays(step))
    dry = ok("-s", "new", "import", "runs", "--dry-run")
    assert [one["step"] for one in dry["steps"]] == [10, 20]
    assert not Path("new").exists()
    assert ok("-s", "new", "import", "runs")["total"]["n_saved"] == 2
    np.savez("runs/step_30.npz", **arrays(20))
    assert call("-s", "new", "import", "runs").exit_code == 1
    done = call("-s", "new", "import", "runs", "--skip-existing")
    assert done.output.splitlines()[-1].startswith("1 step, 2 there already: ")
    assert ok("-s", "new", "restore", "--step", "30", "-o", "back.npz")["file_size"] > 0
    assert Path("back.npz").read_bytes() == Path("runs/step_30.npz").read_bytes()
    assert call("-s", "new", "import", "nothing").exit_code == 3


def test_a_name_with_a_new_line_makes_no_line_of_its_own(store):
    for step in (1, 2):
        delta.save({"w\nchanged  fake": np.full(3, step)}, store, step=step, run="odd")
    told = call("diff", "--run", "odd", 1, 2).stdout
    assert "w\\nchanged  fake" in told
    assert "\nchanged  fake" not in told


def test_what_cannot_be_saved_makes_no_store():
    np.savez("a.npz", **arrays())
    assert call("-s", "new", "save", "a.npz", "--step", 1, "--metric", "loss=nan").exit_code == 2
    assert call("-s", "new", "save", "a.npz", "--step=-1").exit_code == 2
    assert not Path("new").exists()


def test_an_output_that_cannot_be_written_is_told_at_once(store):
    Path("dir.npz").mkdir()
    for out, says in (("dir.npz", "is a directory"), ("x" * 300 + ".npz", "File name too long")):
        done = call("restore", "-o", out)
        assert done.exit_code == 2
        assert says in done.output
