"""What the papers' backbones check alike: which stages they return."""

from __future__ import annotations

from collections.abc import Sequence


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
