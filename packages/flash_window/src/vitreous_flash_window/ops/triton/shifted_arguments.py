"""What the launchers on the packed image have in common: geometry of the windows, and arguments in kernel order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import dot_precision, dropout_numbers, padded_head_dim, stride_alignment
from .shifted_configs import LARGEST_TILE, Config, choose, deal

NO_PADDING, ZERO_PADDING, TOKEN_PADDING = 0, 1, 2
"""What fills the image to whole windows: it needs nothing; zeros; a token given by the caller."""

RUNTIME_NUMBERS = (
    "stride_b", "stride_y", "stride_x", "stride_gb", "stride_gy", "stride_gx", "stride_entry", "stride_head",
    "images", "height", "width", "window_rows", "window_columns", "heads", "load",
)  # fmt: skip
"""Integers that kernels must not be compiled anew for."""


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

    @property
    def channels(self) -> int:
        """C."""
        return self.qkv.shape[3] // 3

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
        _, height, width, _ = self.qkv.shape
        return -(-height // self.window_size), -(-width // self.window_size)

    def deal(self, owners: int, programs: int) -> tuple[int, int]:
        """See `shifted_configs.deal`."""
        images, (rows, columns) = self.qkv.shape[0], self.window_grid
        zones: tuple[int, ...] = (images * rows * columns,)
        if self.shift_size:
            zones = (images * (rows - 1) * (columns - 1), images * (columns - 1), images * (rows - 1), images)
        return deal(zones, owners, programs, self.qkv.device)

    @property
    def windows(self) -> int:
        """Windows of the batch."""
        rows, columns = self.window_grid
        return self.qkv.shape[0] * rows * columns

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Of the log-sum-exp that the forward pass leaves; windows of one chunk leave none."""
        return (self.windows, self.num_heads, self.tokens) if self.tokens > LARGEST_TILE else (0,)

    @property
    def padding(self) -> int:
        """One of the constants above."""
        _, height, width, _ = self.qkv.shape
        if height % self.window_size == 0 and width % self.window_size == 0:
            return NO_PADDING
        return ZERO_PADDING if self.pad_qkv is None else TOKEN_PADDING

    @property
    def config(self) -> Config:
        """See `shifted_configs.choose`."""
        return choose(self.tokens, self.head_dim, self.qkv.dtype, dot_precision(self.qkv.dtype))

    def pointers(self) -> tuple[Tensor | None, ...]:
        """The kernels' first arguments."""
        pad = None
        if self.padding == TOKEN_PADDING:
            assert self.pad_qkv is not None
            pad = self.pad_qkv.to(self.qkv.dtype).contiguous()
        logit = None if self.logit_scale is None else self.logit_scale.reshape(-1).contiguous()
        return self.qkv, pad, self.bias_table, logit, self.seed

    def numbers(self, dout: Tensor | None = None) -> tuple[tuple[int, ...], int]:
        """Strides and sizes in the order of `RUNTIME_NUMBERS`, all but the last; and what divides image strides."""
        batch, height, width, _ = self.qkv.shape
        strides = (*self.qkv.stride()[:3], *((0, 0, 0) if dout is None else dout.stride()[:3]))
        align = stride_alignment(*strides, self.channels)
        of_table = (0, 0) if self.bias_table is None else self.bias_table.stride()
        sizes = (batch, height, width, *self.window_grid, self.num_heads)
        return (*(stride // align for stride in strides), *of_table, *sizes), align

    def factors(self) -> tuple[float, int, float]:
        """Scale, and the numbers of the dropout."""
        return self.scale, *dropout_numbers(self.dropout_p)

    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for, tiles apart."""
        return {
            "WINDOW": self.window_size, "SHIFT": self.shift_size, "PAD": self.padding,
            "BIAS": self.bias_table is not None, "COSINE": self.logit_scale is not None,
            "DROPOUT": self.seed is not None, "HEAD_DIM": self.head_dim, "BLOCK_D": padded_head_dim(self.head_dim),
            "PRECISION": dot_precision(self.qkv.dtype),
        }  # fmt: skip


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where channels are not next to each other in memory."""
    # Strides of odd numbers would make 32-bit offsets count single elements; a copy never does.
    if tensor.stride(3) == 1 and all(stride % 4 == 0 for stride in tensor.stride()[:3]):
        return tensor
    return tensor.contiguous() if tensor.stride(3) != 1 else tensor.clone(memory_format=torch.contiguous_format)
