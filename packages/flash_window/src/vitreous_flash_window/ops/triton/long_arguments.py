"""One call on long windows, made ready for every pass: views, strides, bias, mask, tiles. No Triton import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .arguments import dot_precision, dropout_numbers, padded_head_dim, stride_alignment
from .long_configs import Config, Tile, choose_long

# As in `long_tiles`, which is not imported here so that this module needs no Triton.
NO_MASK, _NUMBERS, _FLAGS, REGIONS = 0, 1, 2, 3

COUNTS = ("images", "windows", "heads", "columns", "height", "width", "padded_height", "padded_width", "shift", "parts")
"""Arguments of kernels that Triton must not specialise on: one compilation serves any number of windows."""


@dataclass(frozen=True)
class Geometry:
    """How windows lie. Cut windows: `side == 0`, and only images, windows, heads, tokens count.

    Args:
        images, windows: B, and W windows of each image; windows that share a bias and mask differ in the image alone.
        heads, tokens, head_dim: H, N, D.
        side: w of windows on the image.
        columns: windows in a row of the image.
        height, width: of the image.
        shift: s.
    """

    images: int
    windows: int
    heads: int
    tokens: int
    head_dim: int
    side: int = 0
    columns: int = 1
    height: int = 1
    width: int = 1
    shift: int = 0

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the map of whole windows."""
        side = max(self.side, 1)
        return self.windows // self.columns * side, self.columns * side

    @property
    def has_padding(self) -> bool:
        """Whether the image is not whole windows."""
        return self.side > 0 and self.padded != (self.height, self.width)

    @property
    def units(self) -> int:
        """Windows of all images."""
        return self.images * self.windows

    def numbers(self) -> tuple[int, ...]:
        """As kernels take it."""
        return (
            self.images, self.windows, self.heads, self.tokens,
            self.columns, self.height, self.width, *self.padded, self.shift,
        )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """Tensors and numbers of one call.

    Args:
        geometry: how windows lie.
        query, key, value: `[B*W, H, N, D]`, or views `[B, height, width, H, D]` of the image; last stride 1.
        bias: `[H, N, row length]` of `long_bias`, or None.
        mask: contiguous `[W, N, N]`, or None; flags as bytes.
        mask_kind: see `long_tiles`.
        pad: contiguous `[3 * C]` or None: the padding token.
        seed: int64 `[]` or None, of the dropout.
        norms: fp32 `[2, B*W, H, N]` or None: inverse norms of queries, then of keys.
        factor: fp32 `[H]` or None: of the cosines.
        scale: of the scores; not used with `factor`.
        dropout_p: probability of dropping a weight.
    """

    geometry: Geometry
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    mask_kind: int
    pad: Tensor | None
    seed: Tensor | None
    norms: Tensor | None
    factor: Tensor | None
    scale: float
    dropout_p: float

    @cached_property
    def config(self) -> Config:
        """The tiles of every pass."""
        dtype, geometry = self.query.dtype, self.geometry
        has_cosines = self.norms is not None
        return choose_long(dtype, dot_precision(dtype), geometry.head_dim, geometry.images, has_cosines)

    @cached_property
    def align(self) -> int:
        """What divides all strides of query, key and value, and their place against the padding token."""
        strides = [stride for tensor in (self.query, self.key, self.value) for stride in _strides(tensor)]
        if self.pad is not None:
            strides.append(self.geometry.head_dim)
            strides.append(self.query.data_ptr() // self.query.element_size())
            strides.append(self.pad.data_ptr() // self.pad.element_size())
        return stride_alignment(*strides)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Strides of query, key and value over `align`: unit or image, head, token or row, 0 or column."""
        return tuple(s // self.align for tensor in (self.query, self.key, self.value) for s in _strides(tensor))

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """Bias, mask, padding token, seed, inverse norms, factor."""
        return self.bias, self.mask, self.pad, self.seed, self.norms, self.factor

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Two strides of the bias, the geometry, the scale in base 2, threshold and factor of the dropout."""
        bias = (0, 0) if self.bias is None else self.bias.stride()[:2]
        return *bias, *self.geometry.numbers(), self.scale * math.log2(math.e), *dropout_numbers(self.dropout_p)

    def programs(self, tile: Tile) -> int:
        """Programs of a pass whose program owns a strip of one head in some companions."""
        geometry = self.geometry
        strips, groups = -(-geometry.tokens // tile.rows), -(-geometry.images // tile.companions)
        return strips * groups * geometry.windows * geometry.heads

    def options(self, tile: Tile) -> dict[str, Any]:
        """What every pass is compiled for, except the alignment of its outputs."""
        geometry = self.geometry
        limit: dict[str, Any] = {"maxnreg": tile.registers} if tile.registers else {}
        return limit | {
            "SIDE": geometry.side,
            "PADDED": geometry.has_padding,
            "ALIGN": self.align,
            "BIAS": self.bias is not None,
            "MASK": self.mask_kind,
            "TAIL": geometry.tokens % tile.columns > 0,
            "COSINE": self.norms is not None,
            "DROPOUT": self.dropout_p > 0,
            "HEAD_DIM": geometry.head_dim,
            "BLOCK_D": padded_head_dim(geometry.head_dim),
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "COMPANIONS": tile.companions,
            "PRECISION": dot_precision(self.query.dtype),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def cut_call(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float,
) -> Call:  # fmt: skip
    """A call on windows that are already cut; the bias as `long_bias` makes it."""
    units, heads, tokens, head_dim = query.shape
    windows = 1 if mask is None else len(mask)
    kind = NO_MASK
    if mask is not None:
        kind = _FLAGS if mask.dtype == torch.bool else _NUMBERS
        mask = mask.contiguous()
        mask = mask.view(torch.uint8) if kind == _FLAGS else mask
    return Call(
        Geometry(units // windows, windows, heads, tokens, head_dim),
        rows_contiguous(query), rows_contiguous(key), rows_contiguous(value),
        bias, mask, kind, None, seed, None, None, scale, dropout_p,
    )  # fmt: skip


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last stride is not 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def writable(tensor: Tensor) -> Tensor:
    """Where kernels write instead of `tensor`: itself, or a new tensor where its last stride is not 1."""
    return tensor if tensor.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def deliver(written: Tensor, tensor: Tensor) -> None:
    """Bring what was written in place of `tensor` there."""
    if written is not tensor:
        tensor.copy_(written)


def output_strides(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Strides of an output over what divides them all, and that number."""
    strides = _strides(tensor)
    align = stride_alignment(*strides)
    return tuple(stride // align for stride in strides), align


def _strides(tensor: Tensor) -> tuple[int, int, int, int]:
    """Unit or image, head, token or row, column; 0 where there is one entry, whose stride may be any number."""
    strides = [stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]
    if tensor.ndim == 4:
        return strides[0], strides[1], strides[2], 0
    return strides[0], strides[3], strides[1], strides[2]
