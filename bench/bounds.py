"""What deltackpt promises of its deltas, and whether the results of a run keep it.

Owns   the bounds, and how each is had from the results of series.py or of codec.py.
Never  measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peers import PEERS
from rich.table import Table
from tables import IN_TIME, OURS

Results = dict[str, Any]

#: Writes every step's tensors as they are into a file, and one fsync: no faster is `os.writev` of the same.
RAW = "safetensors"
DEDUP = ("restic", "borg", "casync")

DENSE = ("scratch-1", "scratch-10", "scratch-100", "finetune", "bf16", "sweep")
FROZEN = "adapter"

#: Stored bytes to those of the best of all others.
STORED_MAX = {
    "scratch-1": 0.98,
    "scratch-10": 0.98,
    "scratch-100": 0.98,
    "sweep": 0.98,
    "finetune": 0.96,
    "bf16": 0.92,
    "zipf": 1.0,
    "adapter": 1.0,
    "experts": 1.0,
    "reshard": 1.0,
    "vocabulary": 1.0,
}
#: The same to those of the best dedup tool.
DEDUP_MAX = {"adapter": 0.85, "reshard": 0.93}

RATIO_MAX = {
    "fp32-1e-3-weights-1": 0.60,
    "fp32-1e-3-weights-10": 0.70,
    "fp32-1e-3-weights-100": 0.79,
    "fp32-1e-5-weights-1": 0.40,
    "fp32-1e-5-weights-10": 0.50,
    "fp32-1e-5-weights-100": 0.60,
    "fp32-1e-3-exp_avg_sq-1": 0.65,
    "fp32-1e-3-exp_avg_sq-10": 0.73,
    "fp32-1e-3-exp_avg_sq-100": 0.80,
    "fp32-1e-5-exp_avg_sq-1": 0.65,
    "fp32-1e-5-exp_avg_sq-10": 0.73,
    "fp32-1e-5-exp_avg_sq-100": 0.80,
    "bf16-2.5e-7-weights-10": 0.026,  # about 5 % of the elements change
    "bf16-1.7e-7-weights-1": 0.005,  # about 0.5 %
}
DENSE_CASES = tuple(case for case in RATIO_MAX if case.startswith("fp32"))
SPARSE_CASES = tuple(case for case in RATIO_MAX if case.startswith("bf16"))


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure that may be no more than a limit, or no less.

    Parameters
    ----------
    name : str
    limit : float
    figure : callable
        Takes the results; raises `KeyError` where they do not tell.
    at_least : bool
    """

    name: str
    limit: float
    figure: Callable[[Results], float]
    at_least: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """A bound and what was measured, None if it was not."""

    bound: Bound
    measured: float | None

    @property
    def is_kept(self) -> bool | None:
        if self.measured is None:
            return None
        limit = self.bound.limit
        return self.measured >= limit if self.bound.at_least else self.measured <= limit

    def texts(self) -> list[str]:
        limit = f"{'>=' if self.bound.at_least else '<='} {self.bound.limit:g}"
        measured = "-" if self.measured is None else f"{self.measured:.4g}"
        kept = {True: "yes", False: "NO", None: "not measured"}[self.is_kept]
        return [self.bound.name, measured, limit, kept]


def figure(results: Results, kind: str, regime: str, peer: str, key: str) -> float:
    found = results[kind][regime]["peers"][peer]
    if not found.get("lossless", False):  # failed, or not every bit came back
        raise KeyError(peer)
    value: float = found[key]["median"]
    return value


def to_best(results: Results, regime: str, peers: Iterable[str]) -> float:
    """Our stored bytes to the least of the peers'; a run without one of them does not tell."""
    others = []
    for peer in peers:
        if peer not in results["regimes"][regime]["peers"]:
            raise KeyError(peer)
        try:
            others.append(figure(results, "regimes", regime, peer, "stored_size"))
        except KeyError:
            continue
    if not others:
        raise KeyError(regime)
    return figure(results, "regimes", regime, OURS, "stored_size") / min(others)


