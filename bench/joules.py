"""The joules of a save against torch.save + fsync of the same state, in the same run, by the same method.

    python bench/joules.py [--size-mib 512] [--repeats 5] [--dir DIR] [--json]

The states are those of spine.py, trained for real: an adapter on a frozen base of about --size-mib, and a
full fine-tune of an eighth of that.  Medians of saves that took turns; docs/energy.md says what the joules
are known by and how far off they may be.  Where they are estimated, look at the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spine import Trainer, torch_save

from deltackpt import open_run
from deltackpt.energy import CPU_W, WRITTEN_J, Energy, Meter
from deltackpt.report import human_energy, human_size, table

ADAPTER, SAME, FIRST, DENSE = (
    "adapter on a frozen base, each save after a step",
    "nothing changed",
    "the first save of a frozen base",
    "full fine-tune, each save after a step",
)
#: The lowest and highest published watts of a thread and joules of a byte written, by those that are used.
WEIGHTS = [
    {"cpu seconds": cpu_w / CPU_W, "bytes written": written_j / WRITTEN_J}
    for cpu_w in (1.7, 8.6)
    for written_j in (1e-9, 14e-9)
]


def whole(state: dict[str, Any], at: Path) -> Energy:
    """Measure a save by torch.save: each byte is read, copied into the page cache, and written from there."""
    meter = Meter()
    torch_save(state, at / "whole.pt")
    size = (at / "whole.pt").stat().st_size
    took = meter.read(moved_size=4 * size, written_size=size)
    (at / "whole.pt").unlink()
    return took


def pairs(trainer: Trainer, at: Path, repeats: int, *, steps: bool, first: bool = False) -> Iterator[Any]:
    """Yield a report and what torch.save took of the same state, in turns, after training or not."""
    with open_run(at / "store") as run:
        for n in range(repeats + (not first)):
            if steps:
                trainer.step()
            theirs = whole(trainer.state(), at)
            report = run.save(trainer.state(), step=n)
            if first or n:
                yield report, theirs


def joules(several: Sequence[Energy], weights: Mapping[str, float]) -> float:
    """Return the median, the parts of each source weighted."""
    return statistics.median(
        sum(part * weights.get(name, 1.0) for name, part in energy.parts.items()) for energy in several
    )


def measured(of: Iterator[Any]) -> dict[str, Any]:
    """Return the medians of some pairs, and how far the ratio goes by other published constants."""
    reports, theirs = zip(*of, strict=True)
    ours = [report.energy for report in reports]
    ratios = [joules(ours, w) / joules(theirs, w) for w in WEIGHTS]
    return {
        "state_size": reports[0].logical_size,
        "joules": joules(ours, {}),
        "torch_save_joules": joules(theirs, {}),
        "ratio": joules(ours, {}) / joules(theirs, {}),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "method": ours[0].method,
    }


def run(size: int, repeats: int, directory: Path | None) -> dict[str, dict[str, Any]]:
    """Measure all regimes."""
    results = {}
    trainer = Trainer(size, adapter=True)
    trainer.step()
    tuned = Trainer(size // 32, adapter=False)
    for regime, of, steps, first, n in (
        (ADAPTER, trainer, True, False, repeats),
        (SAME, trainer, False, False, repeats),
        (FIRST, trainer, False, True, 1),
        (DENSE, tuned, True, False, repeats),
    ):
        with tempfile.TemporaryDirectory(dir=directory, prefix="bench-") as name:
            results[regime] = measured(pairs(of, Path(name), n, steps=steps, first=first))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-mib", type=int, default=512, help="size of the frozen base")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to write; default the current directory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = run(options.size_mib << 20, options.repeats, options.dir or Path.cwd())
    if options.json:
        print(json.dumps(results, indent=1))
        return
    rows = [
        (
            regime,
            human_size(found["state_size"]),
            human_energy(found["joules"]),
            human_energy(found["torch_save_joules"]),
            f"{found['ratio']:.2f}",
            f"{found['ratio_min']:.2f} to {found['ratio_max']:.2f}",
            found["method"],
        )
        for regime, found in results.items()
    ]
    print(
        table(
            ("regime", ">state", ">deltackpt", ">torch.save", ">ratio", "by other constants", "known by"),
            rows,
        )
    )


if __name__ == "__main__":
    main()
