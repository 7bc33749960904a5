"""Is a network better with a part than without it? Recorded runs of two configs, the same seeds of each.

The yardstick is what the seed alone does: a change counts when its confidence interval is on one side of zero.
"""

from __future__ import annotations

import json
import math
import runpy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

_OWN_SETTINGS = ("model", "randomness", "work_dir")
"""What runs that are compared may differ in."""


@dataclass(frozen=True)
class Comparison:
    """Runs of two configs on one kind of machine, the same seeds in the same order.

    Args:
        configs: names of the first and of the second config.
        scores: best validation score in per cent by seed, of the first and of the second.
        facts: `run.json` of one of the runs.
    """

    configs: tuple[str, str]
    scores: tuple[Sequence[float], Sequence[float]]
    facts: Mapping[str, Any]

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.scores[0])

    @property
    def change(self) -> float:
        """Mean score of the second config less that of the first, in points."""
        first, second = self.scores
        return mean(second) - mean(first)

    @property
    def margin(self) -> float:
        """Half the width of the 95 % confidence interval of `change`: Student's, one variance for both configs."""
        variance = mean(stdev(scores) ** 2 for scores in self.scores)
        return student_quantile(2 * self.seeds - 2) * math.sqrt(2 * variance / self.seeds)

    def confirms(self, expected: str | float) -> bool:
        """Whether the whole interval of `change` lies where it is expected.

        Args:
            expected: `"lower"`, `"higher"`, or a number of points that the change stays within on both sides.

        Raises:
            ValueError: for another word.
        """
        if expected == "lower":
            return self.change + self.margin < 0
        if expected == "higher":
            return self.change - self.margin > 0
        if isinstance(expected, str):
            raise ValueError(f"expected must be 'lower', 'higher' or a number of points; got {expected!r}")
        return abs(self.change) + self.margin <= expected

    @property
    def spread(self) -> str:
        """Mean and standard deviation over the seeds, of the first and of the second: `"90.1 ± 0.2 → 89.5 ± 0.3"`."""
        return " → ".join(f"{mean(scores):.2f} ± {stdev(scores):.2f}" for scores in self.scores)

    @property
    def interval(self) -> str:
        """The change and its interval: `"-0.60 ± 0.45"`."""
        return f"{self.change:+.2f} ± {self.margin:.2f}".replace("-", "−")


def read_comparison(folder: Path, first: str, second: str) -> Comparison | None:
    """Compare two configs by the newest runs that have two seeds or more in common.

    Args:
        folder: `docs/results/repro/<paper>`.
        first, second: names of the configs.

    Returns:
        None when there are no such runs. Of several machines the one with the newest runs, of a seed the newest run.

    Raises:
        ValueError: when the runs differ in more than model and seed, for instance in their length.
    """
    runs = [_newest_runs(folder / config) for config in (first, second)]
    shared: dict[str, list[int]] = {}
    for device in runs[0].keys() & runs[1].keys():
        seeds = sorted(runs[0][device].keys() & runs[1][device].keys())
        if len(seeds) > 1:
            shared[device] = seeds
    if not shared:
        return None
    device = max(shared, key=lambda device: max(runs[0][device][seed].name for seed in shared[device]))
    records = [[of_device[device][seed] for seed in shared[device]] for of_device in runs]
    _check_settings(record for each in records for record in each)
    facts = [[_read_facts(record) for record in each] for each in records]
    scores = [[found["best"] for found in each] for each in facts]
    return Comparison((first, second), (scores[0], scores[1]), facts[0][0])


@cache
def student_quantile(freedom: int) -> float:
    """What Student's t exceeds in size with a probability of 5 %, for that many degrees of freedom, two at least."""
    t, step = np.linspace(0.0, 10.0, 1_000_001, retstep=True)
    density = (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    below = 0.5 + scale * step * (np.cumsum(density) - density / 2 - density[0] / 2)
    return float(np.interp(0.975, below, t))


def _newest_runs(config: Path) -> dict[str, dict[int, Path]]:
    """Folder of the newest run, by device and seed."""
    runs: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in sorted(config.glob("*/run.json")):
        facts = _read_facts(file.parent)
        if facts["seed"] is not None and facts["best"] is not None:
            runs[facts["device"]][facts["seed"]] = file.parent
    return runs


def _check_settings(records: Iterable[Path]) -> None:
    settings: Mapping[str, Any] | None = None
    for record in records:
        found = {key: value for key, value in runpy.run_path(str(record / "config.py")).items()
                 if not key.startswith("__") and key not in _OWN_SETTINGS}  # fmt: skip
        if settings is not None and found != settings:
            differ = [key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key)]
            raise ValueError(
                f"runs that are compared must differ in model and seed alone; {record} differs in {', '.join(differ)}"
            )
        settings = found


def _read_facts(record: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((record / "run.json").read_text(encoding="utf-8"))
    return facts