def series_bounds() -> Iterator[Bound]:
    for regime, limit in STORED_MAX.items():
        yield Bound(
            f"{regime}: bytes, to the best of all others",
            limit,
            lambda r, g=regime: to_best(r, g, [peer for peer in PEERS if peer not in (OURS, IN_TIME)]),
        )
    for regime, limit in DEDUP_MAX.items():
        yield Bound(
            f"{regime}: bytes, to the best of {', '.join(DEDUP)}",
            limit,
            lambda r, g=regime: to_best(r, g, DEDUP),
        )
    for regime in (*DENSE, FROZEN):
        yield Bound(
            f"{regime}: saving by {IN_TIME}, to writing every step raw with fsync ({RAW})",
            0.25 if regime == FROZEN else 1.0,
            lambda r, g=regime: save_s(r, g, IN_TIME) / save_s(r, g, RAW),
        )
    for regime in DENSE:
        yield Bound(
            f"{regime}: saving, times faster than z4ai",
            10,
            lambda r, g=regime: save_s(r, g, "z4ai") / save_s(r, g, OURS),
            at_least=True,
        )
    for regime in STORED_MAX:
        yield Bound(
            f"{regime}: restoring the slowest step, to the same saved alone",
            2.0,
            lambda r, g=regime: figure(r, "regimes", g, OURS, "deep_restore"),
        )


def save_s(results: Results, regime: str, peer: str) -> float:
    return figure(results, "regimes", regime, peer, "save_s")


def codec_bounds() -> Iterator[Bound]:
    for case, limit in RATIO_MAX.items():
        yield Bound(f"{case}: stored / raw", limit, lambda r, c=case: figure(r, "cases", c, OURS, "ratio"))
    for title, cases, key, limit in (
        ("fp32 dense: encoding, GB/s of a core", DENSE_CASES, "encode_gb_s", 0.9),
        ("fp32 dense: decoding, GB/s of a core", DENSE_CASES, "decode_gb_s", 1.3),
        ("bf16 sparse: encoding, GB/s of a core", SPARSE_CASES, "encode_gb_s", 2.0),
    ):
        for coder, how in ((OURS, "as a save does"), ("sub", "the mode given")):
            yield slowest(f"{title}, {how}", cases, coder, key, limit)
    title = "fp32 dense: encoding by two threads, to one, the mode given"
    yield slowest(title, DENSE_CASES, OURS, "two_threads", 1.6)
    yield Bound("all cases of the run: bytes over the best mode of every chunk", 0.003, over_oracle)


def slowest(title: str, cases: tuple[str, ...], coder: str, key: str, limit: float) -> Bound:
    """A bound that the slowest case has to keep."""
    return Bound(
        f"{title}, slowest case",
        limit,
        lambda r: min(figure(r, "cases", case, coder, key) for case in cases),
        at_least=True,
    )


def over_oracle(results: Results) -> float:
    ours = oracle = 0.0
    for facts in results["cases"].values():
        found = facts["peers"][OURS]
        size = found["ratio"]["median"] * facts["raw_size"]
        ours += size
        oracle += size / (1 + found["over_oracle"])
    if not oracle:
        raise KeyError("cases")
    return ours / oracle - 1


def checks(results: Results) -> list[Check]:
    """Every bound on such results."""
    bounds = codec_bounds() if "cases" in results else series_bounds()
    return [Check(bound, measured(bound, results)) for bound in bounds]


def measured(bound: Bound, results: Results) -> float | None:
    try:
        return bound.figure(results)
    except KeyError:
        return None


def terminal(checked: list[Check]) -> Table:
    table = Table(title=summary(checked))
    for column in ("bound", "measured", "limit", "kept"):
        table.add_column(column, justify="left" if column == "bound" else "right")
    for check in checked:
        table.add_row(*check.texts(), style={True: "", False: "bold red", None: "dim"}[check.is_kept])
    return table


def markdown(checked: list[Check]) -> str:
    lines = ["", f"**{summary(checked)}**\n", "| bound | measured | limit | kept |", "|---|---:|---:|---:|"]
    return "\n".join([*lines, *("| " + " | ".join(check.texts()) + " |" for check in checked)]) + "\n"


def summary(checked: list[Check]) -> str:
    n = {kept: sum(check.is_kept is kept for check in checked) for kept in (True, False, None)}
    return f"bounds: {n[True]} kept, {n[False]} not, {n[None]} not measured"
