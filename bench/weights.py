"""A state of any size without training: weights as they are initialised, and small changes of them."""

from __future__ import annotations

import torch

N_TENSORS = 32
#: Of the temporaries of a change: small, so that they are not seen in a peak of memory.
_N_AT_A_TIME = 1 << 18


def made(size: int) -> dict[str, torch.Tensor]:
    """Return fp32 tensors of this size in all, normally distributed."""
    torch.manual_seed(0)
    return {f"w{i}": torch.empty(size // 4 // N_TENSORS).normal_(std=0.02) for i in range(N_TENSORS)}


def perturb(state: dict[str, torch.Tensor], n_tensors: int = N_TENSORS, first: int = 0) -> int:
    """Change every float of some of the tensors by up to a ten thousandth; return the bytes."""
    changed = [state[f"w{(first + i) % N_TENSORS}"] for i in range(n_tensors)]
    for tensor in changed:
        for part in tensor.split(_N_AT_A_TIME):
            part.mul_(torch.rand_like(part).mul_(2e-4).add_(1 - 1e-4))
    return sum(tensor.nbytes for tensor in changed)
