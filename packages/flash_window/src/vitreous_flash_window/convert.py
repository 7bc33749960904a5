"""Checkpoints between the official Swin layout (microsoft/Swin-Transformer, V1 and V2) and ours.

Ours is MMPretrain's: a classifier with `backbone.*` and `head.fc.*`. Besides the names two things differ. Patch merging
belongs to the stage before it in the official V2 code and to the stage after it in ours. And the four pixels of a
merged cell are concatenated by position, in the order (row, column) = (0, 0), (1, 0), (0, 1), (1, 1), there; we order
by channel first, then row and column (`torch.nn.Unfold`), so weights that act on them are permuted.

`attn_mask` buffers, which depend on the image size, are dropped and not made again: the official loader ignores them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from vitreous_core.errors import StateMismatch

# Official name and ours, inside the backbone and apart from patch merging and the last norm.
_RENAMES = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("layers.", "stages."),
    (".attn.", ".attn.w_msa."),
    (".mlp.fc1.", ".ffn.layers.0.0."),
    (".mlp.fc2.", ".ffn.layers.1."),
)
_HEAD = ("head.", "head.fc.")
_STAGE = re.compile(r"(?:layers|stages)\.(\d+)\.")
_MERGING = ".downsample."


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our classifier state dict from an official one; the inverse of `to_official`.

    A state dict in MMPretrain's layout is returned as it is, its `attn_mask` buffers dropped and the name that old
    files give to the last norm made new. Keys that no model has keep their place and are for `check_state` to name.

    Args:
        state: the mapping that official checkpoints hold under `model`.
    """
    ours = any(name.startswith("backbone.") for name in state)
    v2, last = _is_v2(state), _last_stage(state)
    converted = {}
    for name, tensor in state.items():
        if name.endswith(".attn_mask"):
            continue
        if ours:
            converted[_replace_prefix(name, "backbone.norm.", f"backbone.norm{last}.")] = tensor
        elif name.startswith(_HEAD[0]):
            converted[_replace_prefix(name, *_HEAD)] = tensor
        else:
            if _MERGING in name:
                tensor = _reorder_cells(name, tensor, v2, channel_first=True)
                name = _move_stage(name, 1) if v2 else name
            name = _replace_prefix(name, "norm.", f"norm{last}.")
            converted["backbone." + _rename(name, _RENAMES)] = tensor
    return converted


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict from our classifier's; the inverse of `from_official`.

    Raises:
        StateMismatch: for a key that stands neither under `backbone.` nor under `head.fc.`.
    """
    v2, last = _is_v2(state), _last_stage(state)
    converted = {}
    for name, tensor in state.items():
        if name.startswith(_HEAD[1]):
            converted[_replace_prefix(name, _HEAD[1], _HEAD[0])] = tensor
            continue
        if not name.startswith("backbone."):
            raise StateMismatch(f"keys must start with 'backbone.' or {_HEAD[1]!r}; got {name!r}")
        name = name.removeprefix("backbone.")
        if _MERGING in name:
            tensor = _reorder_cells(name, tensor, v2, channel_first=False)
            name = _move_stage(name, -1) if v2 else name
        name = _replace_prefix(name, f"norm{last}.", "norm.")
        converted[_rename(name, [(official, ours) for ours, official in _RENAMES])] = tensor
    return converted


def _is_v2(state: Iterable[str]) -> bool:
    return any(name.endswith(".logit_scale") for name in state)


def _last_stage(state: Iterable[str]) -> int:
    """Index of the last stage, which the final norm of ours is named after."""
    return max((int(match[1]) for name in state if (match := _STAGE.search(name))), default=0)


def _rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for old, new in renames:
        name = name.replace(old, new)
    return name


def _replace_prefix(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _move_stage(name: str, step: int) -> str:
    return _STAGE.sub(lambda match: match[0].replace(match[1], str(int(match[1]) + step)), name, count=1)


def _reorder_cells(name: str, tensor: Tensor, v2: bool, channel_first: bool) -> Tensor:
    """Permute the last dimension of what acts on a merged cell; V2's norm acts on the reduced channels."""
    if not name.endswith("reduction.weight") and (v2 or ".norm." not in name):
        return tensor
    if tensor.shape[-1] % 4:
        raise StateMismatch(f"{name} must act on the channels of four pixels; got shape {tuple(tensor.shape)}")
    if channel_first:
        cells = tensor.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-2, -1)  # column, row, C -> C, row, column
    else:
        cells = tensor.unflatten(-1, (-1, 2, 2)).transpose(-2, -1).movedim(-3, -1)  # C, row, column -> column, row, C
    return cells.flatten(-3).contiguous()
