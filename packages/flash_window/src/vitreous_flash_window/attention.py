"""Window attention of Swin V1 and V2 as modules: the projections and bias tables around the operations in `ops`.

Constructor arguments, call signatures and state-dict keys are those of MMPretrain 1.2.0 (`WindowMSA`,
`WindowMSAV2`, `ShiftWindowMSA`), plus `backend`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous_core.autocast import without_autocast

from .layers import LayerConfig, build_dropout, pair
from .ops import Backend, shifted_window_attention, window_attention
from .ops.reference import (
    NORM_EPS,
    accumulation_dtype,
    logit_factor,
    relative_position_index,
)

_INIT_STD = 0.02


class _WindowAttention(nn.Module, ABC):
    """What V1 and V2 share: the projections, dropout, and cutting the packed tensor."""

    def __init__(self, embed_dims: int, window_size: int | Sequence[int], num_heads: int, backend: Backend) -> None:
        super().__init__()
        if num_heads < 1 or embed_dims % num_heads:
            raise ValueError(f"num_heads must divide embed_dims = {embed_dims}; got {num_heads}")
        self.embed_dims = embed_dims
        self.window_size = pair("window_size", window_size)
        if min(self.window_size) < 1:
            raise ValueError(f"window_size must be positive; got {window_size!r}")
        self.num_heads = num_heads
        self.head_dim = embed_dims // num_heads
        self.backend = backend

    def _add_layers(self, qkv_bias: bool, attn_drop: float, proj_drop: float) -> None:
        # Called last, so that parameters come in MMPretrain's order and its optimizer states fit.
        self.register_buffer("relative_position_index", relative_position_index(*self.window_size))
        self.qkv = init_linear(self.embed_dims, 3 * self.embed_dims, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = init_linear(self.embed_dims, self.embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)

    @abstractmethod
    def project_in(self, x: Tensor) -> Tensor:
        """`[..., C]` to packed queries, keys and values `[..., 3 * C]`."""

    @abstractmethod
    def zero_token(self, x: Tensor) -> Tensor | None:
        """What `project_in` makes of a zero token beside `x`, `[3 * C]`; None for zero."""

    @abstractmethod
    def bias_table(self) -> Tensor:
        """Bias `[(2 * height - 1) * (2 * width - 1), H]` by offset."""

    @abstractmethod
    def score_factor(self) -> dict[str, Any]:
        """What multiplies the products of queries and keys, as an argument of `shifted_window_attention`."""

    def project_out(self, x: Tensor) -> Tensor:
        """Output projection of `[..., C]`, with dropout."""
        return self.proj_drop(self.proj(x))

    def dropout_p(self) -> float:
        """Probability with which attention weights are dropped now."""
        return self.attn_drop.p if self.training else 0.0

    def forward_image(self, image: Tensor, shift_size: int) -> Tensor:
        """Attention inside the (shifted) windows of `image` `[B, height, width, C]`, any height and width.

        The operation takes the packed queries, keys and values as the projection leaves them: nothing is copied.
        """
        side, window_width = self.window_size
        if side != window_width:
            raise ValueError(
                f"window_size must be square on a whole image; got {self.window_size}: cut the windows and call the "
                "module on them"
            )
        is_padded = image.shape[1] % side != 0 or image.shape[2] % side != 0
        out = shifted_window_attention(
            self.project_in(image),
            self.bias_table(),
            num_heads=self.num_heads,
            window_size=side,
            shift_size=shift_size,
            # Where nothing is padded its gradient would be a tensor of zeros to add.
            pad_qkv=self.zero_token(image) if is_padded else None,
            dropout_p=self.dropout_p(),
            backend=self.backend,
            **self.score_factor(),
        )
        return self.project_out(out)

    def _bias(self) -> Tensor:
        # Summed over all pairs of one offset in the backward pass, hence at least in float32.
        table = self.bias_table()
        table = table.to(accumulation_dtype(table.dtype))
        return table[self.relative_position_index].permute(2, 0, 1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        windows, tokens, _ = x.shape
        qkv = self.project_in(x).view(windows, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return query, key, value

    def _check_windows(self, x: Tensor) -> None:
        tokens = math.prod(self.window_size)
        if x.ndim != 3 or x.shape[1:] != (tokens, self.embed_dims):
            raise ValueError(f"x must be [B * W, {tokens}, {self.embed_dims}]; got {tuple(x.shape)}")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Functions of the window size: a file written for another window must not override them.
        for name, buffer in self.named_buffers(recurse=False):
            if name not in self._non_persistent_buffers_set:
                state_dict[f"{prefix}{name}"] = buffer
        super()._load_from_state_dict(state_dict, prefix, *args)


class FlashWindowMSA(_WindowAttention):
    """Window attention with a table of relative position biases (Swin, arXiv 2103.14030, eq. 4).

    Loading a bias table of another (square) window size resizes it.

    Args:
        embed_dims: C.
        window_size: side, or (height, width), of the windows.
        num_heads: H, divides C.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor on the scores; default `(C / H) ** -0.5`.
        attn_drop, proj_drop: dropout on the attention weights and on the output.
        backend: see `ops.window_attention`.
    """

    def __init__(
        self,
        embed_dims: int,
        window_size: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(embed_dims, window_size, num_heads, backend)
        self.scale = qk_scale or self.head_dim**-0.5
        height, width = self.window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=_INIT_STD)
        self._add_layers(qkv_bias, attn_drop, proj_drop)

    def project_in(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def zero_token(self, x: Tensor) -> Tensor | None:
        if type(self.qkv) is nn.Linear:
            return self.qkv.bias
        return self.qkv(x.new_zeros(self.embed_dims))  # a layer that somebody put in its place, for adapters say

    def bias_table(self) -> Tensor:
        return self.relative_position_bias_table

    def score_factor(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention inside windows that are already cut.

        Args:
            x: `[B * W, N, C]`, the W windows of an image next to each other.
            mask: `[W, N, N]`, bool (True: visible) or added to the scores.

        Returns:
            `[B * W, N, C]`.
        """
        self._check_windows(x)
        query, key, value = self._split(x)
        out = window_attention(
            query, key, value, self._bias(), mask,
            scale=self.scale, dropout_p=self.dropout_p(), backend=self.backend,
        )  # fmt: skip
        return self.project_out(out.transpose(1, 2).flatten(2))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        name = f"{prefix}relative_position_bias_table"
        table, (height, width) = state_dict.get(name), self.window_size
        if table is not None and height == width and _is_square_table(table) and len(table) != (2 * height - 1) ** 2:
            state_dict[name] = resize_bias_table(table, height)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FlashWindowMSAV2(_WindowAttention):
    """Scaled cosine window attention with a continuous position bias (Swin V2, arXiv 2111.09883, section 3).

    Args:
        embed_dims: C.
        window_size: side, or (height, width), of the windows.
        num_heads: H, divides C.
        qkv_bias: whether queries and values have a bias; keys have none.
        attn_drop, proj_drop: dropout on the attention weights and on the output.
        cpb_mlp_hidden_dims: hidden width of the network that computes the bias from log-spaced offsets.
        pretrained_window_size: side, or (height, width), of the windows that the network was trained with; zero
            means `window_size`.
        backend: see `ops.window_attention`.
    """

    def __init__(
        self,
        embed_dims: int,
        window_size: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        cpb_mlp_hidden_dims: int = 512,
        pretrained_window_size: int | Sequence[int] = (0, 0),
        backend: Backend = "auto",
    ) -> None:
        super().__init__(embed_dims, window_size, num_heads, backend)
        self.cpb_mlp = nn.Sequential(
            init_linear(2, cpb_mlp_hidden_dims),
            nn.ReLU(inplace=True),
            init_linear(cpb_mlp_hidden_dims, num_heads, bias=False),
        )
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        trained = pair("pretrained_window_size", pretrained_window_size)
        reference_size = trained if trained[0] > 0 else self.window_size
        self.register_buffer("relative_coords_table", _log_offsets(self.window_size, reference_size))
        self.q_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        # The qkv layer itself has no bias, or keys would have one.
        self._add_layers(False, attn_drop, proj_drop)

    def project_in(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.zero_token(x))

    def zero_token(self, x: Tensor) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])

    def score_factor(self) -> dict[str, Any]:
        return {"logit_scale": self.logit_scale}

    def bias_table(self) -> Tensor:
        # Outside autocast: at its size of up to 16, a bias rounded to bfloat16 is off by up to 1/32.
        with without_autocast(self.relative_coords_table):
            table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
            return 16 * torch.sigmoid(table)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention inside windows that are already cut; see `FlashWindowMSA.forward`."""
        self._check_windows(x)
        query, key, value = self._split(x)
        dtype = accumulation_dtype(query.dtype)
        # Scores reach 100 + 16, so unit vectors rounded to a low dtype would not do: the operation gets the wide one.
        with without_autocast(x):
            factor = logit_factor(self.logit_scale.to(dtype))
            query = F.normalize(query.to(dtype), dim=-1, eps=NORM_EPS) * factor
            key = F.normalize(key.to(dtype), dim=-1, eps=NORM_EPS)
            out = window_attention(
                query, key, value.to(dtype), self._bias(), mask,
                scale=1.0, dropout_p=self.dropout_p(), backend=self.backend,
            )  # fmt: skip
        return self.project_out(out.to(value.dtype).transpose(1, 2).flatten(2))


class FlashShiftWindowMSA(nn.Module):
    """Attention of a Swin block on a token sequence: shift, windows, attention and back, and the drop after it.

    A map exactly as small as the window is not shifted, and a smaller one is an error, unless `pad_small_map`.

    Args:
        embed_dims: C.
        num_heads: H, divides C.
        window_size: side of the square windows.
        shift_size: `0 <= shift_size < window_size`.
        dropout_layer: `dict(type="DropPath" | "Dropout", drop_prob=...)` on the output, or None.
        pad_small_map: shift maps of the size of the window, and pad smaller ones up to it.
        window_msa: `FlashWindowMSA`, `FlashWindowMSAV2` or anything with their constructor and `forward_image`.
        backend: see `ops.shifted_window_attention`.
        **kwargs: further arguments of `window_msa`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        shift_size: int = 0,
        dropout_layer: LayerConfig | None = {"type": "DropPath", "drop_prob": 0.0},  # noqa: B006 (never mutated)
        pad_small_map: bool = False,
        window_msa: Callable[..., nn.Module] = FlashWindowMSA,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not 0 <= shift_size < window_size:
            raise ValueError(f"shift_size must be in [0, window_size = {window_size}); got {shift_size}")
        self.window_size = window_size
        self.shift_size = shift_size
        self.pad_small_map = pad_small_map
        self.w_msa = window_msa(
            embed_dims=embed_dims,
            window_size=(window_size, window_size),
            num_heads=num_heads,
            backend=backend,
            **kwargs,
        )
        if not hasattr(self.w_msa, "forward_image"):
            raise TypeError(
                "window_msa must build a module with forward_image(image, shift_size), such as FlashWindowMSA; "
                f"got {type(self.w_msa).__name__}"
            )
        self.drop = build_dropout(dropout_layer)

    def forward(self, query: Tensor, hw_shape: Sequence[int], drop: bool = True) -> Tensor:
        """`[B, height * width, C]` and `(height, width)` to `[B, height * width, C]`.

        Without `drop`, `dropout_layer` is left to the caller.

        Raises:
            ValueError: when the lengths disagree, or the map is smaller than the window without `pad_small_map`.
        """
        height, width = hw_shape
        if query.ndim != 3 or query.shape[1] != height * width:
            raise ValueError(
                f"query must be [B, {height} * {width}, C] for hw_shape = {(height, width)}; got {tuple(query.shape)}"
            )
        out = self.w_msa.forward_image(query.unflatten(1, (height, width)), self.shift_on(height, width))
        out = out.flatten(1, 2)
        return self.drop(out) if drop else out

    def shift_on(self, height: int, width: int) -> int:
        """The shift on a map of this size; an error for a map that is too small."""
        if self.pad_small_map or min(height, width) > self.window_size:
            return self.shift_size
        if min(height, width) < self.window_size:
            raise ValueError(
                f"the map ({height}, {width}) is smaller than window_size = {self.window_size}; set "
                "pad_small_map=True, a smaller window_size, or pass a larger image"
            )
        return 0


