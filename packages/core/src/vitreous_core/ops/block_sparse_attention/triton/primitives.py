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

# How a program finds its bias: from coordinates, from a table of codes, from token distance, from a dense array.
GRID_CODES, TABLE_CODES, DISTANCES, DENSE = (tl.constexpr(kind) for kind in (1, 2, 3, 4))

LOG2E = tl.constexpr(1.4426950408889634)

# Stands for -inf in raw scores: no NaN from inf - inf, and it outweighs any real score.
HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def load_tile(tiles_ptr, tile):
    """The nine numbers of one tile."""
    entry = tiles_ptr + tile * 9
    return (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3),
        tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7),
        tl.load(entry + 8),
    )  # fmt: skip


@triton.jit
def count_columns(tile, GEOMETRY: tl.constexpr):
    """Columns that a tile visits, padding of its rows included."""
    if GEOMETRY == BLOCKS:
        columns = (tile[7] - tile[6]) * BIT_BLOCK
    elif GEOMETRY == IMAGE:
        columns = (tile[5] - tile[4]) << tile[8]
    else:
        columns = tile[7] - tile[6]
    return columns


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
    tile, start, position_ptr, bounds_ptr, width, length,
    GEOMETRY: tl.constexpr, HAS_POSITION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cells and tokens of the columns from `start` on.

    Cells of padding lie past the tile's range, where no bounds reach; their token is that of the last cell in range.

    Returns:
        y, x, token, `[BLOCK]` each. For blocks y is the column within the bit block and x the index of its bits.
    """
    offs = tl.arange(0, BLOCK)
    first = tl.cast(start, tl.int32)
    if GEOMETRY == BLOCKS:
        entry = bounds_ptr + 2 * (tile[6] + (first + offs) // BIT_BLOCK)
        y = (first + offs) % BIT_BLOCK
        x = tl.load(entry + 1)
        token = tl.minimum(tl.load(entry) * BIT_BLOCK + y, length - 1)
    elif GEOMETRY == IMAGE:
        # Sums of a part that no step changes and a scalar: BLOCK and the padded width are powers of two.
        low = (tl.full((), 1, tl.int32) << tile[8]) - 1
        y = (offs >> tile[8]) + (tile[4] + (first >> tile[8]))
        x = (offs & low) + (tile[6] + (first & low))
        token = tl.minimum(y, tile[5] - 1) * width + tl.minimum(x, tile[7] - 1)
        if HAS_POSITION:
            token = tl.load(position_ptr + token)
    else:
        x = offs + (tile[6] + first)
        y = x
        token = tl.minimum(x, tile[7] - 1)
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
def visible_pairs(tile, bounds, row_y, column_y, column_x, bits_ptr, GEOMETRY: tl.constexpr, MASK: tl.constexpr):
    """Whether each row sees each column, bool, broadcastable to `[rows, columns]`.

    `MASK`: 2, rows differ in what they see; 1, all see what the tile visits, but the last step reaches past it;
    0, nothing is hidden.
    """
    if MASK == 0:
        visible = (column_x == column_x)[None, :]
    elif GEOMETRY == BLOCKS:
        word = (column_x[None, :] * BIT_BLOCK + row_y[:, None]) * (BIT_BLOCK // 32) + column_y[None, :] // 32
        visible = ((tl.load(bits_ptr + word) >> (column_y[None, :] % 32)) & 1) == 1
    elif MASK == 2:
        y_start, y_stop, x_start, x_stop = bounds
        visible = (column_x[None, :] >= x_start[:, None]) & (column_x[None, :] < x_stop[:, None])
        if GEOMETRY == IMAGE:
            visible &= (column_y[None, :] >= y_start[:, None]) & (column_y[None, :] < y_stop[:, None])
    else:
        visible = column_x < tile[7]
        if GEOMETRY == IMAGE:
            visible &= column_y < tile[5]
        visible = visible[None, :]
    return visible


@triton.jit
def bias_code(code_ptr, y, x, token, code_width, BIAS: tl.constexpr):
    """A number per token such that codes of query and key differ by the bias table's index, up to a constant."""
    if BIAS == GRID_CODES:
        code = y * code_width + x
    elif BIAS == TABLE_CODES:
        code = tl.load(code_ptr + token)
    else:
        code = -token
    return code


@triton.jit
def initial_scores(
    bias_ptr, head, query_code, key_code, query_token, key_token, visible, centre, stride_bh, length,
    bias_scale, BIAS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What raw scores `q k^T` are added to: the bias over the scale, `HIDDEN` for invisible pairs.

    Adding them inside the matrix product costs nothing, and a masked load applies the mask for nothing. Codes and
    tokens have the shape of their side, `[M, 1]` or `[1, N]`. Only visible pairs are within a table's reach.
    """
    if BIAS == DENSE:
        offset = head.to(tl.int64) * length * length + query_token.to(tl.int64) * length + key_token
        if MASK == 0:
            scores = tl.load(bias_ptr + offset).to(tl.float32) * bias_scale
        else:
            scores = tl.where(visible, tl.load(bias_ptr + offset).to(tl.float32) * bias_scale, HIDDEN)
    else:
        pointers = bias_ptr + (head * stride_bh + (query_code - key_code + centre))
        if MASK == 0:
            scores = tl.load(pointers)
        else:
            scores = tl.load(pointers, mask=visible, other=HIDDEN)
    return scores


@triton.jit
def raw_scores(rows, columns, initial, visible, BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Product of rows and columns over the head dimension, plus what `initial_scores` gave."""
    if BIAS > 0:
        scores = tl.dot(rows, tl.trans(columns), initial, input_precision=PRECISION)
    else:
        scores = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
        if MASK > 0:
            scores = tl.where(visible, scores, HIDDEN)
    return scores


@triton.jit
def operand(values, other, PRECISION: tl.constexpr):
    """Fp32 values as operand of a product with `other`.

    Matrix units cut fp32 off to TF32; cutting weights, which are all positive, would make every sum too small.
    """
    values = values.to(other.dtype)
    if (other.dtype == tl.float32) & (PRECISION == "tf32"):
        bits = values.to(tl.int32, bitcast=True)
        values = ((bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
    return values


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
