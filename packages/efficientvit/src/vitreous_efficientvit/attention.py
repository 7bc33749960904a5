"""Cascaded group attention and its window form (EfficientViT, arXiv 2305.07027, figure 6c).

Parameter names (`c`, `bn`, `qkvs`, `dws`, `proj`, `attention_biases`) are those of the official checkpoints.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitreous_core.autocast import autocast_dtype
from vitreous_core.fold import fold_conv_norm

from .ops import Backend, Convolution, head_attention
from .ops.api import check_backend
from .ops.head_attention import attend, bias_index, pairs_of_entries, resolve_head, spread_table

HeadInput = Literal["cascade", "slice", "full"]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Any], Tensor]


class ConvBN(nn.Sequential):
    """Bias-free convolution and batch norm, no activation.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: side of the kernel.
        stride: stride.
        padding: zero padding on every side.
        groups: groups of the convolution.
        gamma: initial scale of the batch norm; 0 makes a residual branch start as the identity.
        backend: of the convolution, see `ops.Convolution`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        gamma: float = 1.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.c = Convolution(in_channels, out_channels, kernel_size, stride, padding, groups, backend)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.constant_(self.bn.weight, gamma)

    def folded(self, *, gain: float = 1.0, residual: bool = False) -> nn.Conv2d:
        """The single biased convolution that this pair is in evaluation mode, times `gain`, plus its input."""
        return fold_conv_norm(self.c, self.bn, gain=gain, residual=residual)


class CascadedGroupAttention(nn.Module):
    """Attention whose heads see one channel slice each and pass their output on to the next head.

    With slices `x_i` of the input, `u_0 = x_0` and `u_i = x_i + o_{i-1}`; `q, k, v = qkvs_i(u_i)`,
    `q = dws_i(q)` (a depthwise convolution over the window), and
    `o_i = softmax(q k^T / sqrt(key_dim) + bias_i) v`; the result is `proj(relu(concat(o)))`.

    **Paper**: arXiv 2305.07027, "Cascaded Group Attention", figure 6c; the relative bias and the ReLU before the
    projection follow the official code. The bias of (query, key) is entry `|dy| * window_size + |dx|` of the head's
    table, read at every call, so that it follows loading, moving, averaging and training in any mode.

    Args:
        channels: channels in and out; a multiple of `num_heads`.
        num_heads: heads, run one after the other.
        window_size: side of the square windows that come in.
        kernel_sizes: side of the query convolution of each head, odd; the first `num_heads` entries are used.
        key_dim: channels of query and key in every head; values have `channels / num_heads`.
        head_input: what a head sees, `u_i`. `"cascade"`: its slice and the output of the head before, as above. The
            others are the paper's ablations (section 4.4, "Impact of the cascaded group attention"): `"slice"`, its
            slice alone, `u_i = x_i`; `"full"`, all channels as in multi-head self-attention, `u_i = x`.
        backend: of the part of each head between its convolutions, `ops.head_attention`: `"torch"`, `"triton"` or
            `"auto"` (see `ops.choose_head_backend`).

    Raises:
        ValueError: when the heads do not divide the channels, a size is out of range, or `head_input` or `backend` is
            unknown.
    """

    attention_bias_idxs: Tensor
    bias_pairs: Tensor

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int,
        kernel_sizes: Sequence[int],
        key_dim: int = 16,
        head_input: HeadInput = "cascade",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_attention(channels, num_heads, window_size, kernel_sizes, key_dim, head_input)
        check_backend(backend)
        self.channels = channels
        self.num_heads = num_heads
        self.window_size = window_size
        self.key_dim = key_dim
        self.kernel_sizes = tuple(kernel_sizes[:num_heads])
        self.head_input = head_input
        self.backend = backend
        self.value_dim = channels // num_heads
        self.scale = key_dim**-0.5

        seen = channels if head_input == "full" else self.value_dim
        self.qkvs = nn.ModuleList(ConvBN(seen, 2 * key_dim + self.value_dim) for _ in range(num_heads))
        self.dws = nn.ModuleList(
            ConvBN(key_dim, key_dim, kernel, padding=kernel // 2, groups=key_dim, backend=backend)
            for kernel in self.kernel_sizes
        )
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(channels, channels, gamma=0.0))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window_size**2))
        self.register_buffer("attention_bias_idxs", bias_index(window_size), persistent=False)
        self.register_buffer("bias_pairs", pairs_of_entries(window_size), persistent=False)
        self.register_load_state_dict_pre_hook(_resize_loaded_table)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, num_heads={self.num_heads}, window_size={self.window_size}"

    def forward(self, windows: Tensor) -> Tensor:
        """Attend inside each window.

        Args:
            windows: `[B*W, C, window_size, window_size]`.

        Returns:
            `[B*W, C, window_size, window_size]`.

        Raises:
            ValueError: for another shape.
            BackendUnsupported: when `backend="triton"` cannot run this.
        """
        _check_windows(windows, self.channels, self.window_size)
        dtype = windows.dtype if windows.dtype == torch.float64 else autocast_dtype(windows.device) or windows.dtype
        sizes = self.window_size, self.key_dim, self.value_dim
        run: Attend
        biases: Tensor = self.attention_biases
        if resolve_head(self.backend, windows.device, dtype, *sizes) == "triton":
            run = partial(head_attention, backend="triton")
        else:
            run, biases = attend, spread_table(biases, self.attention_bias_idxs, self.bias_pairs)
        return self.proj(cascade(windows, self.qkvs, self.dws, biases, self.scale, self.head_input, run))

    def folded(self) -> FoldedCascadedGroupAttention:
        """What this module is in evaluation mode, for inference only."""
        return FoldedCascadedGroupAttention(self)


