"""A small training job that draws random numbers wherever a real one does; its ranks, over gloo."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from deltackpt import open_run
from deltackpt.integrations.torch import Batches, Training

N_ITEMS, BATCH_SIZE = 28, 4


class Noisy(Dataset):
    """Items that are other each time they are asked for: what augmentation is."""

    def __len__(self):
        return N_ITEMS

    def __getitem__(self, i):
        return torch.full((8,), i / N_ITEMS) + 0.1 * torch.randn(8)


def plain(**options):
    return Batches(DataLoader(Noisy(), batch_size=BATCH_SIZE, **{"shuffle": True, **options}))


class Job:
    """A model, and all that comes with one; `batches` makes the loader."""

    def __init__(self, batches=plain, seed=0, wrap=lambda model: model):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1))
        self.model = wrap(layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=200)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5)
        self.average = torch.optim.swa_utils.AveragedModel(layers)
        self.batches = batches()

    def training(self, run, **others):
        return Training(run, **{**vars(self), **others})

    def losses(self):
        """Train for ever; each loss, after all that it changes."""
        while True:
            for x in self.batches:
                self.optimizer.zero_grad()
                y = self.model(x + random.random() * np.random.rand())
                loss = (y - x.sum(1, keepdim=True)).square().mean()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.scheduler.step()
                self.average.update_parameters(getattr(self.model, "module", self.model))
                yield loss.item()


# -- on ranks


def distributed():
    sampler = DistributedSampler(Noisy(), seed=3)
    return plain(shuffle=False, sampler=sampler)


def ddp_job(rank):
    """A job whose ranks draw other numbers each."""
    job = Job(distributed, 0, nn.parallel.DistributedDataParallel)
    torch.manual_seed(100 + rank)
    return job


def trains_ddp(rank, n, store, n_steps, save_at):
    """Train from nothing, saving some steps in the foreground and the rest in the background."""
    job = ddp_job(rank)
    losses = job.losses()
    found = []
    with open_run(store) as run:
        training = job.training(run)
        for step in range(1, n_steps + 1):
            found.append(next(losses))
            if step == save_at[0]:
                assert training.save(step, metrics={"loss": found[-1]}).step == step
            elif step in save_at:
                assert (training.save_async(step) is None) == (rank > 0)
    return found


def resumes_ddp(rank, n, store, n_steps):
    """Go on from the latest step; the step, the losses from there, and what is told of saves that fail."""
    job = ddp_job(rank + 50)
    with open_run(store) as run:
        training = job.training(run)
        step = training.resume()
        losses = job.losses()
        found = [next(losses) for _ in range(n_steps - step)]
        odd = [job.training(run, odd=part(rank)) for part in (Broken, Unsendable)]
        return step, found, [told(odd[0], 11), told(training, step), told(odd[1], 12)]


class Broken:
    """What one rank cannot tell the state of."""

    def __init__(self, rank):
        self.rank = rank

    def state_dict(self):
        if self.rank == 1:
            raise RuntimeError("no state today")
        return {}

    def load_state_dict(self, state):
        pass


class Unsendable(Broken):
    """A loader whose state on one rank cannot be sent to another."""

    def __iter__(self):
        return iter(())

    def state_dict(self):
        return {"collate": (lambda items: items) if self.rank == 1 else None}


def told(training, step):
    try:
        training.save(step)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
