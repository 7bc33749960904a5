"""Attention to squares of the image itself, exact under every token order: neighbourhoods, slides and windows.

These are not in arXiv 2511.05832, whose operators are bands and windows of the curve, so that touching pixels may not
see each other. Here the pattern is that of the image and the curve only decides where tokens lie in memory: every
order gives the same result.

* `NeighborhoodAttention2d` is NATTEN's 2-D neighborhood attention (arXiv 2204.07143, 2209.15001), with a relative bias
  that trains on every backend, and with the parameters of NAT's releases.
* `SlideAttention2d` is its sliding-window relative with fewer keys at the border (SA).
* `WindowAttention2d` is Swin's window attention (WSA; arXiv 2103.14030), without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitreous_core.ops.block_sparse_attention import RelativeBias2d
from vitreous_core.patterns import Neighborhood2d, Pattern, Slide2d, Window2d

from .attention import Backend, CurveAttention, image_bias
from .image_attention import image_attention, tiling_of
from .reorder import Curve, OrderName

Pair = int | tuple[int, int]


class _ImageAttention(CurveAttention):
    """What the three share: the torch backend."""

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, bias: RelativeBias2d | None, height: int,
        width: int,
    ) -> Tensor:  # fmt: skip
        tiling = tiling_of(pattern, self.curve, height, width, query.device)
        added = None if bias is None else image_bias(bias)
        return image_attention(query, key, value, tiling, scale=self.scale, bias=added)


class _KernelAttention(_ImageAttention):
    """A kernel of constant size and dilation, with a bias by offset `rpb` `[H, 2 * a - 1, 2 * b - 1]`."""

    def __init__(
        self, dim: int, num_heads: int, pattern: Neighborhood2d | Slide2d, extent: tuple[int, int], curve: Curve,
        relative_bias: bool, qkv_bias: bool, backend: Backend,
    ) -> None:  # fmt: skip
        super().__init__(dim, num_heads, curve, qkv_bias, backend)
        self.kernel_size, self.dilation = pattern.kernel, pattern.dilation
        self._pattern, self._extent = pattern, extent
        if relative_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * reach - 1 for reach in extent)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)

    def pattern(self, height: int, width: int) -> Neighborhood2d | Slide2d:
        """The kernel, the same on every map."""
        return self._pattern

    def _bias(self, height: int, width: int, device: torch.device) -> RelativeBias2d | None:
        if self.rpb is None:
            return None
        # `rpb` counts from the query to the key, core's table from the key to the query.
        table = self.rpb.flip(1, 2).flatten(1).t()
        order = self._image_order(height, width, device)
        return RelativeBias2d(table, height, width, order, self._extent, self._pattern.dilations())

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, {super().extra_repr()}"


class NeighborhoodAttention2d(_KernelAttention):
    """NATTEN's 2-D neighborhood attention: each pixel sees the `kernel_size` pixels nearest to it (NA2D).

    Along each axis of `n` cells the pixel at `i` sees those from `clamp(i - K // 2, 0, n - K)` on, `K` of them: at the
    border the window is moved inwards, not cut. With dilation `d` that holds among the cells `i % d, i % d + d, ...`.
    A kernel longer than these cells sees all of them (NATTEN refuses such maps, the first NAT releases padded them
    with tokens that act as keys).

    Paper: arXiv 2204.07143; dilation: arXiv 2209.15001. Parameters `qkv`, `proj` and `rpb` are those of NAT's and
    DiNAT's releases.

    Args:
        dim: channels `C`.
        num_heads: heads `H`, a divisor of `dim`.
        kernel_size: `K`, or (rows, columns); even ones too.
        dilation: step between visible cells, or (rows, columns).
        relative_bias: learn `rpb` `[H, 2 * K - 1, 2 * K - 1]`; entry `(yk - yq) / d + K - 1, (xk - xq) / d + K - 1`
            for the query at `(yq, xq)` and the key at `(yk, xk)`.
        qkv_bias: whether queries, keys and values have a bias.
        order: the curve that tokens lie on, see `HilbertWindowAttention`; it does not change the result.
        order_tile: side for `order="window"`, `(rows, columns)` for `"tile"`.
        backend: see `vitreous_hilbert_attn.attention`.

    Raises:
        ValueError: for heads that do not divide `dim`, a kernel or dilation below 1, an unknown order or backend.

    Examples:
        >>> attention = NeighborhoodAttention2d(32, 2, kernel_size=7)
        >>> attention(torch.randn(1, 12, 20, 32)).shape
        torch.Size([1, 12, 20, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Pair,
        dilation: Pair = 1,
        *,
        relative_bias: bool = True,
        qkv_bias: bool = True,
        order: OrderName = "hilbert",
        order_tile: Pair | None = None,
        backend: Backend = "auto",
    ) -> None:
        pattern, curve = Neighborhood2d(kernel_size, dilation), Curve(order, order_tile)
        super().__init__(dim, num_heads, pattern, _pair(kernel_size), curve, relative_bias, qkv_bias, backend)


class SlideAttention2d(_KernelAttention):
    """Each pixel sees the `kernel_size` pixels centred on it, fewer at the border (SA).

    Args:
        kernel_size: `K`, odd, or (rows, columns).
        dilation: step between visible cells, or (rows, columns).
        relative_bias: learn `rpb` `[H, K, K]`; entry `(yk - yq) / d + K // 2, (xk - xq) / d + K // 2`.
        dim, num_heads, qkv_bias, order, order_tile, backend: as in `NeighborhoodAttention2d`.

    Raises:
        ValueError: for an even kernel, and as `NeighborhoodAttention2d`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Pair,
        dilation: Pair = 1,
        *,
        relative_bias: bool = False,
        qkv_bias: bool = True,
        order: OrderName = "hilbert",
        order_tile: Pair | None = None,
        backend: Backend = "auto",
    ) -> None:
        pattern, curve = Slide2d(kernel_size, dilation), Curve(order, order_tile)
        rows, columns = _pair(kernel_size)
        extent = rows // 2 + 1, columns // 2 + 1
        super().__init__(dim, num_heads, pattern, extent, curve, relative_bias, qkv_bias, backend)


class WindowAttention2d(_ImageAttention):
    """Windows of the image, plain or shifted (WSA): Swin's, but windows that do not fit are cut instead of padded.

    Two pixels see each other iff they lie in one window after the windows are moved by `shift`; that is what Swin's
    cyclic roll and region mask come to. An axis no longer than the window is one window, without shift.

    Paper: arXiv 2103.14030.

    Args:
        window_size: side, or (rows, columns).
        shift: `0 <= shift < window_size`, or (rows, columns); Swin uses half a window in every other block.
        relative_bias: learn Swin's `relative_position_bias_table` `[(2 * a - 1) * (2 * b - 1), H]` for windows of
            `a x b`; entry `(yq - yk + a - 1) * (2 * b - 1) + xq - xk + b - 1`.
        dim, num_heads, qkv_bias, order, backend: as in `NeighborhoodAttention2d`.
        order_tile: side for `order="window"` (default: the window's), `(rows, columns)` for `"tile"`.

    Raises:
        ValueError: for a shift outside the window, and as `NeighborhoodAttention2d`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Pair,
        shift: Pair = 0,
        *,
        relative_bias: bool = True,
        qkv_bias: bool = True,
        order: OrderName = "hilbert",
        order_tile: Pair | None = None,
        backend: Backend = "auto",
    ) -> None:
        if order == "window" and order_tile is None:
            order_tile = window_size
        super().__init__(dim, num_heads, Curve(order, order_tile), qkv_bias, backend)
        Window2d(window_size, shift)  # refuses what is no window
        self.window_size, self.shift = _pair(window_size), _pair(shift)
        # By whether each axis is long enough for a shift; made here for torch.compile, see `HilbertWindowAttention`.
        self._patterns = tuple(
            Window2d(self.window_size, (down * self.shift[0], across * self.shift[1]))
            for down in (False, True)
            for across in (False, True)
        )
        if relative_bias:
            rows, columns = self.window_size
            table = torch.empty((2 * rows - 1) * (2 * columns - 1), num_heads)
            self.relative_position_bias_table = nn.Parameter(table)
            nn.init.trunc_normal_(table, std=0.02)
        else:
            self.register_parameter("relative_position_bias_table", None)

    def pattern(self, height: int, width: int) -> Window2d:
        """The windows on a map of this size, the rule for short axes applied."""
        return self._patterns[2 * (height > self.window_size[0]) + (width > self.window_size[1])]

    def _bias(self, height: int, width: int, device: torch.device) -> RelativeBias2d | None:
        table = self.relative_position_bias_table
        if table is None:
            return None
        return RelativeBias2d(table, height, width, self._image_order(height, width, device), self.window_size)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift={self.shift}, {super().extra_repr()}"


def _pair(value: Pair) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)
