"""A Trainer on a tiny model: python lightning_job.py STORE DIRECTORY N_EPOCHS WHERE NTH [background]

It kills itself when it is to do for the nth time what WHERE says: write a manifest, which is in the middle of
a save; put down a marker, when the step is there already; or forget a step, when its marker is gone already.
"""

import itertools
import logging
import os
import signal
import sys
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from deltackpt.backends.local import LocalBackend
from deltackpt.integrations.lightning import DeltaCheckpointIO
from deltackpt.markers import Marker
from deltackpt.records import GONE

N_BATCHES = 5


class Tiny(lightning.LightningModule):
    def __init__(self, width=8, extra=None):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.losses = []

    def training_step(self, batch, i):
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x), y)
        self.losses.append(loss.item())
        # Goes up and down, so that the best are not simply the last.
        self.log("score", float((self.trainer.global_step * 7) % 11))
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def data():
    torch.manual_seed(7)
    x = torch.randn(N_BATCHES * 4, 4)
    return DataLoader(list(zip(x, x.sum(1, keepdim=True), strict=True)), batch_size=4)


def trainer(io, n_epochs, *checkpoints, **options):
    return lightning.Trainer(
        **{
            "max_epochs": n_epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "plugins": [io] if io is not None else None,
            "callbacks": list(checkpoints),
            "enable_checkpointing": bool(checkpoints),
            **options,
        }
    )


def top(directory, **options):
    """Keeps the two best and the last."""
    given = {"monitor": "score", "save_top_k": 2, "save_last": True, **options}
    return ModelCheckpoint(directory, **given)


def linked(directory):
    """Keeps the last, and a link to it."""
    return ModelCheckpoint(directory, save_last="link")


def fit(io, n_epochs, *checkpoints, ckpt_path=None, seed=0, **options):
    """Train; the losses of each step, and the trainer."""
    torch.manual_seed(seed)
    model = Tiny()
    ours = trainer(io, n_epochs, *checkpoints, **options)
    ours.fit(model, data(), ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return model.losses, ours


def quiet():
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def die_at(where, nth):
    create_once, put = LocalBackend.create_once, Marker.put
    left = itertools.count(nth - 1, -1)

    def count(is_there):
        if is_there and not next(left):
            os.kill(os.getpid(), signal.SIGKILL)

    def creates(self, name, data, **kwargs):
        count((where == "manifest" and name.startswith("manifests/")) or (where == "forget" and GONE in name))
        return create_once(self, name, data, **kwargs)

    def puts(self, path):
        count(where == "marker")
        return put(self, path)

    LocalBackend.create_once, Marker.put = creates, puts


if __name__ == "__main__":
    store, directory, n_epochs, where, nth, *background = sys.argv[1:]
    quiet()
    die_at(where, int(nth))
    if background:
        fit(DeltaCheckpointIO(store, background=True), int(n_epochs), linked(directory))
    else:
        fit(DeltaCheckpointIO(store), int(n_epochs), top(directory))