def resize_bias_table(table: Tensor, window_size: int) -> Tensor:
    """A bias table for another window size, by cubic splines along both offsets.

    The offsets of the source are taken to lie at growing distances `1, 1 + q, 1 + q + q^2, ...` that end at the
    largest target offset: near offsets keep their place and far ones are stretched (the scheme of BEiT, arXiv
    2106.08254, which MMPretrain and Swin fine-tuning use). Targets beyond the source take its last value.

    Args:
        table: `[(2 * s - 1) ** 2, H]` for windows of side s.
        window_size: target side.

    Returns:
        `[(2 * window_size - 1) ** 2, H]`, dtype and device of `table`; computed in float64.

    Raises:
        ValueError: when `table` belongs to no square window, or to one smaller than 3.
    """
    # Only needed to adapt a checkpoint, and slow to import.
    from scipy.interpolate import make_interp_spline

    if not _is_square_table(table) or len(table) < 25:
        raise ValueError(f"table must be [(2 * s - 1) ** 2, H] with s >= 3; got {tuple(table.shape)}")
    source, reach = math.isqrt(len(table)), window_size - 1
    distances = _growing_distances(source // 2, reach)
    positions = np.concatenate([-distances[::-1], [0.0], distances])
    targets = np.clip(np.arange(-reach, reach + 1), positions[0], positions[-1])
    resample = torch.from_numpy(make_interp_spline(positions, np.eye(source), k=3)(targets))
    image = table.detach().double().cpu().view(source, source, -1)
    resized = torch.einsum("yi,xj,ijh->yxh", resample, resample, image)
    return resized.flatten(0, 1).to(table)


def _growing_distances(count: int, reach: int) -> np.ndarray:
    """`1, 1 + q, ...` (`count` of them) with the q in [1.01, 1.5] whose last distance comes closest to `reach`."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if sum(ratio**i for i in range(count)) > reach:
            high = ratio
        else:
            low = ratio
    return np.cumsum(ratio ** np.arange(count))


def _is_square_table(table: Tensor) -> bool:
    side = math.isqrt(len(table))
    return table.ndim == 2 and side**2 == len(table) and side % 2 == 1


def _log_offsets(window_size: tuple[int, int], reference_size: tuple[int, int]) -> Tensor:
    """Offsets `[1, 2 * height - 1, 2 * width - 1, 2]` on the log scale of Swin V2, eq. 4, as its network takes them.

    `sign(x) log2(1 + |x|) / log2(8)`, where x is the offset scaled to 8 at the edge of the reference window.
    """
    axes = [
        torch.arange(1 - size, size, dtype=torch.float32) / max(reference - 1, 1) * 8
        for size, reference in zip(window_size, reference_size, strict=True)
    ]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]
    return offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)


def init_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Swin's initial values."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    nn.init.trunc_normal_(linear.weight, std=_INIT_STD)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
