"""Words that a shell completes: by click's protocol, and in a real bash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import environment, process

from deltackpt import delta


@pytest.fixture(autouse=True)
def _store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DELTACKPT_STORE", raising=False)
    for run, step in [("main", 100), ("main", 90), ("ablation", 7)]:
        state = {"model": {"w": np.ones(3), "b": np.ones(2)}, f"only_in_{run}": np.ones(1)}
        delta.save(state, "checkpoints", run=run, step=step)


def completed(line: str, **env: str) -> list[str]:
    """What click offers for the last word of a line."""
    words = line.split(" ")
    done = process(
        _DELTACKPT_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1), **env
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [word.partition(",")[2] for word in done.stdout.splitlines() if word]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("deltackpt res", ["restore"]),
        ("deltackpt ls --r", ["--run"]),
        ("deltackpt ls --run ", ["ablation", "main"]),
        ("deltackpt ls --run ab", ["ablation"]),
        ("deltackpt restore --step ", ["latest", "latest-good", "100", "90"]),
        ("deltackpt restore --run ablation --step ", ["latest", "latest-good", "7"]),
        ("deltackpt forget --step 1", ["100"]),
        ("deltackpt restore --keys ", ["model.w", "model.b", "only_in_main"]),
        ("deltackpt restore --run ablation --step 7 --keys o", ["only_in_ablation"]),
        ("deltackpt restore --step latest-good --keys model.w", ["model.w"]),
        ("deltackpt pin ", ["100", "90"]),
        ("deltackpt fork new --step 9", ["90"]),
        ("deltackpt diff ab", ["ablation@latest"]),
        ("deltackpt diff 90 ", ["latest", "latest-good", "100", "90", "ablation@latest", "main@latest"]),
        ("deltackpt diff 90 ablation@", ["ablation@latest", "ablation@latest-good", "ablation@7"]),
        ("deltackpt completion ", ["bash", "zsh", "fish"]),
        # What is not there offers nothing, and says nothing.
        ("deltackpt -s nowhere ls --run ", []),
        ("deltackpt restore --run none --step 9", []),
        ("deltackpt restore --step 8 --keys ", []),
    ],
)
def test_a_word_is_completed_from_commands_options_and_the_store(line, words):
    assert completed(line) == words


def test_the_store_is_found_as_the_commands_find_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert completed("deltackpt ls --run ") == ["ablation", "main"]
    monkeypatch.chdir("/")
    assert completed("deltackpt ls --run ") == []
    assert completed("deltackpt ls --run ", DELTACKPT_STORE=str(tmp_path / "checkpoints")) != []
    assert completed(f"deltackpt -s {tmp_path}/checkpoints ls --run ") == ["ablation", "main"]


def test_names_that_a_shell_would_tear_apart_are_not_offered():
    delta.save({"a\nplain,b": np.ones(1), "c": np.ones(1)}, "checkpoints", step=200)
    assert completed("deltackpt restore --keys ") == ["c"]


def in_bash(tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last word, by the script that the command prints."""
    command = tmp_path / "bin" / "deltackpt"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deltackpt "$@"\n')
    command.chmod(0o755)
    script = """
        eval "$(deltackpt completion bash)" || exit 9
        function=$(complete -p deltackpt | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
        "$function" deltackpt
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{command.parent}:{environment()['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", "deltackpt", *words],
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_with_the_script(tmp_path):
    assert in_bash(tmp_path, "ver") == ["verify"]
    assert in_bash(tmp_path, "restore", "--run", "") == ["ablation", "main"]
    assert in_bash(tmp_path, "restore", "--step", "9") == ["90"]
    assert in_bash(tmp_path, "restore", "--keys", "model.") == ["model.w", "model.b"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_asks_this_command(shell):
    done = process("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_DELTACKPT_COMPLETE={shell}_complete" in done.stdout


def test_an_unknown_shell_is_wrong_usage():
    assert process("completion", "tcsh").returncode == 2
