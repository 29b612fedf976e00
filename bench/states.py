"""Training states as checkpoints see them: series of saves from real training, and their cache on disk.

Owns   the regimes: which model is trained how, and when it is saved; the trainer's loop.
Never  measures anything, and knows no tool that saves.

    python bench/states.py [--size small] [--regimes finetune zipf] [--seed 0] [--cache DIR]

trains what is not in the cache yet and prints what each series is as JSON. The same seed, size, machine
and torch make the same bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from cache import Save, Series, cached, default_cache
from models import Gpt, Words, add_adapters, cbow_loss, text_bytes, text_words
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

N_AROUND = 2  # words on each side
N_NEGATIVES = 5


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything.

    Parameters
    ----------
    state_size : int
        About the bytes of one state.
    width : int
        Of the GPTs; their depth follows from `state_size`.
    n_pretrain, n_warm : int
        Steps before a base is a base, and before the first save of a new optimizer.
    n_saves : int
    batch, context : int
        Sequences a step, and their length.
    text_size, n_words : int
    """

    state_size: int
    width: int
    n_pretrain: int
    n_warm: int
    n_saves: int
    batch: int
    context: int
    text_size: int
    n_words: int


SIZES = {
    "small": Size(5_000_000, 128, 40, 10, 6, 4, 32, 1_000_000, 4000),
    "medium": Size(80_000_000, 384, 200, 40, 8, 4, 64, 12_000_000, 40_000),
    "large": Size(1_000_000_000, 1024, 60, 20, 6, 4, 64, 12_000_000, 40_000),
}


# ---------------------------------------------------------------- training


