"""The fused operators as layers that take the place of folded ones: deploy mode on GPUs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from vitreous_core.errors import BackendUnsupported
from vitreous_core.triton_support import DTYPES

from .attention import CascadedGroupAttention, FoldedCascadedGroupAttention, LocalWindowAttention
from .model import FFN, EfficientViTMSRA, PatchMerging, Residual
from .ops import (
    AttentionWeights,
    Backend,
    ConvolutionWeights,
    DepthwiseWeights,
    FeedForwardWeights,
    cascaded_group_attention,
    choose_backend,
    feed_forward,
    halving_convolution,
    halving_depthwise,
)
from .ops.api import attention_reasons, convolution_reasons, feed_forward_reasons
from .ops.reference import pointwise_convolution
from .ops.weights import bias_of, pack_bias, pack_convolution, pack_depthwise, pack_linear


class FusedAttention(nn.Module):
    """`x + attention(x)` in windows by one kernel; see `ops.cascaded_group_attention`.

    Args:
        attention: the folded module to replace.
        backend: of the operator, in every layer of this file.
    """

    def __init__(self, attention: FoldedCascadedGroupAttention, backend: Backend = "triton") -> None:
        super().__init__()
        self.backend = backend
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
        return cascaded_group_attention(x, self.weights, backend=self.backend)


class FusedFFN(nn.Module):
    """A depthwise convolution with its residual, if there is one, and `y + ffn(y)` after it, by one kernel.

    Args:
        local: the folded convolution before the FFN; None without.
        ffn: the folded FFN to replace.
        backend: see `FusedAttention`.
    """

    def __init__(self, local: nn.Conv2d | None, ffn: FFN, backend: Backend = "triton") -> None:
        super().__init__()
        self.backend = backend
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
        return feed_forward(x, self.weights, backend=self.backend)


class FusedConvolution(nn.Module):
    """A convolution of the stem, 3x3 of stride 2, with bias and ReLU by one kernel.

    Args:
        conv: the folded convolution to replace.
        relu: whether a ReLU follows.
        backend: see `FusedAttention`.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool, backend: Backend = "triton") -> None:
        super().__init__()
        self.relu = relu
        self.backend = backend
        self.weight, self.bias = _constant(pack_convolution(conv)), _constant(bias_of(conv))

    def extra_repr(self) -> str:
        outputs, taps = self.weight.shape
        return f"channels={taps // 9}, outputs={outputs}, relu={self.relu}"

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, height, width]` to a channels-last map of half the height and width."""
        return halving_convolution(x, ConvolutionWeights(self.weight, self.bias), self.relu, backend=self.backend)


class FusedMerging(nn.Module):
    """Patch merging: two 1x1 convolutions, in half precision as matrix products, and one kernel between them.

    The kernel takes both ReLUs, the depthwise convolution and the means that the gate depends on.

    Args:
        merging: the folded module to replace.
        backend: see `FusedAttention`.
    """

    def __init__(self, merging: PatchMerging, backend: Backend = "triton") -> None:
        super().__init__()
        self.backend = backend
        self.expand = _linear(merging.conv1)
        self.local_weight = _constant(pack_depthwise(merging.conv2))
        self.local_bias = _constant(bias_of(merging.conv2))
        self.gate = nn.Sequential(_linear(merging.se.fc1), nn.ReLU(), _linear(merging.se.fc2), nn.Sigmoid())
        self.reduce = _linear(merging.conv3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, height, width]` to a channels-last map of half the height and width."""
        x = x.contiguous(memory_format=torch.channels_last)
        hidden = pointwise_convolution(x, self.expand.weight, self.expand.bias)
        weights = DepthwiseWeights(self.local_weight, self.local_bias)
        hidden, mean = halving_depthwise(hidden, weights, backend=self.backend)
        gated = hidden * self.gate(mean)[:, :, None, None]
        return pointwise_convolution(gated, self.reduce.weight, self.reduce.bias)


def fuse(backbone: nn.Module, backend: Backend = "triton") -> None:
    """Put fused layers in the place of a folded backbone's attention, FFNs, mergings and stem.

    A depthwise convolution in front of an FFN goes into the FFN's kernel, a ReLU after a convolution into that one's;
    both leave an identity behind.

    Args:
        backbone: folded.
        backend: of the operators.

    Raises:
        BackendUnsupported: when the kernels cannot take a layer; nothing has changed then.
    """
    check_fusable(backbone)
    for parent in list(backbone.modules()):
        before: str | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, Residual) and isinstance(child.m, LocalWindowAttention):
                assert isinstance(child.m.attn, FoldedCascadedGroupAttention)
                setattr(parent, name, FusedAttention(child.m.attn, backend))
            elif isinstance(child, Residual) and isinstance(child.m, FFN):
                local = None if before is None else getattr(parent, before)
                setattr(parent, name, FusedFFN(local, child.m, backend))
                if before is not None:
                    setattr(parent, before, nn.Identity())
            elif isinstance(child, PatchMerging):
                setattr(parent, name, FusedMerging(child, backend))
            before = name if _is_depthwise(child) and isinstance(parent, nn.Sequential) else None
    if isinstance(backbone, EfficientViTMSRA):
        _fuse_stem(backbone.patch_embed, backend)


def _fuse_stem(stem: nn.Sequential, backend: Backend) -> None:
    layers = [*stem, None]
    for index, (layer, after) in enumerate(pairwise(layers)):
        if isinstance(layer, nn.Conv2d):
            stem[index] = FusedConvolution(layer, isinstance(after, nn.ReLU), backend)
        else:
            stem[index] = nn.Identity()


def check_fusable(backbone: nn.Module) -> None:
    """Require that the kernels can take every layer of a backbone, folded or not.

    Raises:
        BackendUnsupported: listing every reason by layer.
    """
    if reasons := _reasons(backbone):
        raise BackendUnsupported("triton", reasons)


def is_worth_fusing(backbone: nn.Module) -> bool:
    """Whether the kernels can take every layer of a backbone and win on its device in half precision.

    Half precision, as a model is better lowered to it after the switch; in other dtypes the operators choose PyTorch's.
    """
    weight = next(backbone.parameters())
    wins = choose_backend("cascaded_group_attention", weight.device, torch.float16, weight.shape[0]) == "triton"
    return wins and not _reasons(backbone)


def _reasons(backbone: nn.Module) -> list[str]:
    reasons = []
    for name, module in backbone.named_modules():
        if isinstance(module, CascadedGroupAttention | FoldedCascadedGroupAttention):
            value_dim = module.channels // module.num_heads
            found = attention_reasons(module.key_dim, value_dim, module.window_size)
            if module.head_input != "cascade":
                found.append(f"head_input must be 'cascade'; got {module.head_input!r}")
        elif isinstance(module, FFN):
            found = feed_forward_reasons(next(module.pw1.parameters()).shape[1])
        elif isinstance(module, nn.Conv2d) and name.startswith("patch_embed."):
            found = convolution_reasons(module.out_channels, 9 * module.in_channels)
        else:
            continue
        reasons += [f"{name}: {reason}" for reason in found]
    dtype = next(backbone.parameters()).dtype
    if dtype not in DTYPES:
        reasons.append(f"dtype must be float16, bfloat16 or float32; got {dtype}")
    return reasons


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.groups == module.in_channels


def _linear(conv: nn.Module) -> nn.Linear:
    """A 1x1 convolution as a product over rows."""
    weight, bias = pack_linear(conv), bias_of(conv)
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = _constant(weight), _constant(bias)
    return linear


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
