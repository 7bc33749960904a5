"""State dicts between the official HWT and HNT layouts and ours (classifier layout: `backbone.*`, `head.*`).

Both releases name things alike, so one pair of functions serves both. The relative biases are optional and pass
as they are. An official HWT checkpoint also holds the shift masks of its odd blocks (`attn_mask`), which follow from
the image size and window: they are dropped on the way in and cannot be given back on the way out, so the official
model loads our state with `strict=False` and keeps the masks that it built itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_STAGE = re.compile(r"(?:backbone\.)?(?:layers|levels)\.(\d+)\.")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official keys to ours: the final norm gets its stage's number, the linear head LinearClsHead's name.

    Keys of neither layout pass through the same renaming, so that a check against the model names them.

    Args:
        state: the official state dict, out of its `model` wrapper.
    """
    norm = f"backbone.norm{_last_stage(state)}."
    converted = {}
    for name, tensor in state.items():
        if name.endswith(".attn_mask"):
            continue
        if name.startswith("head."):
            name = "head.fc." + name.removeprefix("head.")
        elif name.startswith("norm."):
            name = norm + name.removeprefix("norm.")
        else:
            name = "backbone." + name
        converted[name] = tensor
    return converted


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our keys to the official ones: the inverse of `from_official`, but for the masks (see the module's text).

    Args:
        state: state dict of an MMPretrain classifier with one of our backbones and a `LinearClsHead`.
    """
    norm = f"norm{_last_stage(state)}."
    converted = {}
    for name, tensor in state.items():
        if name.startswith("head.fc."):
            name = "head." + name.removeprefix("head.fc.")
        else:
            name = name.removeprefix("backbone.")
            if name.startswith(norm):
                name = "norm." + name.removeprefix(norm)
        converted[name] = tensor
    return converted


def _last_stage(state: Mapping[str, Tensor]) -> int:
    stages = (int(match[1]) for match in map(_STAGE.match, state) if match)
    return max(stages, default=0)
