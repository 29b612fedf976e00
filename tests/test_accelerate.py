"""What an Accelerator has prepared, saved and resumed: the losses are those of a job never stopped."""

import itertools
import signal
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

import accelerate_job  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DataLoaderConfiguration, DistributedType  # noqa: E402
from accelerate_job import Job, ranks_train, trains  # noqa: E402
from commands import environment  # noqa: E402
from ranks import run_ranks  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from deltackpt import open_run  # noqa: E402
from deltackpt.errors import InvalidInputError  # noqa: E402
from deltackpt.integrations.accelerate import training_of  # noqa: E402
from deltackpt.integrations.torch import Batches  # noqa: E402
from deltackpt.verify import verify  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
N_STEPS = 25  # two passes and a half of ten batches


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of a job that was never stopped, and never saved."""
    return list(itertools.islice(Job().losses(), N_STEPS))


def test_killed_in_a_save_it_goes_on_with_the_same_losses(tmp_path, whole):
    store = tmp_path / "store"
    command = [sys.executable, accelerate_job.__file__, store, str(N_STEPS), "4"]
    env = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert open_run(store).steps() == [8, 10]

    step, found = trains(store, N_STEPS, seed=5)

    assert (step, found) == (10, whole[10:])
    assert len(open_run(store)) == 3  # the last two, and what it went on from
    assert verify(store, level="decode").clean


@pytest.mark.parametrize("at", [4, 10, 14, 20])
def test_resumed_in_a_pass_or_between_two_the_losses_are_the_same(tmp_path, whole, at):
    assert trains(tmp_path, at)[1] == whole[:at]
    with open_run(tmp_path) as run:
        if at not in run:
            job = Job()
            assert list(itertools.islice(job.losses(), at)) == whole[:at]
            training_of(job.accelerator, run, batches=job.batches).save(at)
        state = run.load(at)
    assert set(state) == {"model", "optimizer", "scheduler", "custom", "accelerator", "training"}
    assert trains(tmp_path, N_STEPS, seed=7) == (at, whole[at:])


@pytest.mark.parametrize("at", [4, 14, 20])
def test_a_sampler_with_a_seed_of_its_own_goes_on_with_that(tmp_path, at):
    def job(seed):
        return Job(seed, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))

    ours = job(0)
    losses = ours.losses()
    with open_run(tmp_path) as run:
        list(itertools.islice(losses, at))
        training_of(ours.accelerator, run, batches=ours.batches).save(at)
        expected = list(itertools.islice(losses, N_STEPS - at))
        other = job(5)
        training_of(other.accelerator, run, batches=other.batches).resume()
        with pytest.raises(InvalidInputError, match="0 samplers with a seed of their own, had 1"):
            Batches(DataLoader(torch.ones(4))).load_state_dict(ours.batches.state_dict())
    assert list(itertools.islice(other.losses(), N_STEPS - at)) == expected


def test_each_rank_goes_on_with_its_own_data(tmp_path):
    first, second = run_ranks(2, ranks_train, str(tmp_path), 12, 4)
    for (_, losses), (step, again) in (first, second):
        assert (step, again) == (4, losses[4:])
    assert first[0][1] != second[0][1]


def test_what_cannot_be_gathered_is_refused(tmp_path):
    run = open_run(tmp_path)
    job = Job()
    with pytest.raises(InvalidInputError, match="has prepared no model"):
        training_of(Accelerator(cpu=True), run)
    job.accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(InvalidInputError, match=r"sharded by FSDP.*torch_dcp"):
        training_of(job.accelerator, run)