class FoldedCascadedGroupAttention(nn.Module):
    """`CascadedGroupAttention` for inference: no norms, no scale, no gather.

    The batch norms are in their convolutions, `1 / sqrt(key_dim)` is in the query's convolution, the last linear map
    before the scores, and `biases` holds the bias of every (query, key) pair.

    What cannot be folded: the ReLU stands between the values' convolution and the projection. The shift of the keys
    adds the same to all scores of a query, which softmax takes away again, but one convolution makes queries, keys and
    values, so leaving it out saves nothing.

    Args:
        attention: the module to fold, in evaluation mode.
    """

    biases: Tensor

    def __init__(self, attention: CascadedGroupAttention) -> None:
        super().__init__()
        self.channels = attention.channels
        self.num_heads = attention.num_heads
        self.window_size = attention.window_size
        self.key_dim = attention.key_dim
        self.kernel_sizes = attention.kernel_sizes
        self.head_input = attention.head_input
        self.qkvs = nn.ModuleList(_fold(layer) for layer in attention.qkvs)
        self.dws = nn.ModuleList(_fold(layer, gain=attention.scale) for layer in attention.dws)
        self.proj = _fold(attention.proj[1])
        self.register_buffer("biases", attention.attention_biases.detach()[:, attention.attention_bias_idxs])

    def extra_repr(self) -> str:
        return f"channels={self.channels}, num_heads={self.num_heads}, window_size={self.window_size}"

    def forward(self, windows: Tensor) -> Tensor:
        """Attend inside each window: as `CascadedGroupAttention.forward`."""
        _check_windows(windows, self.channels, self.window_size)
        return self.proj(cascade(windows, self.qkvs, self.dws, self.biases, head_input=self.head_input).relu())


def cascade(
    windows: Tensor,
    qkvs: Iterable[Callable[[Tensor], Tensor]],
    dws: Iterable[Callable[[Tensor], Tensor]],
    biases: Tensor,
    scale: float | None = None,
    head_input: HeadInput = "cascade",
    run: Attend = attend,
) -> Tensor:
    """The heads of cascaded group attention, one after the other; see `CascadedGroupAttention`.

    Args:
        windows: `[B*W, H*d, r, r]`.
        qkvs: for each head the map from the channels it sees to those of query, key and value, the last `d`.
        dws: for each head the map of its query over the window.
        biases: of each head what `run` takes, `[H, ...]`.
        scale: factor on the scores before the bias; None when `dws` has it.
        head_input: what a head sees.
        run: maps query, key, value, one head's bias and `scale` to its output.

    Returns:
        The heads' outputs `[B*W, H*d, r, r]`, before ReLU and projection.
    """
    outputs: list[Tensor] = []
    pieces = windows.chunk(len(biases), dim=1)
    for piece, qkv, dw, bias in zip(pieces, qkvs, dws, biases, strict=True):
        match head_input:
            case "cascade":
                source = piece + outputs[-1] if outputs else piece
            case "slice":
                source = piece
            case "full":
                source = windows
        mixed = qkv(source)
        key_dim = (mixed.shape[1] - piece.shape[1]) // 2
        query, key, value = mixed.split([key_dim, key_dim, piece.shape[1]], dim=1)
        outputs.append(run(dw(query), key, value, bias, scale))
    return torch.cat(outputs, dim=1)


class LocalWindowAttention(nn.Module):
    """Cascaded group attention inside non-overlapping windows of a map of any size.

    The map is padded with zeros on the bottom and right to whole windows and the result is cropped. As in
    the official code the padded positions are **not masked**: they carry the shift of the QKV batch norms and
    take part in the softmax of their window as keys.

    Args:
        channels, num_heads, window_size, kernel_sizes, key_dim, head_input, backend: see `CascadedGroupAttention`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int,
        kernel_sizes: Sequence[int],
        key_dim: int = 16,
        head_input: HeadInput = "cascade",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.attn: CascadedGroupAttention | FoldedCascadedGroupAttention
        self.attn = CascadedGroupAttention(channels, num_heads, window_size, kernel_sizes, key_dim, head_input, backend)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, height, width]` to a map of the same shape."""
        height, width = x.shape[-2:]
        window = self.attn.window_size
        if (height, width) == (window, window):
            return self.attn(x)
        below, right = -height % window, -width % window
        padded = F.pad(x, (0, right, 0, below)) if below or right else x  # padding by nothing would copy
        windows = window_partition(padded, window)
        merged = window_reverse(self.attn(windows), *padded.shape[-2:])
        return merged[..., :height, :width]

    def fold(self) -> None:
        """Put the attention's folded form in its place."""
        assert isinstance(self.attn, CascadedGroupAttention)
        self.attn = self.attn.folded()


