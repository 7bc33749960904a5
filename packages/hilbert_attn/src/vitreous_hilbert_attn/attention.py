"""Attention along a space-filling curve: windows, slides and neighbourhoods as modules (arXiv 2511.05832).

Tokens `[B, L, C]` of an image of any `height x width` attend along a curve through it. With positions `i`, `j` on
the curve, token `i` sees `j`

* `HilbertWindowAttention`: iff `(i + s) // A == (j + s) // A`, `A` tokens per window, shift `s` (HWA, HSWA);
* `HilbertSlideAttention`: iff `|i - j| <= K // 2`, `K` odd (HSA);
* `HilbertNeighborhoodAttention`: iff `j` is among the `K` tokens from `clamp(i - K // 2, 0, L - K)` on (HNA).

`attention_2d` holds the modules that attend to squares of the image itself, on the same curves.

Backends: `"torch"` runs `sequence_attention` (or `image_attention`), exact and roughly proportional to the visible
pairs, on any device and in any precision. `"flex"` and `"triton"` run
`vitreous_core.ops.block_sparse_attention` and raise `BackendUnsupported` where they cannot. `"auto"` is `"triton"` on
a GPU where that takes the problem and `"torch"` otherwise.

Size-dependent tables are kept per size and device, so sizes may change from call to call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous_core import indexing
from vitreous_core.ops.block_sparse_attention import (
    Bias,
    RelativeBias1d,
    RelativeBias2d,
    choose_backend,
    packed_attention,
)
from vitreous_core.patterns import Neighborhood1d, Pattern, Slide1d, Window1d

from . import sequence_attention
from .reorder import Curve, OrderName
from .sequence_attention import TokenBias

Backend = Literal["auto", "torch", "flex", "triton"]
BACKENDS = ("auto", "torch", "flex", "triton")


class CurveAttention(nn.Module, ABC):
    """Projections, curve and backend; a subclass says who sees whom and with which bias.

    Args:
        dim: channels `C`.
        num_heads: heads `H`, a divisor of `dim`.
        curve: the token order.
        qkv_bias: whether queries, keys and values have a bias.
        backend: see the module's text.
    """

    def __init__(self, dim: int, num_heads: int, curve: Curve, qkv_bias: bool, backend: Backend) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}; got {num_heads}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}; got {backend!r}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.curve = curve
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def order_tables(self, height: int, width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Gather indices int64 `[L]` from image to curve order, and back."""
        return self.curve.tables(height, width, device)

    def forward(self, tokens: Tensor, size: tuple[int, int] | None = None, *, on_curve: bool = False) -> Tensor:
        """Attend.

        Args:
            tokens: `[B, height * width, C]`; or a channels-last map `[B, height, width, C]` without a `size`.
            size: `(height, width)` of the image that the tokens cover.
            on_curve: False: tokens come and go in row-major image order, and the module reorders them. True: they
                come and go in curve order, as `module.curve.put_on(tokens, height, width)` makes them, which saves
                two copies per module where several follow each other.

        Returns:
            The shape of `tokens`, in their order.

        Raises:
            ValueError: when the tokens are not as many as the size says, or have no size.
            BackendUnsupported: when a named backend cannot run this problem.
        """
        if size is not None:
            return self._on_tokens(tokens, size, on_curve)
        if tokens.ndim != 4 or on_curve:
            raise ValueError(
                "size must be the (height, width) of the tokens, unless these are a map [B, height, width, C] in image "
                f"order; got None for a shape of {tuple(tokens.shape)}"
            )
        size = (int(tokens.shape[1]), int(tokens.shape[2]))
        return self._on_tokens(tokens.flatten(1, 2), size, on_curve).unflatten(1, size)

    def _on_tokens(self, tokens: Tensor, size: tuple[int, int], on_curve: bool) -> Tensor:
        height, width = size
        if int(tokens.shape[1]) != height * width:
            raise ValueError(
                f"tokens must be height * width = {height} * {width} = {height * width} per image; "
                f"got {int(tokens.shape[1])}"
            )
        if not on_curve:
            tokens = self.curve.put_on(tokens, height, width)
        out = self.proj(self.attend(self.qkv(tokens), size))
        return out if on_curve else self.curve.take_off(out, height, width)

    def attend(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """What lies between the projections.

        Args:
            qkv: `[B, height * width, 3 * C]`, queries, keys and values side by side, tokens in curve order.
            size: `(height, width)`.

        Returns:
            `[B, height * width, C]`, heads side by side.
        """
        height, width = size
        pattern, bias = self.pattern(height, width), self._bias(height, width, qkv.device)
        backend = self.backend
        if backend == "auto" and not qkv.is_cuda:
            backend = "torch"
        if backend != "torch":
            tile = self.curve.tile_on(height, width)
            layout = indexing.layout_for(pattern, self.curve.order, height, width, qkv.device, tile=tile)
            if backend == "auto":
                trained = torch.is_grad_enabled() and qkv.requires_grad
                is_taken = choose_backend(qkv, layout, trained, head_dim=self.head_dim) == "triton"
                backend = "triton" if is_taken else "torch"
        if backend != "torch":
            return packed_attention(
                qkv, layout, num_heads=self.num_heads, bias=bias, scale=self.scale, backend=backend
            )  # fmt: skip
        # Unbound along this axis, the three gradients come back as one stack and need no other copy.
        heads = qkv.unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in heads)
        return self._attend(query, key, value, pattern, bias, height, width).transpose(1, 2).flatten(2)

    @abstractmethod
    def pattern(self, height: int, width: int) -> Pattern:
        """Who sees whom on a map of this size."""

    @abstractmethod
    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Any, bias: Any, height: int, width: int
    ) -> Tensor:
        """The torch backend."""

    @abstractmethod
    def _bias(self, height: int, width: int, device: torch.device) -> Bias | None:
        """The bias on a map of this size."""

    def _image_order(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """The cell of every token, as `RelativeBias2d` takes it."""
        return None if self.curve.order == "row_major" else self.curve.tables(height, width, device)[0]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, order={self.curve.order!r}, backend={self.backend!r}"


class HilbertWindowAttention(CurveAttention):
    """Windows of consecutive tokens on a curve, plain (HWA) or shifted (HSWA).

    Windows hold `A = window_size^2` tokens; the first and the last are cut where they do not fit, and no padding is
    ever visible. On a map whose smaller side is at most `window_size`, that side takes the place of `window_size`
    and nothing is shifted.

    Paper: arXiv 2511.05832. Its release rolls the sequence by the shift and masks the window that wraps around;
    where `A` divides the length that equals the closed form used here, which needs neither.

    Args:
        dim: channels `C`.
        num_heads: heads `H`, a divisor of `dim`.
        window_size: side `w` of the square that has the area of a window.
        shift: `s`, `0 <= s < w^2`, in tokens along the curve; the paper uses `w^2 // 2` in every other block.
        order: `"hilbert"`, `"row_major"`, `"morton"`, `"window"` (square windows one after the other: with sides
            that `w` divides, unshifted attention is then ordinary window attention) or `"tile"`.
        relative_bias: learn one global table `relative_position_bias_table`
            `[(2 * height - 1) * (2 * width - 1), H]` indexed by true image offsets
            `(yq - yk + height - 1) * (2 * width - 1) + (xq - xk + width - 1)`.
        map_size: `(height, width)` that the table is made for; needed with `relative_bias`. On a map of another
            size the table is resized, see `resize_bias_table`.
        qkv_bias: whether queries, keys and values have a bias.
        order_tile: side for `order="window"` (default: `window_size`), cut to the map; `(rows, columns)` for `"tile"`.
        backend: see the module's text.

    Raises:
        ValueError: for heads that do not divide `dim`, a shift outside the window, an unknown order or backend.

    Examples:
        >>> attention = HilbertWindowAttention(32, 2, window_size=4, map_size=(12, 20))
        >>> attention(torch.randn(1, 240, 32), (12, 20)).shape
        torch.Size([1, 240, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int = 0,
        *,
        order: OrderName = "hilbert",
        relative_bias: bool = True,
        map_size: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        order_tile: int | tuple[int, int] | None = None,
        backend: Backend = "auto",
    ) -> None:
        if order == "window" and order_tile is None:
            order_tile = window_size
        super().__init__(dim, num_heads, Curve(order, order_tile), qkv_bias, backend)
        # By the smaller side of the map, up to the first that the window fits into with a shift. Made here because
        # torch.compile cannot take a pattern for a constant that the traced call itself has made.
        shrunk = [Window1d(side * side) for side in range(1, _positive("window_size", window_size) + 1)]
        self._patterns = (*shrunk, Window1d(window_size**2, shift))
        self.window_size = window_size
        self.shift = shift
        self.map_size = map_size
        if not relative_bias:
            self.register_parameter("relative_position_bias_table", None)
            return
        if map_size is None:
            raise ValueError(
                "map_size must be the (height, width) that the global bias table is made for; got None. "
                "Give it, or relative_bias=False"
            )
        entries = (2 * map_size[0] - 1) * (2 * map_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(entries, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def pattern(self, height: int, width: int) -> Window1d:
        """The windows on a map of this size, the rule for small maps applied."""
        return self._patterns[min(height, width, self.window_size + 1) - 1]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Window1d, bias: RelativeBias2d | None, *_: int
    ) -> Tensor:
        return sequence_attention.window_attention(
            query, key, value, pattern.size, pattern.shift, scale=self.scale,
            bias=None if bias is None else image_bias(bias),
        )  # fmt: skip

    def _bias(self, height: int, width: int, device: torch.device) -> RelativeBias2d | None:
        table = self.relative_position_bias_table
        if table is None:
            return None
        if (height, width) != self.map_size:
            table = resize_bias_table(table, self.map_size, (height, width))
        return RelativeBias2d(table, height, width, self._image_order(height, width, device))

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift={self.shift}, {super().extra_repr()}"


class _BandAttention(CurveAttention):
    """A band of constant shape along the curve, with a bias by distance on the curve."""

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int, pattern: Slide1d | Neighborhood1d, reach: int,
        order: OrderName, relative_bias: bool, qkv_bias: bool, order_tile: int | tuple[int, int] | None,
        backend: Backend,
    ) -> None:  # fmt: skip
        super().__init__(dim, num_heads, Curve(order, order_tile), qkv_bias, backend)
        self.kernel_size = kernel_size
        self._pattern = pattern
        if relative_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, 2 * reach + 1))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)

    def pattern(self, height: int, width: int) -> Slide1d | Neighborhood1d:
        """The band, the same on every map."""
        return self._pattern

    def _bias(self, height: int, width: int, device: torch.device) -> RelativeBias1d | None:
        return None if self.rpb is None else RelativeBias1d(self.rpb)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, {super().extra_repr()}"


class HilbertSlideAttention(_BandAttention):
    """A band along a curve: each token sees the `kernel_size` tokens centred on it, fewer at both ends (HSA).

    Paper: arXiv 2511.05832.

    Args:
        kernel_size: `K`, odd, counted along the curve (the paper's HSA for a `k x k` slide has `K = k^2`).
        relative_bias: learn a table `rpb` `[H, K]`, entry `j - i + K // 2` for query `i` and key `j`.
        dim, num_heads, order, qkv_bias, backend: as in `HilbertWindowAttention`.
        order_tile: side for `order="window"`, `(rows, columns)` for `"tile"`.

    Raises:
        ValueError: for an even kernel, heads that do not divide `dim`, an unknown order or backend.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        *,
        order: OrderName = "hilbert",
        relative_bias: bool = False,
        qkv_bias: bool = True,
        order_tile: int | tuple[int, int] | None = None,
        backend: Backend = "auto",
    ) -> None:
        pattern = Slide1d(_positive("kernel_size", kernel_size))
        reach = kernel_size // 2
        super().__init__(
            dim, num_heads, kernel_size, pattern, reach, order, relative_bias, qkv_bias, order_tile, backend
        )

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Slide1d, bias: RelativeBias1d | None, *_: int
    ) -> Tensor:
        tile = None if bias is None else curve_bias(bias)
        return sequence_attention.slide_attention(query, key, value, pattern.kernel, scale=self.scale, bias=tile)


