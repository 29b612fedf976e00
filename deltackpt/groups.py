"""Groups: what kind of tensor one is, and what a save paid for each kind.

Owns   the groups, how names and dtypes tell them, and the figures of one in a save.
Never  counts (tally.py does), or judges (payoff.py does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Group = Literal["weights", "moments", "other"]
GROUPS: tuple[Group, ...] = ("weights", "moments", "other")
TITLES = {"weights": "weights", "moments": "optimizer moments", "other": "other"}

#: What optimizers of torch and optax call what they keep for every weight.
_MOMENTS = {
    "exp_avg",
    "exp_avg_sq",
    "exp_inf",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "sum",
    "ax",
    "mu",
    "nu",
    "trace",
}
_OPTIMIZERS = ("opt", "optim", "optimizer")
_FLOATS = ("float", "bfloat", "complex")


def group_of(name: str, dtype: str, shape: Sequence[int]) -> Group:
    """Return what kind of tensor one is, by its name and its dtype.

    Moments are arrays of floats under an optimizer, or under the name that one gives them; weights all other
    arrays of floats, and whatever is called a weight or a bias; the rest, as counters, scalars, random states
    and indices, is other.

    Examples
    --------
    >>> group_of("model.fc.weight", "float32", (3, 2)), group_of("optimizer.state.0.exp_avg", "float32", (3,))
    ('weights', 'moments')
    >>> group_of("opt_state/0/mu/Dense_0/kernel", "float32", (3, 2))
    'moments'
    >>> group_of("optimizer.state.0.step", "float32", ()), group_of("rng", "uint8", (5056,))
    ('other', 'other')
    """
    parts = name.lower().replace("/", ".").split(".")
    is_floats = dtype.startswith(_FLOATS) and len(shape) > 0
    is_optimizers = any(part.startswith(_OPTIMIZERS) for part in parts[:-1])
    if is_floats and (is_optimizers or parts[-1] in _MOMENTS):
        return "moments"
    if is_floats or (parts[-1].endswith(("weight", "bias")) and not is_optimizers and shape):
        return "weights"
    return "other"


@dataclass(frozen=True, slots=True)
class Coded:
    """Chunks that a save stored with one codec.

    Parameters
    ----------
    n_chunks : int
    size : int
        Their bytes.
    stored_size : int
        Bytes of their payloads.
    """

    n_chunks: int = 0
    size: int = 0
    stored_size: int = 0

    def __add__(self, other: Coded) -> Coded:
        return Coded(
            self.n_chunks + other.n_chunks, self.size + other.size, self.stored_size + other.stored_size
        )


@dataclass(frozen=True, slots=True)
class GroupCost:
    """What a save, or several, paid for the tensors of one group and dtype; lists of chunks not included.

    Parameters
    ----------
    group : str
        Of `GROUPS`.
    dtype : str
        "mixed" for what is left of a state of very many dtypes.
    logical_size : int
        Bytes handed in.
    n_chunks : int
        Chunks of them, whether the store had them or not.
    based_size : int
        Bytes of the chunks that were put and had a base to be compared with.
    codecs : dict of str to Coded
        What was put, by the name of its codec; all else the store had already.  A chunk that is in several
        tensors is the first one's.

    Examples
    --------
    >>> coded = {"planes": Coded(1, 100, 80), "delta-dense": Coded(2, 200, 90)}
    >>> cost = GroupCost("weights", "float32", 1000, 9, 200, coded)
    >>> cost.changed_size, cost.stored_size, cost.same
    (300, 170, Coded(n_chunks=6, size=700, stored_size=0))
    >>> (cost + cost).codecs["planes"]
    Coded(n_chunks=2, size=200, stored_size=160)
    """

    group: str
    dtype: str
    logical_size: int
    n_chunks: int
    based_size: int = 0
    codecs: dict[str, Coded] = field(default_factory=dict)

    @property
    def put(self) -> Coded:
        """All that was put, whatever its codec."""
        return sum(self.codecs.values(), Coded())

    @property
    def changed_size(self) -> int:
        """Bytes in chunks that were put."""
        return self.put.size

    @property
    def stored_size(self) -> int:
        """Bytes of the payloads of what was put."""
        return self.put.stored_size

    @property
    def same(self) -> Coded:
        """The rest: chunks that were not put, or not for this group."""
        put = self.put
        return Coded(self.n_chunks - put.n_chunks, self.logical_size - put.size, 0)

    def __add__(self, other: GroupCost) -> GroupCost:
        names = dict.fromkeys([*self.codecs, *other.codecs])
        return GroupCost(
            self.group,
            self.dtype,
            self.logical_size + other.logical_size,
            self.n_chunks + other.n_chunks,
            self.based_size + other.based_size,
            {name: self.codecs.get(name, Coded()) + other.codecs.get(name, Coded()) for name in names},
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, with what follows from them."""
        return {**asdict(self), "changed_size": self.changed_size, "stored_size": self.stored_size}

    @classmethod
    def from_json(cls, body: Any) -> GroupCost:
        """Return what a record has of it, or raise a `ValueError`; what a later version adds is passed over.

        Examples
        --------
        >>> GroupCost.from_json({"group": "other", "dtype": "uint8", "logical_size": -8, "n_chunks": 1})
        Traceback (most recent call last):
            ...
        ValueError: logical_size is -8
        """
        if not isinstance(body, dict) or not isinstance(body.get("codecs", {}), dict):
            raise ValueError(f"a group is {body!r:.80}")
        group, dtype = body.get("group"), body.get("dtype")
        if not isinstance(group, str) or not isinstance(dtype, str):
            raise ValueError(f"a group is of {group!r:.80}, {dtype!r:.80}")
        codecs = {name: _coded(value) for name, value in body.get("codecs", {}).items()}
        logical_size, n_chunks, based_size = (
            _count(body, name) for name in ("logical_size", "n_chunks", "based_size")
        )
        return cls(group, dtype, logical_size, n_chunks, based_size, codecs)


def _coded(body: Any) -> Coded:
    if not isinstance(body, dict):
        raise ValueError(f"a codec's figures are {body!r:.80}")
    return Coded(*(_count(body, name) for name in Coded.__slots__))


def _count(body: dict[str, Any], name: str) -> int:
    value = body.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{name} is {value!r:.80}")
    return value


def added(costs: Sequence[GroupCost]) -> list[GroupCost]:
    """Return one cost for each group and dtype, in the order of `GROUPS`, the largest dtype first.

    Examples
    --------
    >>> added([GroupCost("other", "uint8", 1, 1), GroupCost("weights", "float32", 4, 1)] * 2)[0]
    GroupCost(group='weights', dtype='float32', logical_size=8, n_chunks=2, based_size=0, codecs={})
    """
    sums: dict[tuple[str, str], GroupCost] = {}
    for cost in costs:
        key = (cost.group, cost.dtype)
        sums[key] = sums[key] + cost if key in sums else cost
    return sorted(sums.values(), key=_order)


def _order(cost: GroupCost) -> tuple[int, int, str]:
    place = GROUPS.index(cost.group) if cost.group in GROUPS else len(GROUPS)
    return place, -cost.logical_size, cost.dtype
