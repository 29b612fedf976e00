"""Work on all cores, each in a process that has imported nothing else, so that it forks in a millisecond."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def spread(work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """What `work`, a function of a test module, returns of each job; what it raises is raised here."""
    n = len(os.sched_getaffinity(0))
    # What goes wrong there is meant to, and is not to be told ten thousand times.
    quiet = logging.disable, (logging.CRITICAL,)
    with ProcessPoolExecutor(n, get_context("spawn"), *quiet) as pool:
        yield from pool.map(work, jobs)
