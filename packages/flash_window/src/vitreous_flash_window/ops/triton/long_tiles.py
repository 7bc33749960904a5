"""What the kernels for long windows share: finding tokens on the image, addends, rows, inverse norms.

A *unit* is one window of one image. With cut windows, `SIDE == 0`, a unit is an entry of the first dimension and a
token a row of it. On the image, `SIDE` is the window's side, and a token is a pixel found by arithmetic: padding,
cyclic shift and partition move nothing. Units that differ in the image alone have bias, mask and places of tokens in
common: *companions*, which one program treats together.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import REGION_PENALTY as _REGION_PENALTY
from .tile_math import LOG2E, in_base_2

# Kinds of masks: none; numbers to add; bytes, zero hides; the regions of a shifted image.
NO_MASK, NUMBERS, FLAGS, REGIONS = (tl.constexpr(kind) for kind in (0, 1, 2, 3))

PENALTY = tl.constexpr(_REGION_PENALTY * LOG2E.value)


@triton.jit
def split_program(pid, tokens, images, windows, BLOCK: tl.constexpr, COMPANIONS: tl.constexpr):
    """First token, first image, window and head of a program. Tiles of one head are neighbours: they share its bias."""
    strips = tl.cdiv(tokens, BLOCK)
    groups = tl.cdiv(images, COMPANIONS)
    first = pid % strips * BLOCK
    image = pid // strips % groups * COMPANIONS
    window = pid // (strips * groups) % windows
    head = pid // (strips * groups * windows)
    return first, image, window, head


@triton.jit
def place_tokens(token, window, geometry, SIDE: tl.constexpr):
    """Row and column of tokens on the image, before the cyclic shift; the token itself for cut windows.

    `geometry`: windows per row, height and width of the image, the same padded, shift.
    """
    if SIDE == 0:
        y, x = token, token
    else:
        columns, _, _, padded_height, padded_width, shift = geometry
        row = token // SIDE
        y = window // columns * SIDE + shift + row
        x = window % columns * SIDE + shift + (token - row * SIDE)
        y = tl.where(y >= padded_height, y - padded_height, y)
        x = tl.where(x >= padded_width, x - padded_width, x)
    return y, x


@triton.jit
def is_real(y, x, geometry):
    """Whether a place lies on the image, and not in its padding."""
    return (y < geometry[1]) & (x < geometry[2])


@triton.jit
def regions(token, window, geometry, SIDE: tl.constexpr):
    """Region of each token on the rolled map; tokens of different regions are kept apart (Swin, section 3.2)."""
    columns, _, _, padded_height, padded_width, shift = geometry
    row = token // SIDE
    y = window // columns * SIDE + row
    x = window % columns * SIDE + (token - row * SIDE)
    y_region = (y >= padded_height - SIDE).to(tl.int32) + (y >= padded_height - shift).to(tl.int32)
    x_region = (x >= padded_width - SIDE).to(tl.int32) + (x >= padded_width - shift).to(tl.int32)
    return 3 * y_region + x_region


@triton.jit
def row_starts(y, x, strides, pad_offset, geometry, SIDE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr):
    """Where each token's row begins, from the start of its unit and head: int64. Padding lies at `pad_offset`."""
    # In this order: a stride times `ALIGN` alone can leave 32 bits.
    start = y.to(tl.int64) * strides[2] * ALIGN
    if SIDE > 0:
        start += x.to(tl.int64) * strides[3] * ALIGN
    if PADDED:
        start = tl.where(is_real(y, x, geometry), start, pad_offset * ALIGN)
    return start


@triton.jit
def unit_start(image, window, head, windows, strides, SIDE: tl.constexpr, ALIGN: tl.constexpr):
    """Where a unit and head begin, int64."""
    unit = image.to(tl.int64)
    if SIDE == 0:
        unit = unit * windows + window
    return (unit * strides[0] + head.to(tl.int64) * strides[1]) * ALIGN


@triton.jit
def pad_distance(pad_ptr, base, part, heads, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr):
    """Elements over ALIGN from `base` to query (part 0), key (1) or value (2) of the padding token."""
    size: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8 * ALIGN
    return (pad_ptr.to(tl.int64) - base.to(tl.int64)) // size + part * heads * (HEAD_DIM // ALIGN)


