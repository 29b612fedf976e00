"""An Accelerator on a tiny model: python accelerate_job.py STORE N_STEPS [NTH] dies in its nth save."""

import os
import signal
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader

from deltackpt import last, open_run
from deltackpt.backends.local import LocalBackend
from deltackpt.integrations.accelerate import training_of
from deltackpt.integrations.torch import Batches

SAVE_EVERY = 4  # batches: gradients of two are accumulated, and not saved


class Job:
    """A model that accumulates gradients over two batches, and all that comes with it."""

    def __init__(self, seed=0, **options):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        x = torch.arange(40.0).reshape(20, 2).repeat(1, 2) / 40
        loader = DataLoader(x, batch_size=2, shuffle=True)
        self.model, self.optimizer, self.scheduler, loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        self.batches = Batches(loader)
        self.average = torch.optim.swa_utils.AveragedModel(model)
        self.accelerator.register_for_checkpointing(self.average)

    def losses(self):
        """Train for ever; each loss, after all that it changes."""
        while True:
            for x in self.batches:
                with self.accelerator.accumulate(self.model):
                    loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                    self.average.update_parameters(self.accelerator.unwrap_model(self.model))
                yield loss.item()


def trains(store, n_steps, seed=0):
    """Go on from the latest step; where that was, and the losses from there."""
    job = Job(seed)
    with open_run(store, keep=last(2)) as run:
        training = training_of(job.accelerator, run, batches=job.batches)
        step = training.resume() or 0
        losses = job.losses()
        found = []
        for at in range(step + 1, n_steps + 1):
            found.append(next(losses))
            if at % SAVE_EVERY == 0 or at % 10 == 0:
                training.save(at)
    return step, found


def ranks_train(rank, n, base, n_steps, at):
    """A job that goes on to the end, and one that is begun anew after some steps; the losses of both."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    whole, _ = trains(f"{base}/whole", n_steps), trains(f"{base}/part", at)
    return whole, trains(f"{base}/part", n_steps, seed=3)


def die_in(nth):
    create_once = LocalBackend.create_once

    def dying(self, name, data, **kwargs):
        nonlocal nth
        nth -= name.startswith("manifests/")
        if not nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return create_once(self, name, data, **kwargs)

    LocalBackend.create_once = dying


if __name__ == "__main__":
    torch.set_num_threads(1)
    die_in(int(sys.argv[3]))
    trains(sys.argv[1], int(sys.argv[2]))
