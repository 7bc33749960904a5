"""What the launchers on the packed image have in common: geometry of the windows, and arguments in kernel order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import dot_precision, dropout_numbers, padded_head_dim, stride_alignment
from .shifted_configs import LARGEST_TILE, LARGEST_WAVES, Config, Tile, choose, deal

NO_PADDING, ZERO_PADDING, TOKEN_PADDING = 0, 1, 2
"""What fills the image to whole windows: it needs nothing; zeros; a token given by the caller."""

RUNTIME_NUMBERS = (
    "stride_b", "stride_y", "stride_x", "stride_gb", "stride_gy", "stride_gx", "stride_entry", "stride_head",
    "images", "height", "width", "window_rows", "window_columns", "heads", "load",
)  # fmt: skip
"""Integers that kernels must not be compiled anew for."""

PLANS = 1024
"""How many shapes are remembered."""


class Shape(NamedTuple):
    """What a launch depends on, apart from the tensors' values: hashable, so that it is planned once.

    Args:
        image: shape of qkv, `[B, height, width, 3 * C]`.
        strides: of qkv, then of the cotangent (zeros in the forward pass): batch, rows, columns each.
        table_strides: of the bias table, or None without one.
        has_padding_token, has_logit_scale, has_dropout: which optional tensors there are.
        num_heads, window_size, shift_size: as in `api.shifted_window_attention`.
        dtype, device: of qkv.
        precision: of products, see `arguments.dot_precision`.
    """

    image: tuple[int, ...]
    strides: tuple[int, ...]
    table_strides: tuple[int, ...] | None
    has_padding_token: bool
    has_logit_scale: bool
    has_dropout: bool
    num_heads: int
    window_size: int
    shift_size: int
    dtype: torch.dtype
    device: torch.device
    precision: str

    @property
    def channels(self) -> int:
        """C."""
        return self.image[3] // 3

    @property
    def head_dim(self) -> int:
        """D."""
        return self.channels // self.num_heads

    @property
    def tokens(self) -> int:
        """N, tokens per window."""
        return self.window_size**2

    @property
    def window_grid(self) -> tuple[int, int]:
        """Windows along the height and along the width."""
        _, height, width, _ = self.image
        return -(-height // self.window_size), -(-width // self.window_size)

    @property
    def windows(self) -> int:
        """Windows of the batch."""
        rows, columns = self.window_grid
        return self.image[0] * rows * columns

    @property
    def padding(self) -> int:
        """One of the constants above."""
        _, height, width, _ = self.image
        if height % self.window_size == 0 and width % self.window_size == 0:
            return NO_PADDING
        return TOKEN_PADDING if self.has_padding_token else ZERO_PADDING

    @property
    def config(self) -> Config:
        """See `shifted_configs.choose`."""
        return choose(self.tokens, self.head_dim, self.dtype, self.precision, self.has_logit_scale)

    def launch(self, tile: Tile, tiles: bool = False, **more: bool) -> Launch:
        """How a kernel with this tile is launched: strips of a window, or tiles of its scores; `more` are constants."""
        batch, height, width, _ = self.image
        rows, columns = self.window_grid
        zones: tuple[int, ...] = (batch * rows * columns,)
        if self.shift_size:
            zones = (batch * (rows - 1) * (columns - 1), batch * (columns - 1), batch * (rows - 1), batch)
        options = tile.options(self.tokens)
        owners = self.num_heads * tile.strips(self.tokens) * (options["CHUNKS"] if tiles else 1)
        waves = 1 if self.tokens <= LARGEST_TILE else LARGEST_WAVES
        load, parts = deal(zones, owners, tile.programs, waves, tile.cost_of_a_wave, self.device)
        align = stride_alignment(*self.strides, self.channels)
        numbers = (
            *(stride // align for stride in self.strides), *(self.table_strides or (0, 0)),
            batch, height, width, rows, columns, self.num_heads, load,
        )  # fmt: skip
        constants = {
            "WINDOW": self.window_size, "SHIFT": self.shift_size, "PAD": self.padding,
            "BIAS": self.table_strides is not None, "COSINE": self.has_logit_scale, "DROPOUT": self.has_dropout,
            "HEAD_DIM": self.head_dim, "BLOCK_D": padded_head_dim(self.head_dim), "PRECISION": self.precision,
            "ALIGN": align, **options, **more,
        }  # fmt: skip
        return Launch((owners * parts,), parts, numbers, constants)


class Launch(NamedTuple):
    """One launch, planned.

    Args:
        grid: programs.
        parts: among which the windows are dealt out.
        numbers: in the order of `RUNTIME_NUMBERS`.
        constants: what the kernel is compiled for, by name.
    """

    grid: tuple[int]
    parts: int
    numbers: tuple[int, ...]
    constants: dict[str, Any]


class Problem(NamedTuple):
    """The arguments of the operator, without the cotangent.

    Args:
        qkv: `[B, height, width, 3 * C]`, rows contiguous (see `with_contiguous_rows`).
        bias_table, pad_qkv, logit_scale, seed: tensors or None.
        num_heads, window_size, shift_size, scale, dropout_p: as in `api.shifted_window_attention`.
    """

    qkv: Tensor
    bias_table: Tensor | None
    pad_qkv: Tensor | None
    logit_scale: Tensor | None
    seed: Tensor | None
    num_heads: int
    window_size: int
    shift_size: int
    scale: float
    dropout_p: float

    def shape(self, dout: Tensor | None = None) -> Shape:
        """Everything about this problem but values; with the cotangent for the backward pass."""
        qkv, table = self.qkv, self.bias_table
        strides = qkv.stride()[:3] + ((0, 0, 0) if dout is None else dout.stride()[:3])
        return Shape(
            tuple(qkv.shape), strides, None if table is None else table.stride(), self.pad_qkv is not None,
            self.logit_scale is not None, self.seed is not None, self.num_heads, self.window_size, self.shift_size,
            qkv.dtype, qkv.device, dot_precision(qkv.dtype),
        )  # fmt: skip

    def pointers(self, shape: Shape) -> tuple[Tensor | None, ...]:
        """The kernels' first arguments."""
        pad, logit = None, self.logit_scale
        if shape.padding == TOKEN_PADDING:
            assert self.pad_qkv is not None
            pad = self.pad_qkv.to(self.qkv.dtype).contiguous()
        return self.qkv, pad, self.bias_table, None if logit is None else logit.contiguous(), self.seed

    def factors(self) -> tuple[float, int, float]:
        """Scale, and the numbers of the dropout: kernels' arguments after `RUNTIME_NUMBERS`."""
        return self.scale, *dropout_numbers(self.dropout_p)


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where channels are not next to each other in memory."""
    # 32-bit offsets count in units of the strides' common factor, which must not be small.
    batch, row, column, channel = tensor.stride()
    if channel == 1 and (batch | row | column) % 4 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