class HilbertNeighborhoodAttention(_BandAttention):
    """The `kernel_size` nearest tokens along a curve, the window clamped into the sequence (HNA).

    A map of fewer tokens than `kernel_size` is attended to as a whole. Even kernels start at `i - K // 2`, as in
    NATTEN.

    Paper: arXiv 2511.05832.

    Args:
        kernel_size: `K`, counted along the curve (the paper's HNA for a `k x k` neighbourhood has `K = k^2`).
        relative_bias: learn a table `rpb` `[H, 2 * K - 1]`, entry `j - i + K - 1` for query `i` and key `j`.
        dim, num_heads, order, qkv_bias, order_tile, backend: as in `HilbertSlideAttention`.

    Raises:
        ValueError: for heads that do not divide `dim`, an unknown order or backend.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        *,
        order: OrderName = "hilbert",
        relative_bias: bool = True,
        qkv_bias: bool = True,
        order_tile: int | tuple[int, int] | None = None,
        backend: Backend = "auto",
    ) -> None:
        pattern = Neighborhood1d(_positive("kernel_size", kernel_size))
        reach = kernel_size - 1
        super().__init__(
            dim, num_heads, kernel_size, pattern, reach, order, relative_bias, qkv_bias, order_tile, backend
        )

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Neighborhood1d, bias: RelativeBias1d | None, *_: int
    ) -> Tensor:
        tile = None if bias is None else curve_bias(bias)
        return sequence_attention.neighborhood_attention(query, key, value, pattern.kernel, scale=self.scale, bias=tile)


def resize_bias_table(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A global bias table for a map of another size: bicubic on the grid of offsets, offset zero on offset zero.

    Offsets scale by `(2 * target - 1) / (2 * source - 1)`, nearly the ratio of the sides. The published release has
    no such rule (its input size is fixed); this one is ours.

    Args:
        table: `[(2 * a - 1) * (2 * b - 1), H]` for `(a, b) = source`.
        source, target: `(height, width)` of the maps.

    Returns:
        `[(2 * height - 1) * (2 * width - 1), H]` for `target`, dtype of `table`.
    """
    rows, columns = (2 * side - 1 for side in source)
    grid = table.view(rows, columns, -1).permute(2, 0, 1)[None]
    # Pixel centres of an odd grid map symmetrically about the middle, which is offset zero.
    resized = F.interpolate(_widened(grid), [2 * side - 1 for side in target], mode="bicubic", align_corners=False)
    return resized[0].flatten(1).t().to(table.dtype)


