"""Small models of the kinds people train, and the real text they are trained on.

Owns   the modules, and text as bytes and as ranked words; the text is the source that ships with Python.
Never  optimizes, saves, or draws a random number outside torch's generators.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

N_BYTES = 256


@cache
def text(size: int) -> bytes:
    """The first `size` bytes of the standard library's modules, in the order of their paths."""
    root, parts, left = Path(os.__file__).parent, [], size
    for path in sorted(p for p in root.rglob("*.py") if not {"site-packages", "dist-packages"} & {*p.parts}):
        parts.append(path.read_bytes()[:left])
        left -= len(parts[-1])
        if left == 0:
            break
    return b"".join(parts)


@cache
def text_bytes(size: int) -> Tensor:
    """The text as one token a byte."""
    return torch.frombuffer(bytearray(text(size)), dtype=torch.uint8).long()


@cache
def text_words(size: int, n_words: int) -> tuple[Tensor, Tensor]:
    """The text as ranks of words, 0 the most frequent, rarer words left out; and how often each occurs.

    Ranked as tokenizers number their tokens, so frequent rows of an embedding lie near each other.
    """
    words = re.findall(rb"\w+|[^\w\s]", text(size))
    counts = Counter(words).most_common(n_words)
    ranks = {word: rank for rank, (word, _) in enumerate(counts)}
    ids = torch.tensor([ranks[word] for word in words if word in ranks])
    return ids, torch.tensor([float(count) for _, count in counts])


class Gpt(nn.Module):
    """A byte-level GPT, its head tied to nothing; with `n_experts`, every second block routes.

    Parameters
    ----------
    width, depth : int
        About ``12 * width ** 2 * depth`` parameters, experts aside.
    context : int
        Longest sequence.
    n_experts : int
        Feed-forward parts of a routing block; 0 for a plain GPT.
    """

    def __init__(self, width: int, depth: int, context: int, n_experts: int = 0):
        super().__init__()
        self.embed = nn.Embedding(N_BYTES, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, n_experts if i % 2 else 0) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_BYTES, bias=False)
        for parameter in self.parameters():  # as GPT-2 is initialised
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention, then a feed-forward part."""

    def __init__(self, width: int, n_experts: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = Experts(width, n_experts) if n_experts else mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, width // 32, 32).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm2(x))


def mlp(width: int) -> nn.Sequential:
    """The feed-forward part of a block."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Experts(nn.Module):
    """One of several feed-forward parts for each sequence, by noisy top-1 routing.

    An expert that no sequence reached has no gradient, so AdamW leaves it and its moments alone.
    """

    def __init__(self, width: int, n_experts: int):
        super().__init__()
        self.router = nn.Linear(width, n_experts)
        self.experts = nn.ModuleList(mlp(width) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x.mean(1))
        # Gumbel noise, as in noisy gating (Shazeer et al., 2017): without it one expert takes all.
        chosen = (scores - torch.empty_like(scores).exponential_().log()).argmax(1)
        gates = scores.softmax(1).gather(1, chosen[:, None])
        return torch.stack([g * self.experts[int(e)](s) for g, e, s in zip(gates, chosen, x, strict=True)])


class Lora(nn.Module):
    """A frozen linear layer with a trained one of low rank beside it (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def add_adapters(model: Gpt, rank: int) -> None:
    """Freeze a model and put adapters on its attention."""
    model.requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.out = Lora(block.qkv, rank), Lora(block.out, rank)


class Words(nn.Module):
    """Word vectors: the word in the middle from the mean of those around it (word2vec's CBOW).

    Its two tables give sparse gradients: only rows of words that were seen, or drawn as negatives.
    """

    def __init__(self, n_words: int, width: int):
        super().__init__()
        self.around = nn.Embedding(n_words, width, sparse=True)
        self.middle = nn.Embedding(n_words, width, sparse=True)
        nn.init.normal_(self.around.weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.middle.weight, std=1 / math.sqrt(width))

    def forward(self, around: Tensor, middle: Tensor, negatives: Tensor) -> Tensor:
        return cbow_loss(self.around(around).mean(1), self.middle(middle), self.middle(negatives))


def cbow_loss(mean: Tensor, true: Tensor, false: Tensor) -> Tensor:
    """Negative sampling: of (n, width), (n, width) and (n, k, width)."""
    good = F.logsigmoid((mean * true).sum(-1))
    bad = F.logsigmoid(-(mean[:, None] * false).sum(-1)).sum(-1)
    return -(good + bad).mean()