class Trainer:
    """A model, its optimizer and its loss; all chance comes from torch's global generator."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor], optimizer: Any):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.losses: list[float] = []

    def run(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.optimizer.zero_grad()
            loss = self.loss(self.model)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def saves(self, n: int, every: int, run: str = "main") -> Iterator[Save]:
        """Train on, saving `n` times, the first time now."""
        for i in range(n):
            if i:
                self.run(every)
            yield self.save(run, len(self.losses))

    def save(self, run: str, step: int) -> Save:
        return Save(run, step, self.state(), mean(self.losses[:10]), mean(self.losses[-10:]))


class MixedTrainer(Trainer):
    """Trains a bf16 model by an fp32 master copy of its weights and fp32 moments."""

    def __init__(self, master: nn.Module, loss: Callable[[nn.Module], Tensor], optimizer: Any):
        super().__init__(copy.deepcopy(master).bfloat16(), loss, optimizer)
        self.master = master

    def run(self, n_steps: int) -> None:
        pairs = list(zip(self.master.parameters(), self.model.parameters(), strict=True))
        for _ in range(n_steps):
            loss = self.loss(self.model)
            loss.backward()
            for master, weight in pairs:
                master.grad, weight.grad = weight.grad.float(), None
            self.optimizer.step()
            with torch.no_grad():
                for master, weight in pairs:
                    weight.copy_(master)
            self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        return {**super().state(), "master": self.master.state_dict()}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def next_byte_loss(size: Size) -> Callable[[nn.Module], Tensor]:
    """Cross-entropy of the next byte in random places of the text."""

    def loss(model: nn.Module) -> Tensor:
        text = text_bytes(size.text_size)
        starts = torch.randint(0, len(text) - size.context - 1, (size.batch, 1))
        ids = text[starts + torch.arange(size.context + 1)]
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    return loss


def gpt(size: Size, bytes_per_parameter: int) -> Gpt:
    """A GPT whose state of so many bytes a parameter has about the size asked for."""
    depth = max(2, round(size.state_size / bytes_per_parameter / (12 * size.width**2)))
    return Gpt(size.width, depth, size.context)


@cache
def pretrained(size: Size, seed: int, bytes_per_parameter: int) -> Trainer:
    """A GPT trained from scratch for a while; take it by `resumed`."""
    torch.manual_seed(seed)
    model = gpt(size, bytes_per_parameter)
    trainer = Trainer(model, next_byte_loss(size), adamw(model, 1e-3))
    trainer.run(size.n_pretrain)
    return trainer


def resumed(size: Size, seed: int, bytes_per_parameter: int = 12) -> Trainer:
    """A copy of the pre-trained one, going on with other data."""
    trainer = copy.deepcopy(pretrained(size, seed, bytes_per_parameter))
    torch.manual_seed(seed + 1)
    return trainer


# ---------------------------------------------------------------- regimes


def adapter(size: Size, seed: int) -> Iterator[Save]:
    trainer = resumed(size, seed, bytes_per_parameter=4)
    add_adapters(trainer.model, rank=8)
    trainer.optimizer = adamw(trainer.model, 5e-4)
    trainer.run(size.n_warm)
    yield from trainer.saves(size.n_saves, every=10)


def finetune(size: Size, seed: int) -> Iterator[Save]:
    trainer = resumed(size, seed)
    trainer.optimizer = adamw(trainer.model, 1e-5)
    trainer.run(size.n_warm)
    yield from trainer.saves(size.n_saves, every=10)


def scratch(every: int) -> Callable[[Size, int], Iterator[Save]]:
    return lambda size, seed: resumed(size, seed).saves(size.n_saves, every)


def bf16(size: Size, seed: int) -> Iterator[Save]:
    base = resumed(size, seed, bytes_per_parameter=14)
    trainer = MixedTrainer(base.model, base.loss, adamw(base.model, 2e-5))
    trainer.losses = base.losses
    trainer.run(size.n_warm)
    yield from trainer.saves(size.n_saves, every=10)


def experts(size: Size, seed: int) -> Iterator[Save]:
    torch.manual_seed(seed)
    n_experts, depth = 16, 4
    per_width2 = depth // 2 * (12 + 4 + 8 * n_experts)  # parameters over width squared
    width = max(32, 32 * round((size.state_size / 12 / per_width2) ** 0.5 / 32))
    model = Gpt(width, depth, size.context, n_experts)
    trainer = Trainer(model, next_byte_loss(size), adamw(model, 1e-3))
    trainer.run(size.n_pretrain)
    yield from trainer.saves(size.n_saves, every=1)


def word_trainer(size: Size, seed: int, n_words: int, width: int) -> Trainer:
    torch.manual_seed(seed)
    model = Words(n_words, width)
    ids, counts = text_words(size.text_size, n_words)
    weights = counts**0.75  # as word2vec draws its negatives

    def loss(model: nn.Module) -> Tensor:
        at = torch.randint(N_AROUND, len(ids) - N_AROUND, (256,))
        return model(*cbow_batch(ids, at, weights))

    trainer = Trainer(model, loss, torch.optim.SparseAdam(model.parameters(), lr=1e-2))
    trainer.run(size.n_pretrain)
    return trainer


def cbow_batch(ids: Tensor, at: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The words around, the words in the middle, and negatives, for places `at` of the text."""
    offsets = torch.tensor([i for i in range(-N_AROUND, N_AROUND + 1) if i])
    negatives = torch.multinomial(weights, len(at) * N_NEGATIVES, replacement=True)
    return ids[at[:, None] + offsets], ids[at], negatives.view(len(at), N_NEGATIVES)


def zipf(size: Size, seed: int) -> Iterator[Save]:
    width = round(size.state_size / 24 / size.n_words)  # two tables, each with two moments
    yield from word_trainer(size, seed, size.n_words, width).saves(size.n_saves, every=10)


def sweep(size: Size, seed: int) -> Iterator[Save]:
    yield resumed(size, seed).save("base", size.n_pretrain)
    for i, lr in enumerate((1e-5, 5e-5, 2e-4)):
        trainer = resumed(size, seed)
        torch.manual_seed(seed + 2 + i)
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr
        trainer.run(10)
        yield from trainer.saves(2, every=10, run=f"lr-{lr:g}")


def reshard(size: Size, seed: int) -> Iterator[Save]:
    """One state in flat shards, as fully sharded training keeps it, for another number of ranks each time."""
    trainer = resumed(size, seed)
    parameters = list(trainer.model.parameters())
    moments = [trainer.optimizer.state[p] for p in parameters]
    parts = {
        "model": [p.detach() for p in parameters],
        "exp_avg": [m["exp_avg"] for m in moments],
        "exp_avg_sq": [m["exp_avg_sq"] for m in moments],
    }
    flat = {name: torch.cat([t.flatten() for t in tensors]) for name, tensors in parts.items()}
    for i, n_ranks in enumerate((2, 3, 4, 6, 4, 3, 5, 2)[: size.n_saves]):
        state: dict[str, Any] = {f"rank{r}": {} for r in range(n_ranks)}
        for name, whole in flat.items():
            padded = F.pad(whole, (0, -len(whole) % n_ranks))
            for r, shard in enumerate(padded.chunk(n_ranks)):
                state[f"rank{r}"][name] = shard.clone()
        save = trainer.save("main", i + 1)
        yield Save(save.run, save.step, state, save.loss_start, save.loss_now)


