"""Train a small model, saving as it goes; started again, it goes on from where it was.

    python examples/train.py CHECKPOINTS [N_STEPS]
    torchrun --nproc-per-node 2 examples/train.py CHECKPOINTS [N_STEPS]

Stop it whenever you like: Ctrl-C, kill -9, the power.  The losses that it prints are those of a job that was
never stopped, bit for bit.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from deltackpt import best, last, open_run
from deltackpt.integrations.torch import Batches, Training

SAVE_EVERY = 5


class Waves(Dataset):
    """Sines, and how fast they are."""

    def __len__(self):
        return 300

    def __getitem__(self, i):
        speed = 1 + i / 100
        x = torch.sin(speed * torch.arange(32) / 4)
        return x + 0.1 * torch.randn(32), torch.tensor([speed])  # other noise in each epoch


def train(store, n_steps):
    """Train up to a step, from where the last call of this was stopped."""
    is_distributed = "RANK" in os.environ  # started by torchrun
    if is_distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    if is_distributed:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    data = Waves()
    sampler = DistributedSampler(data) if is_distributed else None
    batches = Batches(DataLoader(data, batch_size=16, shuffle=not is_distributed, sampler=sampler))

    with open_run(store, keep=last(2) | best("loss", 1)) as run:
        training = Training(run, model=model, optimizer=optimizer, scheduler=scheduler, batches=batches)
        step = training.resume() or 0
        while step < n_steps:
            for x, y in batches:
                loss = nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                step += 1
                if not is_distributed or dist.get_rank() == 0:
                    print(f"epoch {batches.epoch} step {step} loss {loss.item():.9g}", flush=True)
                if step % SAVE_EVERY == 0 or step == n_steps:
                    training.save(step, metrics={"loss": loss.item()})
                if step == n_steps:
                    break
    if is_distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60)
