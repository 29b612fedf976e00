"""Every command as its own process: exit code, stdout, stderr; on terminals, in pipes, with nobody there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import environment, on_one_terminal, on_terminal, process, start

from deltackpt import delta, files
from deltackpt.cli import cli

#: One call of every command that succeeds in the store below, and what its text begins with.
CALLS: dict[str, tuple[list[str], str]] = {
    "completion": (["bash"], "_deltackpt_completion() {"),
    "demo": ([], "1. trained"),
    "diff": (["10", "main@latest"], "main step 10 -> main step 30"),
    "fork": (["branch", "--step", "20"], "branch step 20: from main@20, "),
    "forget": (["--step", "10"], "step"),
    "gc": ([], "3 packs: "),
    "import": (["s_40.npz", "--run", "files"], "s_40.npz: files step 40: "),
    "info": ([], "version"),
    "ls": ([], "run "),
    "pin": (["20"], "main step 20: pinned"),
    "repair": ([], "clean: nothing to do"),
    "restore": (["-o", "out.npz"], "out.npz: main step 30, "),
    "save": (["s_40.npz"], "s_40.npz: main step 40: "),
    "show": (["--step", "20"], "tensor"),
    "stats": ([], "3 steps of 1 run: "),
    "verify": (["--decode"], "clean: 3 steps, "),
}
#: Those whose text is what was asked for, not news of what was done.
ANSWERS = {"completion", "diff", "info", "ls", "show", "stats"}


@pytest.fixture(autouse=True)
def _store(tmp_path, monkeypatch):
    """Three steps in ./checkpoints, and files of three more."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    state: dict[str, Any] = {"w": rng.standard_normal((300, 500)).astype(np.float32), "n": np.array(0)}
    for step in (10, 20, 30):
        state["n"] = np.array(step)
        delta.save(state, "checkpoints", step=step, metrics={"loss": 100 / step})
    for step in (40, 50, 60):
        np.savez(f"s_{step}.npz", **(state | {"n": np.array(step)}))


def test_every_command_is_called_here():
    assert CALLS.keys() == cli.commands.keys()


@pytest.mark.parametrize("command", sorted(CALLS))
def test_a_command_exits_0_with_its_text_on_stdout_and_nothing_on_stderr(command):
    args, text = CALLS[command]
    done = process(command, *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(text)
    assert done.stdout.endswith("\n")
    assert "\x1b" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines()) or command == "demo"


