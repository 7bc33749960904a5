"""Putting this package's attention into a Swin that is already built: MMPretrain's or timm's, V1 or V2.

The parameters stay the same objects under the same names, so checkpoints, optimizers and averaged copies still fit.
Neither library is imported here; a model of theirs has done that.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from .attention import FlashShiftWindowMSA, FlashWindowMSA, FlashWindowMSAV2
from .ops import BACKENDS, Backend

Model = TypeVar("Model", bound=nn.Module)

_MMPRETRAIN = "mmpretrain.models.utils.attention.ShiftWindowMSA"
_MMPRETRAIN_WINDOWS = tuple(f"mmpretrain.models.utils.attention.{name}" for name in ("WindowMSA", "WindowMSAV2"))
_TIMM_BLOCKS = (
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block",
)
_SHARED_V1 = ("relative_position_bias_table",)
_SHARED_V2 = ("cpb_mlp", "logit_scale", "q_bias", "v_bias")
_SHARED = ("qkv", "attn_drop", "proj", "proj_drop")


def convert_model(model: Model, backend: Backend = "auto") -> Model:
    """Swap the window attention of a built Swin for `shifted_window_attention`, in place.

    Outputs and gradients stay the same within rounding, and the state-dict keys exactly. MMPretrain's `ShiftWindowMSA`
    becomes a `FlashShiftWindowMSA`; a block of timm's a subclass of its class. In both, what else the model consists
    of stays. A timm model converts for the input size that it has: call its `set_input_size` first.

    Args:
        model: MMPretrain's `SwinTransformer` or `SwinTransformerV2`, timm's of the same names, or a model with one
            inside, such as a classifier or a detector.
        backend: see `ops.shifted_window_attention`.

    Returns:
        `model`.

    Raises:
        ValueError: when no attention in `model` is of a kind known here, or `backend` is no name of one.

    Examples:
        >>> from mmpretrain.models import SwinTransformer
        >>> backbone = convert_model(SwinTransformer("tiny"))
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    swapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = _kind(child)
            if kind == _MMPRETRAIN:
                setattr(parent, name, _from_mmpretrain(child, backend))
                swapped += 1
            elif kind in _TIMM_BLOCKS:
                from .timm_blocks import convert_block

                convert_block(child, share_window_attention(child.attn, backend))
                swapped += 1
    if not swapped:
        raise ValueError(
            f"model must hold Swin attention of MMPretrain or timm that is not converted yet; found none in "
            f"{type(model).__name__}. Modules of other libraries can be built from FlashShiftWindowMSA"
        )
    return model


def share_window_attention(module: nn.Module, backend: Backend) -> FlashWindowMSA | FlashWindowMSAV2:
    """Our window attention on the layers and buffers of MMPretrain's or timm's, which name them alike."""
    v2 = hasattr(module, "logit_scale")
    build = FlashWindowMSAV2 if v2 else FlashWindowMSA
    with torch.device("meta"):  # no memory: every tensor is replaced by the other module's
        shared = build(module.qkv.out_features // 3, module.window_size, module.num_heads, backend=backend)
    shared.embed_dims = module.qkv.in_features
    if not v2:
        shared.scale = module.scale
    for name in (*_SHARED, *(_SHARED_V2 if v2 else _SHARED_V1)):
        setattr(shared, name, getattr(module, name))
    for name in dict(shared.named_buffers(recurse=False)):
        persistent = name not in module._non_persistent_buffers_set
        shared.register_buffer(name, module.get_buffer(name), persistent=persistent)
    return shared.train(module.training)


def _from_mmpretrain(module: nn.Module, backend: Backend) -> FlashShiftWindowMSA:
    if _kind(module.w_msa) not in _MMPRETRAIN_WINDOWS:
        raise ValueError(
            f"w_msa must be {' or '.join(_MMPRETRAIN_WINDOWS)}; got {_kind(module.w_msa)}, which may compute anything"
        )
    w_msa = share_window_attention(module.w_msa, backend)
    with torch.device("meta"):
        shared = FlashShiftWindowMSA(
            w_msa.embed_dims, w_msa.num_heads, module.window_size, module.shift_size, pad_small_map=module.pad_small_map
        )
    shared.w_msa, shared.drop = w_msa, module.drop
    return shared.train(module.training)


def _kind(module: nn.Module) -> str:
    # The class itself and no subclass, which may compute something else.
    return f"{type(module).__module__}.{type(module).__qualname__}"
