"""The jobs of the crash tests, two at a time where there are two cores, and what they came to."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # what all tests share

from runs import SEED, total


@pytest.fixture(scope="module")
def results(request):
    """What becomes of each job that was asked for; all are begun when the first is waited for."""
    items = [item for item in request.session.items if item.path == request.path]
    jobs = [item.callspec.params["job"] for item in items if hasattr(item, "callspec")]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
        yield {job: pool.submit(*job) for job in jobs}
        pool.shutdown(cancel_futures=True)


def pytest_terminal_summary(terminalreporter):
    if total:
        told = ", ".join(f"{n} {what}" for what, n in sorted(total.items()))
        terminalreporter.write_line(f"crash: {told}; CRASH_SEED={SEED}")
