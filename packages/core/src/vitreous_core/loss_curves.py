"""Does a kernel train as the reference does? Recorded runs of one config, several seeds on each of two backends.

The yardstick is what the seed alone does to the reference: runs that share nothing but the config differ by that much.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "torch"

_RECORDS = Path("docs/results/repro")

_PAGE = """
# Training with the kernels

```bash
nox -s "reproduce({paper})" -- {config} --seed 0 1 2 --backend torch triton --jobs 6 \\
   {options} --cfg-options default_hooks.logger.interval=10
```

The same configs with `backend="torch"` and `backend="triton"`, the same seeds for both: first weights and data order
agree, what differs is rounding, which training amplifies until two runs are as far apart as two seeds.

{table}
*mean loss difference*: between the two mean curves, averaged over the steps. *expected of equals*: what that would be
between two sets of runs of the same backend with other seeds, from the *seed noise*, the standard deviation between
torch's runs. A backend trains as the reference does when the first does not exceed the second.

![training](../figures/{paper}-training.png)
"""


@dataclass(frozen=True)
class LossCurves:
    """Runs of one config: for each backend a loss by seed and step.

    Args:
        config: name of the config.
        steps: training steps at which the losses were written.
        losses: `[seeds, steps]` by backend, same seeds in the same order.
        scores: best validation score by backend, one for each seed.
        facts: `run.json` of one of the runs.
        commits: of the runs, by backend.
    """

    config: str
    steps: np.ndarray
    losses: Mapping[str, np.ndarray]
    scores: Mapping[str, Sequence[float]]
    facts: Mapping[str, Any]
    commits: Mapping[str, Sequence[str]]

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.losses[REFERENCE])

    def noise(self) -> float:
        """Standard deviation between the reference's seeds, averaged over the steps."""
        return float(self.losses[REFERENCE].std(0, ddof=1).mean())

    def difference(self, backend: str) -> float:
        """Absolute difference between the mean curves of a backend and of the reference, averaged over the steps."""
        means = self.losses[backend].mean(0) - self.losses[REFERENCE].mean(0)
        return float(np.abs(means).mean())

    def expected(self) -> float:
        """What `difference` would be between two sets of the reference's own runs, from its noise."""
        # The difference of two means of `seeds` values has sqrt(2 / seeds) of their deviation; a normal variable's
        # absolute value has the mean sqrt(2 / pi).
        return self.noise() * math.sqrt(2 / self.seeds) * math.sqrt(2 / math.pi)


def read_loss_curves(folder: Path) -> list[LossCurves]:
    """Runs below `docs/results/repro/<paper>` that tell the reference from another backend, a set for each config.

    Of a backend and a seed the newest run on a device counts. All runs of a set have the same resolved config but for
    backend and seed; each backend has the same seeds, two at least.
    """
    found = []
    for config in sorted(path for path in folder.glob("*") if path.is_dir()):
        devices: dict[str, dict[str, dict[int, Path]]] = defaultdict(lambda: defaultdict(dict))
        for record in sorted(config.glob("*/run.json")):
            facts = json.loads(record.read_text(encoding="utf-8"))
            backend, seed = facts.get("backend"), facts["seed"]
            if backend is not None and record.parent.name.endswith(f"-{backend}-seed{seed}"):
                devices[facts["device"]][backend][seed] = record.parent
        for backends in devices.values():
            seeds = set.intersection(*(set(runs) for runs in backends.values()))
            if REFERENCE in backends and len(backends) > 1 and len(seeds) > 1:
                _check_configs([runs[seed] for runs in backends.values() for seed in seeds])
                found.append(_read_set(config.name, backends, sorted(seeds)))
    return found


def _check_configs(records: Sequence[Path]) -> None:
    texts = [(record / "config.py").read_text(encoding="utf-8") for record in records]
    plain = {re.sub(r"^.*\b(backend|seed|work_dir)=?.*$", "", text, flags=re.MULTILINE) for text in texts}
    if len(plain) > 1:
        raise ValueError(f"runs that are compared must differ in backend and seed alone: {records[0].parent}")


