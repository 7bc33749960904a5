"""The fused operators as layers that take the place of folded ones: deploy mode with `backend="triton"`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitreous_core.errors import BackendUnsupported
from vitreous_core.triton_support import DTYPES

from .attention import CascadedGroupAttention, FoldedCascadedGroupAttention, LocalWindowAttention
from .model import FFN, Residual
from .ops import AttentionWeights, FeedForwardWeights, cascaded_group_attention, feed_forward
from .ops.api import attention_reasons, feed_forward_reasons
from .ops.weights import bias_of, pack_bias, pack_depthwise, pack_linear


class FusedAttention(nn.Module):
    """`x + attention(x)` in windows by one kernel; see `ops.cascaded_group_attention`.

    Args:
        attention: the folded module to replace.
    """

    def __init__(self, attention: FoldedCascadedGroupAttention) -> None:
        super().__init__()
        self.kernel_sizes = attention.kernel_sizes
        self.window_size = attention.window_size
        self.qkv_weight = _constant(torch.stack([pack_linear(qkv) for qkv in attention.qkvs]))
        self.qkv_bias = _constant(torch.stack([bias_of(qkv) for qkv in attention.qkvs]))
        self.query_weight = _constant(torch.cat([pack_depthwise(dw) for dw in attention.dws]))
        self.query_bias = _constant(torch.stack([bias_of(dw) for dw in attention.dws]))
        self.bias_tile = _constant(pack_bias(attention.biases))
        self.proj_weight = _constant(pack_linear(attention.proj))
        self.proj_bias = _constant(bias_of(attention.proj))

    @property
    def weights(self) -> AttentionWeights:
        """As the operator takes them."""
        return AttentionWeights(
            self.qkv_weight, self.qkv_bias, self.query_weight, self.query_bias, self.bias_tile, self.proj_weight,
            self.proj_bias, self.kernel_sizes, self.window_size,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"channels={len(self.proj_bias)}, num_heads={len(self.qkv_bias)}, window_size={self.window_size}"

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, height, width]` to a channels-last map of the same shape."""
        return cascaded_group_attention(x, self.weights, backend="triton")


class FusedFFN(nn.Module):
    """A depthwise convolution with its residual, if there is one, and `y + ffn(y)` after it, by one kernel.

    Args:
        local: the folded convolution before the FFN; None without.
        ffn: the folded FFN to replace.
    """

    def __init__(self, local: nn.Conv2d | None, ffn: FFN) -> None:
        super().__init__()
        self.local_weight = None if local is None else _constant(pack_depthwise(local))
        self.local_bias = None if local is None else _constant(bias_of(local))
        self.in_weight, self.in_bias = _constant(pack_linear(ffn.pw1)), _constant(bias_of(ffn.pw1))
        self.out_weight, self.out_bias = _constant(pack_linear(ffn.pw2)), _constant(bias_of(ffn.pw2))

    @property
    def weights(self) -> FeedForwardWeights:
        """As the operator takes them."""
        return FeedForwardWeights(
            self.local_weight, self.local_bias, self.in_weight, self.in_bias, self.out_weight, self.out_bias
        )

    def extra_repr(self) -> str:
        hidden, channels = self.in_weight.shape
        return f"channels={channels}, hidden={hidden}, local={self.local_weight is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, height, width]` to a channels-last map of the same shape."""
        return feed_forward(x, self.weights, backend="triton")


def fuse(backbone: nn.Module) -> None:
    """Put fused layers in the place of a folded backbone's attention and FFNs.

    A depthwise convolution in front of an FFN goes into the FFN's kernel and leaves an identity behind.

    Raises:
        BackendUnsupported: when the kernels cannot take a layer; nothing has changed then.
    """
    check_fusable(backbone)
    for parent in list(backbone.modules()):
        before: str | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, Residual) and isinstance(child.m, LocalWindowAttention):
                assert isinstance(child.m.attn, FoldedCascadedGroupAttention)
                setattr(parent, name, FusedAttention(child.m.attn))
            elif isinstance(child, Residual) and isinstance(child.m, FFN):
                local = None if before is None else getattr(parent, before)
                setattr(parent, name, FusedFFN(local, child.m))
                if before is not None:
                    setattr(parent, before, nn.Identity())
            before = name if _is_depthwise(child) and isinstance(parent, nn.Sequential) else None


def check_fusable(backbone: nn.Module) -> None:
    """Require that the kernels can take every layer of a backbone, folded or not.

    Raises:
        BackendUnsupported: listing every reason by layer.
    """
    reasons = []
    for name, module in backbone.named_modules():
        if isinstance(module, CascadedGroupAttention | FoldedCascadedGroupAttention):
            value_dim = module.channels // module.num_heads
            found = attention_reasons(module.key_dim, value_dim, module.window_size)
            if module.head_input != "cascade":
                found.append(f"head_input must be 'cascade'; got {module.head_input!r}")
        elif isinstance(module, FFN):
            found = feed_forward_reasons(next(module.pw1.parameters()).shape[1])
        else:
            continue
        reasons += [f"{name}: {reason}" for reason in found]
    dtype = next(backbone.parameters()).dtype
    if dtype not in DTYPES:
        reasons.append(f"dtype must be float16, bfloat16 or float32; got {dtype}")
    if reasons:
        raise BackendUnsupported("triton", reasons)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.groups == module.in_channels


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
