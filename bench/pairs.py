"""Two states of one training, 1, 10 or 100 steps apart, tensor class by tensor class.

Owns   the trainings that the bench of codecs needs, the cases made of them, and which tensors are a class.
Never  encodes anything.

Each training is saved at steps 0, 1, 10 and 100 after its base: all distances are from one state.

    python bench/pairs.py [--size small] [--cases 'fp32-*' ...] [--seed 0] [--cache DIR]

trains what is not in the cache yet and prints what each case is as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache import SOURCES, Save, Series, Tensors, cached, changed_share, default_cache
from numpy.typing import NDArray
from states import SIZES, MixedTrainer, Size, Trainer, adamw, resumed

DISTANCES = (1, 10, 100)

#: How the flat names of a class's tensors begin or end.
CLASSES = {"weights": "^model/", "master": "^master/", "exp_avg": "/exp_avg$", "exp_avg_sq": "/exp_avg_sq$"}


@dataclass(frozen=True, slots=True)
class Training:
    """A way of training: what people call it, the trainer when it is warm, and the classes to look at."""

    title: str
    start: Callable[[Size, int], Trainer]
    classes: tuple[str, ...]


def scratch(size: Size, seed: int) -> Trainer:
    return resumed(size, seed)


def finetune(size: Size, seed: int) -> Trainer:
    trainer = resumed(size, seed)
    trainer.optimizer = adamw(trainer.model, 1e-5)
    trainer.run(size.n_warm)
    return trainer


def bf16(size: Size, seed: int) -> Trainer:
    """All of it in bf16, the moments too."""
    base = resumed(size, seed)
    model = copy.deepcopy(base.model).bfloat16()
    trainer = Trainer(model, base.loss, adamw(model, 1e-3))
    trainer.run(size.n_warm)
    return trainer


def mixed(lr: float) -> Callable[[Size, int], Trainer]:
    def start(size: Size, seed: int) -> Trainer:
        base = resumed(size, seed)
        trainer = MixedTrainer(base.model, base.loss, adamw(base.model, lr))
        trainer.run(size.n_warm)
        return trainer

    return start


ADAM = ("weights", "exp_avg", "exp_avg_sq")
COPY = ("weights", "master")  # the moments are fp32, as a fine-tune's
TRAININGS = {
    "fp32-1e-3": Training("from scratch, fp32 AdamW at 1e-3", scratch, ADAM),
    "fp32-1e-5": Training("full fine-tune, fp32 AdamW at 1e-5", finetune, ADAM),
    "bf16-1e-3": Training("bf16 weights and moments, AdamW at 1e-3", bf16, ADAM),
    "bf16-1e-5": Training("bf16 weights, fp32 master and moments, AdamW at 1e-5", mixed(1e-5), COPY),
    # Of the weights, medium, about 5 % change in 10 steps of the first, and 0.5 % in 1 step of the second.
    "bf16-2.5e-7": Training("bf16 weights, fp32 master and moments, AdamW at 2.5e-7", mixed(2.5e-7), COPY),
    "bf16-1.7e-7": Training("bf16 weights, fp32 master and moments, AdamW at 1.7e-7", mixed(1.7e-7), COPY),
}

#: Training, class and steps apart, by name.
CASES = {
    f"{training}-{cls}-{steps}": (training, cls, steps)
    for training, facts in TRAININGS.items()
    for cls in facts.classes
    for steps in DISTANCES
}


@dataclass(frozen=True)
class Pair:
    """The tensors of one class in two states.

    Parameters
    ----------
    case, title : str
    old, new : dict
        Equal names, shapes and types: one type in all.
    """

    case: str
    title: str
    old: Tensors
    new: Tensors

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.new.values())).dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @cached_property
    def old_bytes(self) -> NDArray[np.uint8]:
        """All tensors, one after the other."""
        return joined(self.old)

    @cached_property
    def new_bytes(self) -> NDArray[np.uint8]:
        return joined(self.new)

    def to_json(self) -> dict[str, Any]:
        training, cls, steps = CASES[self.case]
        return {
            "title": f"{cls} of {self.title}, {steps} step{'s' if steps > 1 else ''} apart",
            "training": training,
            "class": cls,
            "dtype": str(self.dtype).removeprefix("torch."),
            "steps": steps,
            "raw_size": self.new_bytes.size,
            "changed": changed_share(self.new, self.old),
        }


def joined(tensors: Tensors) -> NDArray[np.uint8]:
    return np.concatenate([as_bytes(tensor) for tensor in tensors.values()])


def as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def pair(case: str, size: str, seed: int, cache_dir: Path) -> Pair:
    """The two states of a case, from the cache or from training."""
    training, cls, steps = CASES[case]
    saves = series(training, size, seed, cache_dir).saves
    old, new = (
        {name: t for name, t in saves[i].tensors().items() if re.search(CLASSES[cls], name)}
        for i in (0, 1 + DISTANCES.index(steps))
    )
    return Pair(case, TRAININGS[training].title, old, new)


def series(training: str, size: str, seed: int, cache_dir: Path) -> Series:
    """The four saves of a training."""

    def train() -> Iterator[Save]:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)  # the same bytes whatever the number of cores
        trainer = TRAININGS[training].start(SIZES[size], seed)
        step = 0
        for distance in (0, *DISTANCES):
            trainer.run(distance - step)
            step = distance
            yield trainer.save("main", len(trainer.losses))

    title, variant = TRAININGS[training].title, f"{size}-seed{seed}"
    return cached(cache_dir, f"pairs-{training}", title, variant, train, (*SOURCES, "pairs.py"))


def chosen(patterns: list[str]) -> list[str]:
    """The cases that fit any of the patterns, as a shell's."""
    return [case for case in CASES if any(fnmatch(case, pattern) for pattern in patterns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--cases", nargs="+", default=["*"], help=f"patterns of {', '.join(CASES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    made = {
        case: pair(case, options.size, options.seed, options.cache).to_json()
        for case in chosen(options.cases)
    }
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
