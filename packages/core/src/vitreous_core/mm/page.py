"""The demo's HTML page: one file with its pictures inside, that can be mailed or opened from a disk."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..indexing import build_order
from ..patterns import (
    Neighborhood1d,
    Neighborhood2d,
    Pattern,
    Slide1d,
    Slide2d,
    Window1d,
    Window2d,
)
from ..pictures import Curve, draw_curve, draw_history, draw_pattern, save_png

_SIDE = 32
_BLOCK = 16
_ON_THE_CURVE: dict[str, Pattern] = {
    "Hilbert window attention": Window1d(49),
    "Hilbert slide attention": Slide1d(49),
    "Hilbert neighborhood attention": Neighborhood1d(49),
}
_ON_THE_IMAGE: dict[str, Pattern] = {
    "Window attention, shifted": Window2d(8, shift=4),
    "Slide attention": Slide2d(7),
    "Neighborhood attention": Neighborhood2d(7),
}
_EASY, _HARD = 8, 8


@dataclass(frozen=True)
class Sample:
    """A held-back digit and what a model says it is.

    Args:
        scan: uint8 `[8, 8]`.
        label: the truth.
        prediction: the model's class.
    """

    scan: NDArray[np.uint8]
    label: int
    prediction: int


@dataclass(frozen=True)
class Run:
    """One model's row on the page.

    Args:
        name, family, paper, url: of the model and its paper.
        parameters: how many.
        backend: attention backend that ran.
        epochs, seconds, best: how training went; `best` is top-1 in per cent.
        losses, scores: (epoch, value) pairs of the training loss and of validation top-1.
        samples: the held-back digits with predictions of the best checkpoint, the same digits for every run.
    """

    name: str
    family: str
    paper: str
    url: str
    parameters: int
    backend: str
    epochs: int
    seconds: float
    best: float
    losses: Sequence[tuple[float, float]]
    scores: Sequence[tuple[float, float]]
    samples: Sequence[Sample]


def write_page(path: Path, runs: Sequence[Run], *, goal: float, machine: Mapping[str, Any]) -> Path:
    """Write the page.

    Args:
        path: the HTML file; its folder is made when it is missing.
        runs: the models, in the order of the table.
        goal: accuracy in per cent that the table marks.
        machine: name and value pairs for the foot of the page.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8"))
    accuracy = draw_history(_curves(runs, "scores"), label="held-back top-1, %", goal=goal)
    loss = draw_history(_curves(runs, "losses"), label="training loss")
    hilbert = build_order("hilbert", _SIDE, _SIDE)
    chosen = _choose_samples(runs)
    text = template.render(
        runs=runs,
        goal=goal,
        machine=machine,
        accuracy=_embed(accuracy),
        loss=_embed(loss),
        curves=[
            _embed(draw_curve(build_order("hilbert", *size), *size, title=f"Hilbert order of {size[0]} x {size[1]}"))
            for size in ((16, 16), (14, 21))
        ],
        on_the_curve=_embed_patterns(_ON_THE_CURVE, hilbert),
        on_the_image=_embed_patterns(_ON_THE_IMAGE, hilbert),
        scans=[(_embed_scan(runs[0].samples[i].scan), runs[0].samples[i].label) for i in chosen],
        answers=[(run.name, [run.samples[i] for i in chosen]) for run in runs],
        held_back=len(runs[0].samples),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _curves(runs: Sequence[Run], what: str) -> list[Curve]:
    return [Curve(run.family, *zip(*getattr(run, what), strict=True)) for run in runs if getattr(run, what)]


def _embed_patterns(patterns: Mapping[str, Pattern], order: NDArray[np.int32]) -> list[str]:
    return [
        _embed(draw_pattern(pattern, _SIDE, _SIDE, order, title=name, query_block=_BLOCK, key_block=_BLOCK))
        for name, pattern in patterns.items()
    ]


def _choose_samples(runs: Sequence[Run]) -> list[int]:
    """The digits that most models miss, hardest first, after some that all get right."""
    misses = Counter(i for run in runs for i, sample in enumerate(run.samples) if sample.prediction != sample.label)
    hard = [i for i, _ in misses.most_common(_HARD)]
    easy = [i for i in range(len(runs[0].samples)) if i not in misses][:_EASY]
    return easy + hard


def _embed(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(save_png(figure)).decode()


def _embed_scan(scan: NDArray[np.uint8]) -> str:
    figure = Figure(figsize=(0.6, 0.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(255 - scan, cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    return _embed(figure)
