"""Training jobs, saved and resumed by `Training`: the losses are those of a job that was never stopped."""

import itertools
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from anystate import Config, Point  # noqa: E402
from commands import environment  # noqa: E402
from jobs import (  # noqa: E402
    N_ITEMS,
    Job,
    Noisy,
    plain,
    resumes_ddp,
    trains_ddp,
)
from ranks import run_ranks  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, WeightedRandomSampler  # noqa: E402

from deltackpt import last, open_run  # noqa: E402
from deltackpt.backends.memory import MemoryBackend  # noqa: E402
from deltackpt.errors import AlreadyExistsError, InvalidInputError, NotFoundError, StorageError  # noqa: E402
from deltackpt.integrations.torch import Batches, Training, rng_state  # noqa: E402
from deltackpt.verify import verify  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "train.py"

#: Runs a script, and dies in its nth save, when the packs are there and the decision is not.
DYING = """
import os, runpy, signal, sys
from deltackpt.backends.local import LocalBackend
nth, create_once = int(sys.argv[1]), LocalBackend.create_once
def dying(self, name, data, **kwargs):
    global nth
    nth -= name.startswith("manifests/")
    if not nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return create_once(self, name, data, **kwargs)
LocalBackend.create_once = dying
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def example(*args, dying=None):
    command = [sys.executable, *(["-c", DYING, str(dying)] if dying else []), str(EXAMPLE), *map(str, args)]
    env = environment(OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_the_example_killed_in_a_save_goes_on_with_the_same_losses(tmp_path):
    whole = example(tmp_path / "whole", 35)
    assert whole.returncode == 0, whole.stderr
    killed = example(tmp_path / "killed", 35, dying=5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert open_run(tmp_path / "killed").latest() == 20

    resumed = example(tmp_path / "killed", 35)

    assert resumed.returncode == 0, resumed.stderr
    lines = whole.stdout.splitlines()
    assert len(lines) == 35
    assert killed.stdout.splitlines() == lines[:25]
    assert resumed.stdout.splitlines() == lines[20:]
    run = open_run(tmp_path / "killed")
    assert run.steps()[-2:] == [30, 35]
    assert len(run) <= 4  # two, the best, and the one it went on from
    assert verify(tmp_path / "killed", level="decode").clean


# -- loaders


def with_generator():
    return plain(generator=torch.Generator().manual_seed(5))


def with_workers():
    return plain(num_workers=2)


def weighted():
    return plain(shuffle=False, sampler=WeightedRandomSampler(torch.arange(1.0, N_ITEMS + 1), N_ITEMS))


def stateful():
    data = pytest.importorskip("torchdata.stateful_dataloader")
    return data.StatefulDataLoader(Noisy(), batch_size=4, shuffle=True)


#: A pass has seven batches.
AT = (1, 4, 7, 9)


@pytest.mark.parametrize("batches", [plain, with_generator, with_workers, weighted, stateful])
def test_resumed_anywhere_in_a_pass_the_losses_are_those_of_a_job_never_stopped(tmp_path, batches):
    job, whole = Job(batches), []
    with open_run(tmp_path) as run:
        training = job.training(run)
        assert training.resume() is None
        for step, loss in zip(range(1, 17), job.losses(), strict=False):
            whole.append(loss)
            if step in AT:
                training.save(step)
    assert len(set(whole)) == 16
    for step in AT if batches is not with_workers else AT[1:2]:
        other = Job(batches, seed=step)
        with open_run(tmp_path) as run:
            assert other.training(run).resume(step) == step
            assert list(itertools.islice(other.losses(), 16 - step)) == whole[step:]
        assert all(map(torch.equal, other.average.parameters(), job.average.parameters()))


def test_between_passes_the_next_one_is_what_it_would_have_been(tmp_path):
    for batches in (plain, with_generator):
        torch.manual_seed(1)
        ours = batches()
        with open_run(tmp_path, batches.__name__) as run:
            training = Training(run, batches=ours)
            list(ours)
            training.save(1)
            expected = torch.stack(list(ours))
            torch.manual_seed(2)
            again = batches()
            Training(run, batches=again).resume()
            assert again.epoch == 1
            assert torch.equal(torch.stack(list(again)), expected)


def test_a_pass_left_early_goes_on_after_a_resume_and_begins_anew_within_a_process():
    ours = plain()
    for n, _ in enumerate(ours, 1):
        if n == 3:
            break
    again = plain()
    again.load_state_dict(ours.state_dict())
    assert len(list(again)) == 4
    assert len(list(ours)) == len(ours) == 7


@pytest.mark.parametrize("options", [{"persistent_workers": True}, {"in_order": False}])
def test_a_loader_that_cannot_be_repeated_is_refused(options):
    with pytest.raises(InvalidInputError, match="cannot be repeated"):
        Batches(DataLoader(Noisy(), num_workers=1, **options))


def test_a_loader_made_otherwise_is_refused():
    state = with_generator().state_dict()
    with pytest.raises(InvalidInputError, match=r"has 0 generators of its own, and had 1"):
        plain().load_state_dict(state)


def test_a_loader_that_has_become_shorter_is_told():
    state = {**plain().state_dict(), "n_given": 8}
    state["rng"] = rng_state()
    again = plain()
    again.load_state_dict(state)
    with pytest.raises(InvalidInputError, match="8 of this pass are behind it, and the loader gives 7"):
        next(iter(again))


def test_a_part_without_any_state_is_a_part_like_others(tmp_path):
    with open_run(tmp_path) as run:
        Training(run, model=nn.GELU(), optimizer=Job().optimizer).save(1)
        assert Training(run, model=nn.GELU(), optimizer=Job().optimizer).resume() == 1


def test_what_has_no_state_is_refused_by_its_name(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(InvalidInputError, match=r"'data' is a plain DataLoader.*data=Batches\(data\)"):
        Training(run, data=DataLoader(Noisy()))
    with pytest.raises(InvalidInputError, match="'model' is a int"):
        Training(run, model=3)
    with pytest.raises(InvalidInputError, match="no part can be called 'training'"):
        Training(run, training=nn.Linear(1, 1))
    with pytest.raises(InvalidInputError, match="found a list, expected a plain DataLoader"):
        Batches([1, 2])


@pytest.mark.parametrize("name", ["a[0]*", "a?", "*", "a["])
def test_a_name_that_is_a_pattern_is_refused_before_anything_is_saved(tmp_path, name):
    with pytest.raises(InvalidInputError, match="no part can be called") as e:
        Training(open_run(tmp_path), **{name: nn.Linear(1, 1)})
    assert "without * ? [" in e.value.hint


def test_a_name_within_another_is_refused_and_any_other_comes_back(tmp_path):
    job = Job()
    for inner, outer in (("model.opt", "model"), ("training.ranks.0", "training")):
        with pytest.raises(InvalidInputError, match=f"'{inner}' is one in '{outer}' by its name"):
            Training(open_run(tmp_path), **{"model": job.model, inner: job.optimizer})
    parts = {
        "a.b": nn.Linear(2, 2),
        "a b-]#2": nn.Linear(2, 2),
        "": nn.Linear(2, 2),
        "model": nn.Linear(2, 2),
    }
    with open_run(tmp_path) as run:
        Training(run, **parts).save(1)
        other = {name: nn.Linear(2, 2) for name in parts}
        Training(run, **other).resume()
    assert all(torch.equal(other[name].weight, part.weight) for name, part in parts.items())


# -- what fits and what does not


class Extra(nn.Module):
    """Has more to say of itself than parameters, as modules in 8-bit floats do."""

    def __init__(self, extra):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("there", [torch.arange(5), torch.arange(0), None, "text", {"amax": [torch.ones(2)]}])
@pytest.mark.parametrize("here", [torch.arange(3), None, {"amax": [torch.ones(3)]}])
def test_the_extra_state_of_a_module_may_change_its_size_and_kind(tmp_path, there, here):
    model, other = nn.Sequential(Extra(there)), nn.Sequential(Extra(here))
    with open_run(tmp_path) as run:
        Training(run, model=model).save(1)
        place = other[0].weight.data_ptr()
        assert Training(run, model=other).resume() == 1
    assert str(other[0].extra) == str(there)
    assert torch.equal(other[0].weight, model[0].weight)
    assert other[0].weight.data_ptr() == place


@pytest.mark.parametrize("kind", [Config, Point])
def test_the_extra_state_of_a_module_may_be_of_the_users_own_classes(tmp_path, kind):
    there, here = (kind([torch.ones(n)], 5) for n in (2, 3))
    model, other = Extra({"of": there}), Extra({"of": here})
    with open_run(tmp_path) as run:
        Training(run, model=model).save(1)
        Training(run, model=other).resume()
    assert str(other.extra) == str(model.extra)


@pytest.mark.parametrize("saved", [5, None, [1], "text"])
def test_a_step_in_which_a_module_is_something_else_is_refused(tmp_path, saved):
    with open_run(tmp_path) as run:
        Training(run, model=Extra(torch.ones(2))).save(1)
        run.save({**run.load(1), "model": saved}, step=2)
        with pytest.raises(InvalidInputError, match="does not match the snapshot"):
            Training(run, model=Extra(torch.ones(2))).resume()


def test_modules_are_loaded_into_the_memory_they_have(tmp_path):
    model, other = nn.Linear(300, 200), nn.Linear(300, 200)
    with open_run(tmp_path) as run:
        Training(run, model=model).save(1)
        places = [p.data_ptr() for p in other.parameters()]
        Training(run, model=other).resume()
    assert [p.data_ptr() for p in other.parameters()] == places
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_what_does_not_fit_is_told_and_nothing_is_changed(tmp_path):
    job, other = Job(), Job(seed=1)
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with open_run(tmp_path) as run:
        job.training(run).save(1)
        with pytest.raises(InvalidInputError, match=r"'extra': is not in the step(?s:.*)strict=False"):
            other.training(run, extra=nn.Linear(1, 1)).resume()
        with pytest.raises(InvalidInputError, match=r"'average': is in the step, and not in the job"):
            Training(run, **{k: v for k, v in vars(other).items() if k != "average"}).resume()
        with pytest.raises(InvalidInputError, match=r"into\['model'\]\['0.weight'\]: found"):
            other.training(run, model=nn.Sequential(nn.Linear(9, 16))).resume()
        assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())
        run.save({"w": torch.ones(2)}, step=2)
        with pytest.raises(InvalidInputError, match="run 'main' step 2: was not saved by Training"):
            other.training(run).resume()
        with pytest.raises(NotFoundError, match="no step 3"):
            other.training(run).resume(3)


def test_what_is_left_as_it_is_on_request_is_logged(tmp_path, caplog):
    with open_run(tmp_path) as run:
        Training(run, model=nn.Sequential(nn.Linear(2, 2)), gone=nn.Linear(1, 1)).save(1)
        model, extra = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)), nn.Linear(1, 1)
        assert Training(run, model=model, extra=extra).resume(strict=False) == 1
        assert torch.equal(model[0].weight, run.load()["model"]["0.weight"])
    assert [record.message for record in caplog.records] == [
        "run 'main' step 1: part 'extra': is not in the step",
        "run 'main' step 1: part 'gone': is in the step, and not in the job",
        "run 'main' step 1: part 'model': '1.weight' is not in the step",
    ]


def test_a_state_that_has_no_plain_form_is_refused_by_its_place(tmp_path):
    class Odd:
        def state_dict(self):
            return {"seen": {1, 2}}

        def load_state_dict(self, state):
            pass

    with open_run(tmp_path) as run:
        with pytest.raises(InvalidInputError, match=r"state\['odd'\]\['seen'\]: found a set"):
            Training(run, odd=Odd()).save(1)
        assert run.steps() == []


# -- in the background


def test_a_background_save_lets_training_go_on_and_keeps_what_the_rules_keep(tmp_path):
    job, whole = Job(), []
    with open_run(tmp_path, keep=last(2)) as run:
        training = job.training(run)
        for step, loss in zip(range(1, 9), job.losses(), strict=False):
            whole.append(loss)
            pending = training.save_async(step) if step <= 4 else None
        assert pending is None
    other = Job(seed=1)
    with open_run(tmp_path) as run:
        assert run.steps() == [3, 4]
        assert other.training(run).resume() == 4
        assert list(itertools.islice(other.losses(), 4)) == whole[4:]


def test_an_error_in_the_background_is_raised_by_the_next_save():
    class Full(MemoryBackend):
        error = None

        def create(self, name):
            if self.error and name.startswith("packs/"):
                raise self.error
            return super().create(name)

    model, disk = nn.Linear(3, 2), Full()
    with open_run(disk) as run:
        training = Training(run, model=model)
        training.save_async(1).wait()
        nn.init.zeros_(model.weight)
        disk.error = StorageError("packs: the disk is full", errno=28)
        training.save_async(2)
        with pytest.raises(StorageError, match="the disk is full"):
            training.save_async(3)
        disk.error = None
        training.save_async(4)
    assert run.steps() == [1, 4]


def test_the_step_that_is_still_being_saved_is_what_is_resumed(monkeypatch):
    class Slow(MemoryBackend):
        is_slow, has_asked = False, threading.Event()

        def create_once(self, name, data, **options):
            if self.is_slow and name.startswith("refs/"):
                self.has_asked.wait(30)
            return super().create_once(name, data, **options)

    model, disk = nn.Linear(3, 2), Slow()
    with open_run(disk) as run:
        training = Training(run, model=model)
        training.save(1)
        disk.is_slow = True
        training.save_async(2)
        close = run.close
        monkeypatch.setattr(run, "close", lambda: (disk.has_asked.set(), close()))
        assert training.resume() == 2


# -- ranks


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """Two ranks train for ten steps and save three; the store, and the losses of each."""
    store = str(tmp_path_factory.mktemp("ddp") / "store")
    return store, run_ranks(2, trains_ddp, store, 10, (2, 3, 5))


def told_of_what_fails_on_one_rank(first, second):
    """It is raised on all: who is left alone would wait for ever."""
    assert first[0] == "DeltackptError: rank 1: RuntimeError: no state today"
    assert second[0] == "RuntimeError: no state today"
    assert first[1].startswith(f"{AlreadyExistsError.__name__}: run 'main' has step 5")
    assert second[1].startswith(f"{AlreadyExistsError.__name__}: rank 0: run 'main' has step 5")
    place = "state['training']['ranks'][1]['loaders']['odd']['collate']"
    assert first[2].startswith(f"InvalidInputError: rank 1: {place}")
    assert second[2].startswith(f"InvalidInputError: {place}")


def test_on_ranks_each_goes_on_with_its_own_numbers_and_data(ddp):
    store, losses = ddp
    assert open_run(store).steps() == [2, 3, 5]
    assert losses[0] != losses[1]
    first, second = run_ranks(2, resumes_ddp, store, 10)
    assert (first[:2], second[:2]) == ((5, losses[0][5:]), (5, losses[1][5:]))
    told_of_what_fails_on_one_rank(first[2], second[2])
    step = open_run(store).load(5)
    assert set(step) == {"model", "optimizer", "scheduler", "scaler", "average", "training"}
    assert "0.weight" in step["model"]  # not of DDP's wrapper: it loads without
    assert set(step["training"]["ranks"]) == {0, 1}


def test_another_number_of_ranks_is_told_and_the_rest_loads_on_request(ddp, caplog):
    store, _ = ddp
    other = Job(seed=1)
    with open_run(store) as run:
        with pytest.raises(InvalidInputError, match="loaders: are of 2 ranks, and this job has 1"):
            other.training(run).resume()
        assert other.training(run).resume(strict=False) == 5
        assert "are of 2 ranks, and this job has 1" in caplog.text
        assert torch.equal(other.model[0].weight, run.load()["model"]["0.weight"])
