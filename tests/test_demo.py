"""The demo's trainer resumes exactly, and its scenario holds in real processes."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import pytest

from deltackpt import delta
from deltackpt.demo import RUN, Trainer, digest_of, run_demo
from deltackpt.errors import AlreadyExistsError


def train(trainer: Trainer, n_steps: int) -> Trainer:
    for _ in range(n_steps):
        trainer.train_step()
    return trainer


def test_a_trainer_resumed_from_its_state_goes_on_bit_for_bit():
    straight = train(Trainer(), 3)
    state = copy.deepcopy(straight.state())
    resumed = Trainer()
    resumed.load(state)
    assert digest_of(train(resumed, 3).state()) == digest_of(train(straight, 3).state())


def test_the_model_learns():
    losses = train(Trainer(), 30).losses
    assert losses[-1] < losses[0] - 0.5


def test_every_part_of_a_trainers_state_counts_in_its_digest():
    trainer = train(Trainer(), 1)
    digests = {digest_of(trainer.state())}
    for part in (trainer.frozen, trainer.params["out"], trainer.m["chars"], trainer.v["hidden"]):
        part[-1, -1] += 1
        digests.add(digest_of(trainer.state()))
    trainer.rng.random()
    digests.add(digest_of(trainer.state()))
    assert len(digests) == 6


def test_the_scenario_holds(tmp_path):
    shown = []
    result = run_demo(tmp_path / "store", show=shown.append, n_steps=12, save_every=2)
    assert (result.n_saves, result.killed_step, result.resumed_step) == (6, 6, 4)
    assert result.kept_steps == [10, 12]
    assert result.stored_size < result.whole_size
    assert len(shown) == 5
    assert json.loads(json.dumps(asdict(result))) == asdict(result)
    assert delta.load(tmp_path / "store", step="latest", run=RUN)["step"] == 12
    with pytest.raises(AlreadyExistsError, match="has a run 'demo' already"):
        run_demo(tmp_path / "store", show=shown.append)