@pytest.mark.parametrize("command", sorted(CALLS.keys() - {"completion"}))
def test_json_is_one_document_and_nothing_else_quiet_or_not(command):
    args, _ = CALLS[command]
    done = process("-q", command, *args, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert isinstance(json.loads(done.stdout), dict)
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("command", sorted(CALLS.keys() - {"completion"}))
def test_quiet_leaves_what_was_asked_for(command):
    args, text = CALLS[command]
    done = process(command, *args, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(text) if command in ANSWERS else done.stdout == ""


def test_quiet_still_tells_damage_errors_and_what_would_be_done():
    assert process("-q", "gc", "--dry-run").stdout.startswith("3 packs: ")
    assert "would go" in process("-q", "forget", "--keep-last", 1, "--dry-run").stdout
    assert process("-q", "save", "s_40.npz", "--dry-run").stdout == "s_40.npz: main step 40\n"
    assert process("-q", "restore", "--step", 11).stderr.startswith("error: run 'main' has no step 11")
    pack = max(Path("checkpoints/packs").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(pack, pack.stat().st_size // 2)
    done = process("-q", "verify")
    assert done.returncode == 1
    assert "damaged pack packs/" in done.stdout


@pytest.mark.parametrize("command", sorted(CALLS.keys() - {"completion", "demo", "import", "info", "save"}))
def test_a_missing_store_is_an_error_with_a_hint_on_stderr_alone(command):
    args, _ = CALLS[command]
    done = process("-s", "none", command, *args)
    assert (done.returncode, done.stdout) == (2 if command in ("verify", "repair") else 3, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert error.endswith("none: no deltackpt store here")
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("command", ["ls", "save"])
def test_an_unknown_option_exits_2_with_the_usage_on_stderr(command):
    done = process(command, "--no-such-option")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Usage: deltackpt {command}" in done.stderr
    assert re.search("No such option:? '?--no-such-option", done.stderr)


def test_warnings_go_to_stderr_one_a_line():
    packs = set(Path("checkpoints/packs").iterdir())
    delta.save({"w": np.random.default_rng(9).standard_normal(9000)}, "checkpoints", step=40)
    (new,) = set(Path("checkpoints/packs").iterdir()) - packs
    os.truncate(new, new.stat().st_size // 2)
    done = process("restore", "--step", "latest-good", "-o", "x.npz")
    assert (done.returncode, done.stdout.partition(",")[0]) == (0, "x.npz: main step 30")
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert "run 'main' step 40 is not good" in done.stderr


# -- a series


def test_a_series_is_saved_and_told_line_by_line():
    done = process("save", "s_*.npz")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert [line[: line.index(" written")].rpartition(", ")[0] for line in lines] == [
        f"s_{n}.npz: main step {n}: 600.0 kB in, 8 B new" for n in (40, 50, 60)
    ]
    assert re.fullmatch(
        r"3 steps: 1\.8 MB in files, .* written: [\d.]+ times smaller than every file whole, .*s", last
    )
    assert files.read_state(Path("s_50.npz"))["n"] == delta.load("checkpoints", step=50)["n"]


def test_the_json_of_a_series_has_its_steps_and_their_total():
    delta.save({}, "checkpoints", step=50)
    done = json.loads(process("save", "s_*.npz", "--skip-existing", "--json").stdout)
    assert [(one["path"], one["step"], one["saved"]) for one in done["steps"]] == [
        ("s_40.npz", 40, True), ("s_50.npz", 50, False), ("s_60.npz", 60, True)
    ]  # fmt: skip
    total = done["total"]
    assert (total["n_saved"], total["n_skipped"]) == (2, 1)
    assert total["written_size"] == sum(one["written_size"] for one in done["steps"] if one["saved"])
    assert total["file_size"] == sum(one["file_size"] for one in done["steps"] if one["saved"])


def test_a_series_stops_at_a_step_that_is_there_before_it_saves_any():
    delta.save({}, "checkpoints", step=60)
    done = process("save", "s_*.npz")
    assert (done.returncode, done.stdout) == (1, "")
    assert "run 'main' has step 60 already" in done.stderr
    assert "--skip-existing" in done.stderr
    assert process("save", "s_*.npz", "--overwrite", "-q").returncode == 0
    assert delta.load("checkpoints", step=60)["n"] == 60
    assert [line["step"] for line in json.loads(process("ls", "--json").stdout)["steps"]] == [
        10, 20, 30, 40, 50, 60
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["s_40.npz", "s_50.npz", "--step", "1"], 2, "--step and --metric are of one file, these are 2"),
        (["s_*.npz", "--metric", "loss=1"], 2, "--step and --metric are of one file, these are 2"),
        (["n_*.npz"], 3, "n_*.npz: no such file"),
        (["w.npz"], 2, "has no number that tells its step: w.npz"),
    ],
)
def test_a_series_that_cannot_be_told_is_refused(args, code, told):
    Path("s_60.npz").rename("w.npz")
    done = process("save", *args)
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr


# -- terminals


def test_progress_is_shown_on_a_terminal_and_leaves_nothing():
    done = on_terminal("save", "s_*.npz")
    assert done.returncode == 0
    assert "saving" in done.stderr
    assert "\x1b" not in done.stderr
    assert done.stderr.endswith(" \r")  # blanks over the last of it
    assert len(done.stdout.splitlines()) == 4
    assert on_terminal("-q", "save", "s_*.npz", "--overwrite")[1:] == ("", "")


def test_progress_and_lines_do_not_run_into_each_other():
    code, lines = on_one_terminal("save", "s_*.npz", COLUMNS="60")
    assert code == 0
    assert [line.partition(":")[0] for line in lines] == ["s_40.npz", "s_50.npz", "s_60.npz", "3 steps", ""]
    code, lines = on_one_terminal("save", "s_*.npz")
    assert (code, lines[0]) == (1, "error: run 'main' has steps 40, 50, 60 already")


@pytest.mark.parametrize("command", ["gc", "stats", "verify", "restore", "save"])
def test_every_long_command_says_what_it_is_at(command):
    args, _ = CALLS[command]
    done = on_terminal(command, *args, "--json")
    assert re.search("collecting|adding up|verifying|restoring|saving", done.stderr)
    assert isinstance(json.loads(done.stdout), dict)


def test_heads_are_bold_on_a_terminal_only():
    bold, off = "\x1b[1m", "\x1b[0m"
    shown = on_terminal("ls").stdout
    assert shown.startswith(bold + "run ")
    assert shown.splitlines()[0].endswith("metrics" + off)
    assert shown.count("\x1b") == 2
    assert shown.replace(bold, "").replace(off, "") == process("ls").stdout


@pytest.mark.parametrize("command", sorted(CALLS))
def test_no_escape_code_is_printed_to_whom_wants_no_color(command):
    args, _ = CALLS[command]
    done = on_terminal(command, *args, NO_COLOR="1")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr


def test_a_dumb_terminal_gets_no_escape_code_and_an_empty_no_color_is_none():
    assert "\x1b" not in on_terminal("ls", TERM="dumb").stdout
    assert "\x1b" in on_terminal("ls", NO_COLOR="").stdout


@pytest.mark.parametrize("columns", ["20", "80", "200"])
def test_lines_are_not_folded(columns):
    delta.save({"w" * 150: np.ones(3)}, "checkpoints", step=70, metrics={"m" * 150: 1})
    for command in ("ls", "show"):
        for shown in (process(command, COLUMNS=columns), on_terminal(command, COLUMNS=columns)):
            assert re.search("w{150}|m{150}=1", shown.stdout)


# -- pipes


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_ends_it_quietly(unbuffered):
    for step in range(100, 400):
        delta.save({}, "checkpoints", step=step, metadata={"x": "y" * 1000})
    pipe = subprocess.PIPE
    running = start("ls", "--json", stdout=pipe, stderr=pipe, PYTHONUNBUFFERED=unbuffered)
    assert running.stdout is not None
    assert running.stdout.read(10) == b'{"store": '
    running.stdout.close()
    assert running.stderr is not None
    assert running.stderr.read() == b""
    assert running.wait() == 128 + signal.SIGPIPE
    running.stderr.close()


@pytest.mark.parametrize("command", sorted(CALLS.keys() - {"demo"}))
def test_nobody_at_the_pipe_ends_it_quietly_with_what_it_did_done(command):
    args, _ = CALLS[command]
    read, write = os.pipe()
    os.close(read)
    with start(command, *args, stdout=write, stderr=subprocess.PIPE) as running:
        os.close(write)
        _, stderr = running.communicate()
    assert (running.returncode, stderr) == (128 + signal.SIGPIPE, b"")
    if command == "save":
        assert delta.load("checkpoints", step=40)["n"] == 40


def test_ls_into_head_in_a_shell():
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -m deltackpt ls | head -1', sys.executable],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("run ")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # head may take all of so little


@pytest.mark.parametrize("command", sorted(CALLS.keys() - {"demo"}))
def test_a_closed_stdout_is_no_error(command):
    args, _ = CALLS[command]
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -m deltackpt "$@" >&-', sys.executable, command, *args],
        env=environment(),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_full_disk_below_stdout_exits_6():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with (
        Path("/dev/full").open("wb") as full,
        start("ls", stdout=full.fileno(), stderr=subprocess.PIPE) as it,
    ):
        _, stderr = it.communicate()
    assert it.returncode == 6
    assert stderr.startswith(b"error: output: No space left")


def test_an_interrupt_exits_130_and_leaves_no_step():
    """A signal in the middle of a save of some size, as control-C sends it."""
    np.savez("big_70.npz", w=np.random.default_rng(1).standard_normal(20_000_000))
    running = start("save", "big_70.npz", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in Path("checkpoints/tmp").iterdir()) and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate()
    assert (running.returncode, stdout, stderr) == (130, b"", b"")
    assert process("restore", "--step", 70).returncode == 3
    assert process("verify", "--decode").returncode == 0