def image_bias(bias: RelativeBias2d) -> TokenBias:
    """`bias` as a function of tokens, for `sequence_attention`."""
    y, x = bias.coordinates()
    columns = bias.offsets[1]
    # The index is a difference of one number per cell, so no table of pairs is needed.
    code = y * columns + x
    origin = (bias.reach[0] - 1) * columns + bias.reach[1] - 1
    table = _widened(bias.table)

    def tile(query: Tensor, key: Tensor) -> Tensor:
        # Offsets beyond the table belong to pairs that nobody sees.
        index = (code[query] - code[key] + origin).clamp(0, len(table) - 1)
        return F.embedding(index, table).movedim(-1, 0)

    return tile


def curve_bias(bias: RelativeBias1d) -> TokenBias:
    """`bias` as a function of tokens, for `sequence_attention`; distances that nobody sees are clamped."""
    reach = bias.kernel - 1
    table = _widened(bias.table).t()

    def tile(query: Tensor, key: Tensor) -> Tensor:
        return F.embedding((key - query).clamp(-reach, reach) + reach, table).movedim(-1, 0)

    return tile


def _widened(table: Tensor) -> Tensor:
    """In fp32 at least, so that the table's gradient is summed in it."""
    return table.to(torch.promote_types(table.dtype, torch.float32))


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return value