def _read_set(config: str, backends: Mapping[str, Mapping[int, Path]], seeds: Sequence[int]) -> LossCurves:
    losses: dict[str, list[dict[int, float]]] = {
        backend: [_read_losses(runs[seed] / "metrics.jsonl") for seed in seeds] for backend, runs in backends.items()
    }
    steps = sorted(set.intersection(*(set(run) for runs in losses.values() for run in runs)))
    described = {
        backend: [json.loads((runs[seed] / "run.json").read_text(encoding="utf-8")) for seed in seeds]
        for backend, runs in backends.items()
    }
    return LossCurves(
        config,
        np.array(steps),
        {backend: np.array([[run[step] for step in steps] for run in runs]) for backend, runs in losses.items()},
        {backend: [facts["best"] for facts in runs] for backend, runs in described.items()},
        described[REFERENCE][0],
        {backend: sorted({facts["commit"] or "release" for facts in runs}) for backend, runs in described.items()},
    )


def _read_losses(path: Path) -> dict[int, float]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def training_pages(paper: str, config: str, options: str = "") -> dict[str, str]:
    """The page about all such runs of a paper, in Markdown by its name; none without runs.

    Args:
        paper: as in `docs/results/repro`.
        config, options: of the example, the latter with a space before each.
    """
    curves = read_loss_curves(_RECORDS / paper)
    if not curves:
        return {}
    return {"training": _PAGE.format(paper=paper, config=config, options=options, table=curves_table(curves))}


def training_figures(paper: str) -> dict[str, Callable[[], Figure]]:
    """What draws the figure of that page, by its name."""
    curves = read_loss_curves(_RECORDS / paper)
    return {"training": partial(curves_figure, curves)} if curves else {}


def curves_table(curves: Sequence[LossCurves]) -> str:
    """Markdown: noise, difference and scores of each config."""
    header = (
        "config", "backend", "seeds", "steps", "mean loss difference", "expected of equals", "seed noise",
        "best top-1 %", "torch's", "machine", "commit", "torch's",
    )  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for entry in curves:
        for backend in entry.losses:
            if backend == REFERENCE:
                continue
            cells = (
                entry.config, backend, str(entry.seeds), str(entry.steps[-1]), f"{entry.difference(backend):.4f}",
                f"{entry.expected():.4f}", f"{entry.noise():.4f}", _spread(entry.scores[backend]),
                _spread(entry.scores[REFERENCE]), entry.facts["device"],
                *(", ".join(commit[:7] for commit in entry.commits[name]) for name in (backend, REFERENCE)),
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def curves_figure(curves: Sequence[LossCurves]) -> Figure:
    """Mean and spread over the seeds by step, a panel for each config; below it the difference of the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(curves), 5.5), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False, sharex="col", height_ratios=(3, 1.4))
    for (top, bottom), entry in zip(panels.T, curves, strict=True):
        reference = entry.losses[REFERENCE]
        for index, (backend, losses) in enumerate(sorted(entry.losses.items())):
            mean, spread = losses.mean(0), losses.std(0, ddof=1)
            style = "-" if backend == REFERENCE else "--"
            top.plot(entry.steps, mean, style, color=f"C{index}", label=backend, linewidth=1.5)
            top.fill_between(entry.steps, mean - spread, mean + spread, color=f"C{index}", alpha=0.2, linewidth=0)
            if backend != REFERENCE:
                bottom.plot(entry.steps, mean - reference.mean(0), color=f"C{index}", label=f"{backend} - {REFERENCE}")
        error = reference.std(0, ddof=1) * math.sqrt(2 / entry.seeds)
        bottom.fill_between(entry.steps, -error, error, color="grey", alpha=0.3, linewidth=0, label="seed noise")
        top.set(title=entry.config, ylabel="training loss", yscale="log")
        bottom.set(xlabel="step", ylabel="difference")
        for panel in (top, bottom):
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8, frameon=False)
    return figure
