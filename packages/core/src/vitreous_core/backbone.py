"""What the papers' backbones check alike: which stages they return, and what a folded model may do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def stage_indices(out_indices: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """Indices of the stages to return, from zero, each once, in the order of the stages.

    Args:
        out_indices: one stage or several; negative ones count from the end.
        stages: how many there are.

    Raises:
        TypeError: for no integers.
        ValueError: for an index that is out of range.
    """
    indices = (out_indices,) if isinstance(out_indices, int) else out_indices
    if not isinstance(indices, Sequence) or not indices or not all(isinstance(index, int) for index in indices):
        raise TypeError(f"out_indices must be an int or a sequence of ints; got {out_indices!r}")
    if any(not -stages <= index < stages for index in indices):
        raise ValueError(f"out_indices must lie in {-stages}..{stages - 1}; got {out_indices}")
    return tuple(sorted({index % stages for index in indices}))


def check_evaluating(module: nn.Module) -> None:
    """Require evaluation mode, for folding batch norms.

    Raises:
        RuntimeError: in training mode, where batch norms are no fixed maps.
    """
    if module.training:
        raise RuntimeError("switch_to_deploy folds running statistics and needs evaluation mode; call eval() first")


def check_trainable(deploy: bool, mode: bool) -> None:
    """Refuse training mode to a model whose batch norms are folded away.

    Args:
        deploy: whether it is folded.
        mode: the mode asked for, as in `nn.Module.train`.

    Raises:
        RuntimeError: for training mode.
    """
    if deploy and mode:
        raise RuntimeError(
            "this model is switched to deploy and cannot train; build a new one and load the original weights"
        )
