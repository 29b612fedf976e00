"""Orders: two or three processes on one disk, one at a time, switching where they are told to.

What a power loss cannot show, since it takes every process: that gc waits, fences, looks again and adopts;
that of two writers of one step one wins.  The second process comes between any two calls of the first, all of
it or, for a random sample, a part; the plans at the end go back and forth where it once mattered.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from actors import Actor, Stop, at_call, before, behind, never, pausing
from claims import Claims, found_in
from losses import BROKEN, ViolationError, at_once, check_allowed, check_usable
from scenarios import ROOT, Act, Scenario, limits, prepared, ranks
from scenes import forgot, many, saved, state
from steps import collect, opened

from deltackpt import gc, snapshot
from deltackpt.backends import Backend
from deltackpt.backends.local import LocalBackend
from deltackpt.errors import AlreadyExistsError, ConflictError, NotFoundError, StorageError
from deltackpt.memory import Memory
from deltackpt.records import Figures
from deltackpt.session import Session
from deltackpt.shadow import Shadow
from deltackpt.store import open_store

#: Who goes on, and until when.
Plan = list[tuple[int, Stop]]


@dataclass(frozen=True)
class Order:
    """What is there; who is at work; in which order, or in every one."""

    prepare: Act
    acts: list[Act]
    plan: Callable[[], Plan] | None = None


#: What a writer, or a gc, may be told that another has got in the way of.
_TYPED = (ConflictError, AlreadyExistsError, NotFoundError, StorageError)


def saves(step: int, of: int, **kwargs) -> Act:
    """Save what another step has: every chunk is there."""
    return lambda backend: opened(backend).save(state(of, **kwargs), step=step)


def waits(backend: Backend) -> None:
    """A gc that gives nobody up: their process is alive."""
    gc.collect(backend)


def spared(backend: Backend) -> None:
    """A cycle that is condemned and not swept, of a pack that a step needs since."""
    saved(1)(backend)
    with Session(open_store(backend), "main", 2) as writer:
        data = snapshot.save(writer, state(1), lambda _: Memory(), Shadow(0)).manifest.to_bytes()
        forgot(1)(backend)
        assert gc.collect(backend).waiting_for
        writer.publish(data)
        writer.commit(data, parent=None, metrics={}, metadata={}, figures=Figures())


ORDERS = {
    "a gc that gives everyone up, beside a save": Order(saved(1), [saves(2, of=1), many(forgot(1), collect)]),
    "a gc that waits, beside a save": Order(saved(1), [saves(2, of=1), many(forgot(1), waits)]),
    "a save beside a gc": Order(many(saved(1, 2), forgot(1)), [collect, saves(3, of=1)]),
    "two saves of one step": Order(saved(1), [saves(2, of=1), saves(2, of=1, seed=3)]),
    "a gc that waits, beside two ranks": Order(saved(1), [ranks(2, of=1), many(forgot(1), waits)]),
    "a fork beside a forget and a gc": Order(
        saved(1), [lambda b: opened(b).fork("fork", step=1), many(forgot(1), waits)]
    ),
    "two gcs": Order(many(saved(1, 2), forgot(1)), [collect, collect]),
    "a writer that opens its session once gc has drained": Order(
        saved(1),
        [saves(2, of=1), many(forgot(1), waits)],
        lambda: [
            (0, before("link", "/sessions/")),
            (1, behind("lstat", "/gc/sweep-0")),
            (0, before("link", "/refs/main/2.1")),
            (1, never),
            (0, never),
        ],
    ),
    "two gcs that find different packs dead, and a writer between": Order(
        spared,
        [waits, many(waits, forgot(2)), saves(3, of=1)],
        lambda: [
            (0, behind("lstat", "/gc/sweep-0")),
            (1, never),
            (2, before("link", "/refs/main/3.1")),
            (0, never),
            (2, never),
        ],
    ),
}


def explore(name: str, share: float, seed: int) -> Counter[str]:
    """Try the orders of that name, or a share of them; return how many.

    Raises
    ------
    ViolationError
        At the first after which something is not right.
    """
    order = ORDERS[name]
    rng = random.Random(f"{name} {seed}")
    count: Counter[str] = Counter()
    with limits(), at_once(rng):
        scenario = Scenario(prepared(order.prepare), lambda disk: None)
        if order.plan:
            _try(scenario, order, order.plan(), name)
            return Counter(orders=1)
        n_first, n_second = _try(scenario, order, [], "one after the other")
        places = [(first, second) for first in range(n_first) for second in (None, rng.randrange(n_second))]
        for first, second in rng.sample(places, int(share * len(places))):
            stop = never if second is None else at_call(second)
            plan = [(0, at_call(first)), (1, stop)]
            _try(scenario, order, plan, f"call {first}, then {second} of the other")
            count["orders"] += 1
    return count


def _try(scenario: Scenario, order: Order, plan: Plan, told: str) -> list[int]:
    """Act in this order and then to the end; how many calls each made."""
    disk = scenario.disk()
    claims = Claims(lambda: len(disk.changes), found_in(LocalBackend(ROOT, calls=disk)))
    disk.claims = claims
    actors = [Actor(LocalBackend(ROOT, calls=disk), act) for act in order.acts]
    with claims.noting(), pausing(disk):
        for who, stop in [*plan, *((i, never) for i in range(len(actors)))]:
            actors[who].advance(stop)
    try:
        for actor in actors:
            if actor.error and not isinstance(actor.error, _TYPED):
                raise actor.error
        found = found_in(LocalBackend(ROOT, calls=disk))
        check_allowed(found, claims.allowed(len(disk.changes)))
        check_usable(disk.upto(len(disk.changes)), found, scenario)
    except BROKEN as e:
        raise ViolationError(f"{told}: {type(e).__name__}: {e}") from e
    return [actor.n_calls for actor in actors]
