"""Checkpoints between the official layout (microsoft/Cream, EfficientViT classification), timm's and ours.

Ours is the official layout under `backbone.` and `head.`; the index buffers of the bias tables, which are a
function of the window side, are not stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vitreous_core.errors import StateMismatch

from .ops.head_attention import bias_index

# Official head modules and their names in `EfficientViTMSRAHead`.
_HEADS = {"head.": "head.classifier.", "head_dist.": "head.distillation_classifier."}
# What timm calls the first three children of the second and third stage.
_BETWEEN = ("res1", "patchmerge", "res2")
_TABLE = "attention_biases"
_INDEX = "attention_bias_idxs"


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our classifier state dict from an official one; the inverse of `to_official`.

    Keys that the model does not have keep their place under `backbone.` and are for `check_state` to name.
    Weights of 1x1 convolutions stored as matrices (old official files) become 4-D.

    Args:
        state: the mapping that official checkpoints hold under `model`.

    Raises:
        StateMismatch: when the index buffer of a bias table is missing or is not the official one.
    """
    converted = {}
    for name, tensor in state.items():
        if name.endswith(f".{_TABLE}"):
            _check_index(name, tensor, state)
        elif name.endswith(f".{_INDEX}") and _sibling(name, _TABLE) in state:
            continue
        elif tensor.ndim == 2 and name.endswith((".c.weight", ".fc1.weight", ".fc2.weight")):
            tensor = tensor[:, :, None, None]
        converted[_our_name(name)] = tensor
    return converted


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict from our classifier's, index buffers included; the inverse of `from_official`.

    Raises:
        StateMismatch: for a key that stands neither under `backbone.` nor under a head.
    """
    converted = {}
    for name, tensor in state.items():
        official = _official_name(name)
        converted[official] = tensor
        if official.endswith(f".{_TABLE}"):
            converted[_sibling(official, _INDEX)] = _index_of(official, tensor)
    return converted


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of timm's `efficientvit_m0` to `efficientvit_m5` from that of our classifier with one head."""
    official = to_official(state)
    return {_timm_name(name): tensor for name, tensor in official.items() if not name.endswith(f".{_INDEX}")}


def _timm_name(official: str) -> str:
    parts = official.split(".")
    if parts[0] == "patch_embed":
        parts[1] = f"conv{int(parts[1]) // 2 + 1}"
    elif parts[0].startswith("blocks"):
        stage, child = int(parts[0].removeprefix("blocks")), int(parts[1])
        if stage > 1 and child < len(_BETWEEN):
            place = ["downsample", _BETWEEN[child]]
        else:
            place = ["blocks", str(child - len(_BETWEEN) if stage > 1 else child)]
        parts[:2] = ["stages", str(stage - 1), *place]
    return ".".join({"c": "conv", "l": "linear"}.get(part, part) for part in parts)


def _our_name(name: str) -> str:
    for official, ours in _HEADS.items():
        if name.startswith(official):
            return ours + name.removeprefix(official)
    return f"backbone.{name}"


def _official_name(name: str) -> str:
    for official, ours in _HEADS.items():
        if name.startswith(ours):
            return official + name.removeprefix(ours)
    if not name.startswith("backbone."):
        raise StateMismatch(f"keys must start with one of {['backbone.', *_HEADS.values()]}; got {name!r}")
    return name.removeprefix("backbone.")


def _check_index(name: str, table: Tensor, state: Mapping[str, Tensor]) -> None:
    index_name = _sibling(name, _INDEX)
    if index_name not in state:
        raise StateMismatch(f"state dict is not in the official layout; missing: {index_name}")
    index, expected = state[index_name], _index_of(name, table)
    if index.shape != expected.shape or not torch.equal(index.cpu(), expected.cpu()):
        raise StateMismatch(f"{index_name} is not the row-major (|dy|, |dx|) index of {name}")


def _index_of(name: str, table: Tensor) -> Tensor:
    side = math.isqrt(table.shape[-1])
    if table.ndim != 2 or side * side != table.shape[-1]:
        raise StateMismatch(f"{name} must be [heads, side * side]; got {tuple(table.shape)}")
    return bias_index(side).to(table.device)


def _sibling(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"
