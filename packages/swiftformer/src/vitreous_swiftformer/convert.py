"""Checkpoints between the official layout (Amshaker/SwiftFormer), timm's and ours.

Released files hold the state dict under `model`. Ours is the same under `backbone.` and `head.`, so both ways
only rename. Dense-prediction checkpoints (`norm0` to `norm6`, no head) convert as well.

**The first released weights cannot be told apart.** They were trained with every token weight equal to one, then
the code was corrected to normalise the weights over the tokens and new weights were released under the same keys
and shapes. Old weights load here without any error and give wrong results; use files released since.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vitreous_core.errors import StateMismatch

_CLASSIFIERS = ("head.", "dist_head.")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our classifier state dict from an official one; the inverse of `to_official`.

    Keys that the model does not have keep their place under `backbone.`, for `check_state` to name.

    Args:
        state: the mapping that official checkpoints hold under `model`.
    """
    return {
        ("head." if name.startswith(_CLASSIFIERS) else "backbone.") + name: tensor for name, tensor in state.items()
    }


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict from our classifier's; the inverse of `from_official`.

    Raises:
        StateMismatch: for a key that stands neither under `backbone.` nor under `head.`.
    """
    converted = {}
    for name, tensor in state.items():
        owner, _, official = name.partition(".")
        if owner not in ("backbone", "head") or not official:
            raise StateMismatch(f"keys must start with 'backbone.' or 'head.'; got {name!r}")
        converted[official] = tensor
    return converted


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of timm's `swiftformer_xs` to `swiftformer_l3` from that of our classifier with two heads."""
    return {_timm_name(name): tensor for name, tensor in to_official(state).items()}


def _timm_name(official: str) -> str:
    parts = official.split(".")
    if parts[0] == "patch_embed":
        parts[0] = "stem"
    elif parts[0] == "dist_head":
        parts[0] = "head_dist"
    elif parts[0] == "network":
        stage, is_stage = divmod(int(parts[1]) + 1, 2)
        parts[:2] = ["stages", str(stage), "blocks" if is_stage else "downsample"]
    if parts[-1].startswith("layer_scale"):
        parts.append("gamma")
    return ".".join(parts).replace(".Proj.", ".proj.")
