"""What `nox -s tables` renders about this paper: whether models train with the kernels as with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vitreous_core.loss_curves import training_figures, training_pages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER = "efficientvit"


def pages() -> Mapping[str, str]:
    """Markdown by name of the page."""
    return training_pages(_PAPER, "efficientvit-msra-m0_1xb64_digits", " --amp")


def figures() -> Mapping[str, Callable[[], Figure]]:
    """What draws each figure, by its name."""
    return training_figures(_PAPER)
