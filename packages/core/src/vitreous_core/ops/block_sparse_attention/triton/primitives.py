"""What the kernels share: finding cells and tokens, visibility, bias indices, dropout.

`GEOMETRY` is one of `vitreous_core.schedule`'s constants. A *side* is a tile table, its bounds and its bits; the
same primitives serve queries as rows and keys as rows.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ....schedule import BIT_BLOCK as _BIT_BLOCK
from ....schedule import BLOCKS as _BLOCKS
from ....schedule import IMAGE as _IMAGE

IMAGE = tl.constexpr(_IMAGE)
BLOCKS = tl.constexpr(_BLOCKS)
BIT_BLOCK = tl.constexpr(_BIT_BLOCK)

LOG2E = tl.constexpr(1.4426950408889634)

# Stands for -inf in base-2 scores: no NaN from inf - inf, and exp2(HIDDEN - any real maximum) is 0.
HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def load_tile(tiles_ptr, tile):
    """The eight numbers of one tile."""
    entry = tiles_ptr + tile * 8
    return (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3),
        tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7),
    )  # fmt: skip


@triton.jit
def reciprocal(tile, GEOMETRY: tl.constexpr):
    """Multiplier for `divide` by the width of what a tile of the image visits."""
    multiplier = tile[7]
    if GEOMETRY == IMAGE:
        multiplier = (0xFFFFFFFF // (2 * (tile[7] - tile[6])).to(tl.uint32) + 1).to(tl.uint32)
    return multiplier


@triton.jit
def divide(number, multiplier):
    """`number // width`, exact while `number * width < 2^30`.

    `number // width = (2 number + 1) // (2 width)`, and the doubled width keeps the multiplier below 2^32 even for
    a width of 1.
    """
    return tl.umulhi((2 * number + 1).to(tl.uint32), multiplier).to(tl.int32)


@triton.jit
def count_columns(tile, GEOMETRY: tl.constexpr):
    """Columns that a tile visits."""
    if GEOMETRY == BLOCKS:
        return (tile[7] - tile[6]) * BIT_BLOCK
    else:
        return (tile[5] - tile[4]) * (tile[7] - tile[6])


@triton.jit
def row_cells(tile, position_ptr, width, GEOMETRY: tl.constexpr, HAS_POSITION: tl.constexpr, BLOCK: tl.constexpr):
    """Cells and tokens of a tile's rows; rows past the end repeat the last one.

    Returns:
        y, x, token, and whether the row is real, `[BLOCK]` each.
    """
    offs = tl.arange(0, BLOCK)
    count = (tile[1] - tile[0]) * (tile[3] - tile[2])
    if GEOMETRY == BLOCKS:
        count = tile[3] - tile[2]
    is_row = offs < count
    offs = tl.minimum(offs, count - 1)
    if GEOMETRY == IMAGE:
        y = offs // (tile[3] - tile[2])
        x = tile[2] + offs - y * (tile[3] - tile[2])
        y += tile[0]
        token = y * width + x
        if HAS_POSITION:
            token = tl.load(position_ptr + token)
    else:
        # For blocks y is the row within the bit block.
        y = tile[0] + offs
        x = tile[2] + offs
        token = x
    return y, x, token, is_row


@triton.jit
def column_cells(
    tile, start, columns, multiplier, position_ptr, bounds_ptr, width, length,
    GEOMETRY: tl.constexpr, HAS_POSITION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cells and tokens of the columns from `start` on; those past the end repeat the last one, with x = -1.

    No bounds contain -1, so such a column is invisible wherever bounds are asked.

    Returns:
        y, x, token, `[BLOCK]` each. For blocks y is the column within the bit block and x the index of its bits.
    """
    offs = start + tl.arange(0, BLOCK)
    if GEOMETRY == BLOCKS:
        entry = bounds_ptr + 2 * (tile[6] + offs // BIT_BLOCK)
        y = offs % BIT_BLOCK
        x = tl.load(entry + 1)
        token = tl.minimum(tl.load(entry) * BIT_BLOCK + y, length - 1)
    else:
        inside = tl.minimum(offs, columns - 1)
        if GEOMETRY == IMAGE:
            y = divide(inside, multiplier)
            x = tile[6] + inside - y * (tile[7] - tile[6])
            y += tile[4]
            token = y * width + x
            if HAS_POSITION:
                token = tl.load(position_ptr + token)
        else:
            x = tile[6] + inside
            y = x
            token = x
        x = tl.where(offs < columns, x, -1)
    return y, x, token


@triton.jit
def row_bounds(bounds_ptr, y, x, height, GEOMETRY: tl.constexpr):
    """Half-open bounds (y, then x) of what each row sees, `[BLOCK]` each."""
    if GEOMETRY == IMAGE:
        y_start, y_stop = tl.load(bounds_ptr + 2 * y), tl.load(bounds_ptr + 2 * y + 1)
        x_start, x_stop = tl.load(bounds_ptr + 2 * (height + x)), tl.load(bounds_ptr + 2 * (height + x) + 1)
    elif GEOMETRY == BLOCKS:
        # The bits know; these only have the right shape.
        y_start, y_stop, x_start, x_stop = y, y, y, y
    else:
        x_start, x_stop = tl.load(bounds_ptr + 2 * x), tl.load(bounds_ptr + 2 * x + 1)
        y_start, y_stop = x_start, x_stop
    return y_start, y_stop, x_start, x_stop


@triton.jit
def visible_pairs(bounds, row_y, column_y, column_x, bits_ptr, GEOMETRY: tl.constexpr, MASKED: tl.constexpr):
    """Whether each row sees each column, bool, broadcastable to `[rows, columns]`."""
    if GEOMETRY == BLOCKS:
        word = (column_x[None, :] * BIT_BLOCK + row_y[:, None]) * (BIT_BLOCK // 32) + column_y[None, :] // 32
        return ((tl.load(bits_ptr + word) >> (column_y[None, :] % 32)) & 1) == 1
    elif MASKED:
        y_start, y_stop, x_start, x_stop = bounds
        visible = (column_x[None, :] >= x_start[:, None]) & (column_x[None, :] < x_stop[:, None])
        if GEOMETRY == IMAGE:
            visible &= (column_y[None, :] >= y_start[:, None]) & (column_y[None, :] < y_stop[:, None])
        return visible
    else:
        return (column_x >= 0)[None, :]


@triton.jit
def bias_code(cell_ptr, token, image_width, code_width, BIAS: tl.constexpr, HAS_CELLS: tl.constexpr):
    """A number per token such that codes of query and key differ by the bias table's index, up to a constant."""
    if BIAS == 1:
        cell = token
        if HAS_CELLS:
            cell = tl.load(cell_ptr + token).to(tl.int32)
        # y * code_width + x
        return cell + (cell // image_width) * (code_width - image_width)
    else:
        return -token


@triton.jit
def add_bias(
    scores, bias_ptr, head, query_code, key_code, query_token, key_token, visible, centre, stride_bh, length,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Base-2 scores plus the bias; tokens and codes have the shape of their side, `[M, 1]` or `[1, N]`."""
    if BIAS == 3:
        offset = head.to(tl.int64) * length * length + query_token.to(tl.int64) * length + key_token
        scores += tl.load(bias_ptr + offset).to(tl.float32) * LOG2E
    elif BIAS > 0:
        # Only visible pairs are within the table's reach.
        index = query_code - key_code + centre
        scores += tl.load(bias_ptr + head * stride_bh + index, mask=visible, other=0.0)
    return scores


@triton.jit
def dropout_keep(seed_ptr, batch_head, query_token, key_token, threshold):
    """Whether each weight is kept: Philox of the pair's own counter, so any pass draws the same bits."""
    seed = tl.load(seed_ptr)
    zero = (query_token + key_token) * 0
    word, _, _, _ = tl.philox(
        seed, (zero + key_token).to(tl.uint32), (zero + query_token).to(tl.uint32),
        (zero + batch_head).to(tl.uint32), zero.to(tl.uint32),
    )  # fmt: skip
    return word.to(tl.uint32) >= tl.cast(threshold, tl.uint32)


@triton.jit
def row_pointers(ptr, token, stride_l, stride_d, offs_d):
    """Pointers `[rows, D]` to rows of one head; 64-bit, since a head of a packed view can span 2^31 elements."""
    return ptr + token.to(tl.int64)[:, None] * stride_l + offs_d[None, :] * stride_d
