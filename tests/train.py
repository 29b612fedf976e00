"""A real torch training run, saved as it goes: python train.py STORE MODE N_STEPS [--die-at STEP].

Prints one line a step, ``step loss-as-hex``.  Resumes from the latest step of the store.  With --die-at the
process kills itself with SIGKILL in the middle of that step's save, when its packs are there and its
decision is not.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import deltackpt
from deltackpt import delta
from deltackpt.backends.local import LocalBackend

SAVE_EVERY = 5
CONTEXT = 32


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        n = x.shape[1]
        mask = torch.full((n, n), float("-inf")).triu(1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    """A character-level transformer; in mode "adapter" all but a low-rank head is frozen."""

    def __init__(self, mode, width=96, depth=2):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embed.weight  # tied, as in most language models
        self.down, self.up = nn.Linear(width, 8, bias=False), nn.Linear(8, width, bias=False)
        nn.init.zeros_(self.up.weight)
        if mode == "adapter":
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith(("down", "up")))

    def forward(self, ids):
        x = self.embed(ids) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.up(self.down(x)))


def die_in_the_middle_of_a_save():
    create_once = LocalBackend.create_once

    def dying(self, name, data, **kwargs):
        if name.startswith("manifests/"):
            os.kill(os.getpid(), signal.SIGKILL)
        return create_once(self, name, data, **kwargs)

    LocalBackend.create_once = dying


def train(store, mode, n_steps, die_at):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    model = Model(mode)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    step = 0
    try:
        state = delta.load(store)
    except deltackpt.NotFoundError:
        pass
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        step = state["step"]
    while step < n_steps:
        at = torch.randint(0, len(text) - CONTEXT - 1, (8,))
        ids = torch.stack([text[i : i + CONTEXT + 1] for i in at])
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        print(step, loss.item().hex(), flush=True)
        if step % SAVE_EVERY == 0:
            if step == die_at:
                die_in_the_middle_of_a_save()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step,
            }
            delta.save(state, store, step=step, metrics={"loss": loss.item()})


if __name__ == "__main__":
    store, mode, n_steps, *rest = sys.argv[1:]
    train(store, mode, int(n_steps), int(rest[1]) if rest else None)
