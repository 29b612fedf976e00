"""Real torch training, killed in the middle of a save, goes on as if nothing had happened."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deltackpt import delta, gc, open_run, open_store
from deltackpt.verify import verify

torch = pytest.importorskip("torch")
TRAIN = Path(__file__).with_name("train.py")


def train(store, mode, n_steps, *options):
    return subprocess.run(
        [sys.executable, TRAIN, store, mode, str(n_steps), *options],
        capture_output=True,
        text=True,
        check=False,
    )


def losses(run):
    return dict(line.split() for line in run.stdout.splitlines())


@pytest.mark.parametrize("mode", ["adapter", "full"])
def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(tmp_path, mode):
    whole = train(tmp_path / "whole", mode, 20)
    assert whole.returncode == 0, whole.stderr
    killed = train(tmp_path / "killed", mode, 20, "--die-at", "15")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert open_run(tmp_path / "killed").steps() == [5, 10]

    resumed = train(tmp_path / "killed", mode, 20)

    assert resumed.returncode == 0, resumed.stderr
    assert losses(resumed) == {s: x for s, x in losses(whole).items() if int(s) > 10}
    ours, theirs = delta.load(tmp_path / "killed"), delta.load(tmp_path / "whole")
    for name, weight in theirs["model"].items():
        assert torch.equal(ours["model"][name], weight)
    assert ours["model"]["head.weight"] is ours["model"]["embed.weight"]  # tied, as saved
    # What the dead process left is given back at once: its pack, its index, its session.
    assert gc.collect(tmp_path / "killed").waiting_for == []
    assert verify(tmp_path / "killed", level="decode").clean
    assert not open_store(tmp_path / "killed").backend.list("sessions/")


def test_later_steps_of_an_adapter_cost_little_more_than_the_adapter(tmp_path):
    assert train(tmp_path / "s", "adapter", 15).returncode == 0
    state = delta.load(tmp_path / "s")
    tensors = [
        *state["model"].values(),
        *(t for s in state["optimizer"]["state"].values() for t in s.values()),
    ]
    frozen = sum(t.nbytes for name, t in state["model"].items() if not name.startswith(("up", "down")))
    changing = sum(t.nbytes for t in tensors) - frozen + state["rng"].nbytes
    steps = open_store(tmp_path / "s").refs.steps("main")
    assert steps[5].figures.new_size > frozen / 2  # the tied embedding is stored once
    for step in (10, 15):
        assert steps[step].figures.new_size <= changing