def resize_bias_table(table: Tensor, window_size: int) -> Tensor:
    """A bias table for another window side, resized bicubically over (|dy|, |dx|) as officially.

    Args:
        table: `[H, M]`, M a square number, floating.
        window_size: new side.

    Returns:
        `[H, window_size**2]`, the dtype of `table`.

    Raises:
        ValueError: when M is no square number.
    """
    heads, entries = table.shape
    side = math.isqrt(entries)
    if side * side != entries:
        raise ValueError(f"table must have a square number of entries per head; got shape {tuple(table.shape)}")
    grid = table.to(torch.promote_types(table.dtype, torch.float32)).view(1, heads, side, side)
    resized = F.interpolate(grid, size=(window_size, window_size), mode="bicubic", align_corners=False)
    return resized.view(heads, window_size**2).to(table.dtype)


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """Cut `[B, C, height, width]`, both sides multiples of the window, into `[B*W, C, window, window]`.

    Windows of one image are in row-major order, those of a channels-last map channels-last.
    """
    batch, channels, height, width = x.shape
    rows, columns = height // window_size, width // window_size
    if x.is_contiguous(memory_format=torch.channels_last):
        strips = x.permute(0, 2, 3, 1).reshape(batch * rows, window_size, columns, window_size, channels)
        cells = strips.transpose(1, 2).reshape(batch * rows * columns, window_size, window_size, channels)
        return cells.permute(0, 3, 1, 2)
    # In two steps, because Core ML knows tensors of five dimensions at most.
    x = x.view(batch, channels, rows, window_size, width).transpose(1, 2)
    x = x.reshape(batch * rows, channels, window_size, columns, window_size).permute(0, 3, 1, 2, 4)
    return x.reshape(batch * rows * columns, channels, window_size, window_size)


def window_reverse(windows: Tensor, height: int, width: int) -> Tensor:
    """Put the windows of `window_partition` back: `[B*W, C, window, window]` to `[B, C, height, width]`."""
    channels, window_size = windows.shape[1:3]
    rows, columns = height // window_size, width // window_size
    batch = windows.shape[0] // (rows * columns)
    if windows.is_contiguous(memory_format=torch.channels_last):
        strips = windows.permute(0, 2, 3, 1).reshape(batch * rows, columns, window_size, window_size, channels)
        return strips.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    x = windows.view(batch * rows, columns, channels, window_size, window_size).permute(0, 2, 3, 1, 4)
    x = x.reshape(batch, rows, channels, window_size, width).transpose(1, 2)
    return x.reshape(batch, channels, height, width)


def _resize_loaded_table(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    assert isinstance(module, CascadedGroupAttention)
    name = f"{prefix}attention_biases"
    table = state.get(name)
    if table is None or table.ndim != 2 or table.shape == module.attention_biases.shape:
        return
    side = math.isqrt(table.shape[1])
    if table.shape[0] != module.num_heads or side * side != table.shape[1]:
        return  # no table of this layer at any window: load_state_dict reports the shapes
    warnings.warn(
        f"attention_biases of {side}x{side} windows are resized to "
        f"{module.window_size}x{module.window_size}: the checkpoint was made for another img_size",
        stacklevel=2,
    )
    state[name] = resize_bias_table(table, module.window_size)


def _fold(layer: nn.Module, gain: float = 1.0) -> nn.Conv2d:
    assert isinstance(layer, ConvBN)
    return layer.folded(gain=gain)


def _check_windows(windows: Tensor, channels: int, window_size: int) -> None:
    expected = (channels, window_size, window_size)
    if windows.ndim != 4 or tuple(windows.shape[1:]) != expected:
        raise ValueError(
            f"windows must be [B*W, {', '.join(map(str, expected))}]; got {tuple(windows.shape)}. "
            "LocalWindowAttention cuts a map of any size into such windows"
        )


def _check_attention(
    channels: int, num_heads: int, window_size: int, kernel_sizes: Sequence[int], key_dim: int, head_input: str
) -> None:
    for name, value in (("num_heads", num_heads), ("window_size", window_size), ("key_dim", key_dim)):
        if value < 1:
            raise ValueError(f"{name} must be positive; got {value}")
    if channels < 1 or channels % num_heads:
        raise ValueError(
            f"num_heads must divide channels; got {num_heads} heads for {channels} channels. "
            f"Choose channels as a multiple of {num_heads}"
        )
    if len(kernel_sizes) < num_heads:
        raise ValueError(f"kernel_sizes needs an entry for each of the {num_heads} heads; got {tuple(kernel_sizes)}")
    if any(kernel < 1 or kernel % 2 == 0 for kernel in kernel_sizes):
        raise ValueError(
            f"kernel_sizes must be odd and positive so that the map keeps its size; got {tuple(kernel_sizes)}"
        )
    if head_input not in get_args(HeadInput):
        raise ValueError(f"head_input must be one of {', '.join(map(repr, get_args(HeadInput)))}; got {head_input!r}")