def vocabulary(size: Size, seed: int) -> Iterator[Save]:
    """A frozen embedding that grows: new words are appended and inserted in turn, only they are trained."""
    n_new = 64
    n_old = size.n_words - n_new * size.n_saves
    base = word_trainer(size, seed, n_old, round(size.state_size / 8 / n_old))
    ids, counts = text_words(size.text_size, size.n_words)
    losses, rows = base.losses, torch.arange(n_old)
    for i in count():
        yield Save(
            "main",
            len(losses),
            {"model": {name: table[rows].clone() for name, table in base.model.state_dict().items()}},
            mean(losses[:10]),
            mean(losses[-10:]),
        )
        if i == size.n_saves - 1:
            return
        n_words = n_old + n_new * (i + 1)
        add_words(base.model, n_new)
        losses += train_rows(base.model, n_new, ids[ids < n_words], counts[:n_words] ** 0.75)
        place = len(rows) if i % 2 else len(rows) // 2
        rows = torch.cat([rows[:place], torch.arange(n_words - n_new, n_words), rows[place:]])


def add_words(model: Words, n_new: int) -> None:
    """Append rows that start as the mean word, a little shaken."""
    for table in (model.around, model.middle):
        old = table.weight.detach()
        new = old.mean(0) + 0.02 * torch.randn(n_new, old.shape[1])
        table.weight = nn.Parameter(torch.cat([old, new]), requires_grad=False)


def train_rows(model: Words, n_new: int, ids: Tensor, weights: Tensor) -> list[float]:
    """Train the last `n_new` rows of both tables on the places where their words stand."""
    tables = [model.around.weight, model.middle.weight]
    news = [nn.Parameter(table[-n_new:].clone()) for table in tables]
    optimizer = torch.optim.AdamW(news, lr=1e-2)
    inner = torch.arange(N_AROUND, len(ids) - N_AROUND)
    places = inner[ids[inner] >= len(weights) - n_new]
    losses = []
    for _ in range(10):
        at = places[torch.randint(len(places), (64,))]
        around, middle, negatives = cbow_batch(ids, at, weights)
        whole = [torch.cat([t[:-n_new], new]) for t, new in zip(tables, news, strict=True)]
        loss = cbow_loss(whole[0][around].mean(1), whole[1][middle], whole[1][negatives])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for table, new in zip(tables, news, strict=True):
        table[-n_new:] = new.detach()
    return losses


@dataclass(frozen=True, slots=True)
class Regime:
    """A way of training: what people call it, and the training."""

    title: str
    train: Callable[[Size, int], Iterator[Save]]


REGIMES = {
    "adapter": Regime("low-rank adapters on a frozen base, 10 steps apart", adapter),
    "finetune": Regime("full fine-tune, fp32 AdamW at 1e-5, 10 steps apart", finetune),
    "scratch-1": Regime("from scratch, fp32 AdamW at 1e-3, 1 step apart", scratch(1)),
    "scratch-10": Regime("the same, 10 steps apart", scratch(10)),
    "scratch-100": Regime("the same, 100 steps apart", scratch(100)),
    "bf16": Regime("bf16 weights, fp32 master and moments, AdamW at 2e-5, 10 steps apart", bf16),
    "zipf": Regime("word embeddings with SparseAdam, 10 steps apart", zipf),
    "experts": Regime("mixture of 16 experts, AdamW at 1e-3, 1 step apart", experts),
    "sweep": Regime("three learning rates from one base, fp32 AdamW", sweep),
    "reshard": Regime("one state in flat shards for 2 to 6 ranks", reshard),
    "vocabulary": Regime("a frozen embedding, 64 rows appended or inserted at a time", vocabulary),
}


def series(regime: str, size: str, seed: int, cache_dir: Path) -> Series:
    """The series of a regime, from the cache or from training."""

    def train() -> Iterator[Save]:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)  # the same bytes whatever the number of cores
        return REGIMES[regime].train(SIZES[size], seed)

    return cached(cache_dir, regime, REGIMES[regime].title, f"{size}-seed{seed}", train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    made = [series(r, options.size, options.seed, options.cache).to_json() for r in options.regimes]
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
