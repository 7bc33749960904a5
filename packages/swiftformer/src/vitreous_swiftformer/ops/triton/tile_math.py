"""What the kernels share: tiles of tokens `[BLOCK_L, BLOCK_C]`, lengths of vectors, and sums over parts."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)
"""As `reference` has it."""

STAGES = tl.constexpr(3)
"""Tiles on their way from memory in each program."""


@triton.jit
def tile_offsets(start, stride_l, stride_c, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile from the first token of its image; strides are over `ALIGN`, but that of channels."""
    rows = (start + tl.arange(0, BLOCK_L)).to(tl.int64)
    columns = tl.arange(0, BLOCK_C).to(tl.int64)
    # In this order, as the product of stride and `ALIGN` alone can leave 32 bits.
    return rows[:, None] * stride_l * ALIGN + columns[None, :] * stride_c


@triton.jit
def tile_mask(start, tokens, CHANNELS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which elements of a tile exist."""
    return (start + tl.arange(0, BLOCK_L) < tokens)[:, None] & (tl.arange(0, BLOCK_C) < CHANNELS)[None, :]


@triton.jit
def row_lengths(tile):
    """Length of each row, and one over it (at least `EPS`), both rounded correctly."""
    length = tl.sqrt_rn(tl.sum(tile * tile, 1))
    return length, tl.div_rn(tl.full(length.shape, 1.0, tl.float32), tl.maximum(length, EPS))


@triton.jit
def load_vector(ptr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """`[BLOCK_C]` in fp32, zero beyond the channels."""
    columns = tl.arange(0, BLOCK_C)
    return tl.load(ptr + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32)


@triton.jit
def sum_vectors(ptr, parts, PITCH: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum of `parts` vectors, `PITCH` apart, in an order that the sizes alone decide."""
    part, columns = tl.arange(0, PARTS), tl.arange(0, BLOCK_C)
    mask = (part < parts)[:, None] & (columns < CHANNELS)[None, :]
    return tl.sum(tl.load(ptr + part[:, None] * PITCH + columns[None, :], mask=mask, other=0.0), 0)


@triton.jit
def sum_numbers(ptr, parts, PITCH: tl.constexpr, PARTS: tl.constexpr):
    """Sum of `parts` numbers, `PITCH` apart."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(ptr + part * PITCH, mask=part < parts, other=0.0), 0)


@triton.jit
def gelu(x):
    """GELU of fp32 to about 2e-6, a hundredth of what half precision rounds; one fast exponential.

    `x Phi(x) = max(x, 0) - |x| Phi(-|x|)`, where `log2 Phi(-a)` is a polynomial of degree 5 in `a`, the minimax one of
    the error that it makes in GELU up to 5.5 (from a linear program over a grid). Beyond, its last term takes it to
    minus infinity. Infinities become NaN.
    """
    size = tl.abs(x)
    power = -0.0003693109902087599 * size + 0.006375712342560291
    power = power * size - 0.05012435093522072
    power = power * size - 0.4617460370063782
    power = power * size - 1.1500473022460938
    power = power * size - 1.0001325607299805
    return tl.maximum(x, 0.0) - size * tl.exp2(power)


@triton.jit
def places(first, height, width, BLOCK_P: tl.constexpr):
    """Image (64-bit), row and column of positions `first` to `first + BLOCK_P` of maps of this size."""
    image = first // height // width
    # Divisions of 64 bits are slow: one is enough, as the rest fits into 32.
    position = (first - image * height * width).to(tl.int32) + tl.arange(0, BLOCK_P)
    row = position // width
    return image + (row // height).to(tl.int64), row % height, position % width