@triton.jit
def pad_start(distance, image, head, strides, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr):
    """The padding token's row of a head, seen from `unit_start`, over ALIGN."""
    return distance + head.to(tl.int64) * (HEAD_DIM // ALIGN - strides[1]) - image.to(tl.int64) * strides[0]


@triton.jit
def load_tile(base, starts, offs_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[rows, BLOCK_D]`, zero past the head dimension."""
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(base + (starts[:, None] + offs_d[None, :]))
    else:
        tile = tl.load(base + (starts[:, None] + offs_d[None, :]), mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def load_input(
    ptr, pad, image, window, head, windows, y, x, strides, geometry, offs_d,
    SIDE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of queries, keys or values of one unit and head; those of padding from `pad` on (see `pad_distance`)."""
    if PADDED:
        pad = pad_start(pad, image, head, strides, HEAD_DIM, ALIGN)
    base = ptr + unit_start(image, window, head, windows, strides, SIDE, ALIGN)
    starts = row_starts(y, x, strides, pad, geometry, SIDE, PADDED, ALIGN)
    return load_tile(base, starts, offs_d, HEAD_DIM, BLOCK_D)


@triton.jit
def load_output(
    ptr, image, window, head, windows, y, x, strides, geometry, offs_d,
    SIDE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of the output or its gradient of one unit and head; zero in the image's padding."""
    base = ptr + unit_start(image, window, head, windows, strides, SIDE, ALIGN)
    starts = row_starts(y, x, strides, 0, geometry, SIDE, False, ALIGN)
    if PADDED:
        mask = is_real(y, x, geometry)[:, None] & (offs_d < HEAD_DIM)[None, :]
        rows = tl.load(base + (starts[:, None] + offs_d[None, :]), mask=mask, other=0.0)
    else:
        rows = load_tile(base, starts, offs_d, HEAD_DIM, BLOCK_D)
    return rows


@triton.jit
def store_output(
    ptr, rows, keep, image, window, head, windows, y, x, strides, geometry, offs_d,
    SIDE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Store the rows to keep that lie on the image, in the output's dtype."""
    if PADDED:
        keep = keep & is_real(y, x, geometry)
    base = ptr + unit_start(image, window, head, windows, strides, SIDE, ALIGN)
    starts = row_starts(y, x, strides, 0, geometry, SIDE, False, ALIGN)
    mask = keep[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(base + (starts[:, None] + offs_d[None, :]), rows.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_tile(bias_base, row, column, bias_row, tokens):
    """Base-2 bias of rows `[rows, 1]` and columns `[1, columns]`, as `long_bias` made it; hides padding columns.

    Rows past the end repeat the last one: whatever they get is not stored.
    """
    bias = tl.load(bias_base + (tl.minimum(row, tokens - 1) * bias_row + column))
    if bias.dtype != tl.float32:
        bias = bias.to(tl.float32) * LOG2E
    return bias


@triton.jit
def mask_tile(addend, mask_base, query, key, query_region, key_region, tokens, MASK: tl.constexpr):
    """`addend` plus the mask of a window; `mask_base` is its `[N, N]` tile, contiguous.

    Tokens have the shape of their side, `[rows, 1]` or `[1, columns]`.
    """
    if MASK == REGIONS:
        addend = tl.where(query_region == key_region, addend, addend + PENALTY)
    elif MASK != NO_MASK:
        offset = tl.minimum(query, tokens - 1) * tokens + tl.minimum(key, tokens - 1)
        if MASK == NUMBERS:
            addend += in_base_2(tl.load(mask_base + offset))
        else:
            addend = tl.where(tl.load(mask_base + offset) != 0, addend, -float("inf"))
    return addend


@triton.jit
def plain_addend(row, column, tokens, TAIL: tl.constexpr):
    """What stands for a bias where there is none: zero, and under `TAIL` minus infinity past the last column."""
    if TAIL:
        addend = tl.where((column < tokens) & (row >= 0), 0.0, -float("inf"))
    else:
        addend = tl.where((column >= 0) & (row >= 0), 0.0, 0.0)
    return addend


@triton.jit
def split_norm(inverse_norm):
    """An inverse norm as a power of two and the rest, in [1, 2).

    Rows of a product are scaled by the power without rounding, its other operand by the rest before it is rounded:
    the inverse norm of a zero row is beyond half precision.
    """
    power = (inverse_norm.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return power, inverse_norm / power


@triton.jit
def project_out(gradient, rows, inverse_norm, NORM_EPS: tl.constexpr):
    """Through `x / max(|x|, eps)`: gradient of rows x from that of the normalised rows."""
    unit_rows = rows.to(tl.float32) * inverse_norm[:, None]
    along = tl.sum(gradient * unit_rows, 1)
    # A norm below eps counted as eps, a constant.
    along = tl.where(inverse_norm < 1.0 / NORM_EPS, along, 0.0)
    return (gradient - along[:, None] * unit_rows) * inverse_norm[:, None]
