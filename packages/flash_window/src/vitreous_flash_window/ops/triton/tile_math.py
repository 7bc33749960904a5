"""What a window's kernels share: loading rows, addends, softmax of a score tile, its gradient, dropout.

Scores are fp32 and in base 2: `(scale q k^T + bias + mask) log2 e`, with minus infinity where a column is padding or
hidden. Rows past the window's end need no mask: their queries and gradients are loaded as zeros, so all they add to
any product is zero, and they are never stored.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton's language cannot unpack one tuple into another

from __future__ import annotations

import triton
import triton.language as tl

from vitreous_core.ops.block_sparse_attention.triton.primitives import operand

LOG2E = tl.constexpr(1.4426950408889634)

# How an addend tile comes about.
NO_ADDEND, NUMBERS, FLAGS = (tl.constexpr(kind) for kind in (0, 1, 2))

# A finite addend times log2 e must not become minus infinity: it hides nothing, however small.
LOWEST = tl.constexpr(-3.3e38)

# What `halves` are; Triton's interpreter computes no products of bfloat16.
_HALF = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)

# Below any score but minus infinity: a row maximum from which minus infinity can be subtracted.
FLOOR = tl.constexpr(-3.4e38)


@triton.jit
def part_range(part, parts, total):
    """First and last + 1 of the items that part `part` of `parts` owns; sizes differ by at most one."""
    wide = part.to(tl.int64)
    return (wide * total // parts).to(tl.int32), ((wide + 1) * total // parts).to(tl.int32)


@triton.jit
def mask_groups(part, parts, windows, mask_windows, MASK: tl.constexpr):
    """First and last + 1 of the mask's windows that a part walks through; one group of all windows without a mask."""
    if MASK > 0:
        first, last = part_range(part, parts, windows)
        images = windows // mask_windows
        groups = first // images, (last - 1) // images + 1
    else:
        groups = 0, 1
    return groups


@triton.jit
def walk(group, part, parts, windows, mask_windows, MASK: tl.constexpr):
    """First window, last + 1 and step of a part's walk through a group.

    Under a mask, windows with the same one come in sequence, image by image. Without, all parts walk side by side,
    which keeps what the GPU reads at one time close together.
    """
    if MASK > 0:
        first, last = part_range(part, parts, windows)
        images = windows // mask_windows
        start = group * images
        begin = group + (tl.maximum(first, start) - start) * mask_windows
        end = group + (tl.minimum(last, start + images) - start) * mask_windows
        steps = begin, end, mask_windows
    else:
        steps = part, windows, parts
    return steps


@triton.jit
def full_stride(stride, ALIGN: tl.constexpr):
    """A stride that came over `ALIGN`, in elements and 64 bits, as the product can leave 32."""
    return tl.cast(stride, tl.int64) * ALIGN


@triton.jit
def row_offsets(token, offs_d, stride_n, stride_d):
    """Offsets `[rows, D]` of rows of one head of one window, 64-bit."""
    return token.to(tl.int64)[:, None] * stride_n + offs_d[None, :] * stride_d


@triton.jit
def load_rows(base, offsets, is_row, offs_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """Rows `[rows, BLOCK_D]`, zero outside; `FULL`: every row is real."""
    if FULL and HEAD_DIM == BLOCK_D:
        rows = tl.load(base + offsets)
    elif HEAD_DIM == BLOCK_D:
        rows = tl.load(base + offsets, mask=is_row[:, None], other=0.0)
    elif FULL:
        rows = tl.load(base + offsets, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        rows = tl.load(base + offsets, mask=is_row[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    return rows


@triton.jit
def load_chunk(
    base, c: tl.constexpr, offs_d, stride_n, stride_d, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    TAIL: tl.constexpr, WHOLE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Chunk `c` of a window's rows (see `addend_tiles`), zero past the end."""
    WIDTH: tl.constexpr = COLUMNS if c < WHOLE else TAIL
    token = tl.arange(0, WIDTH)
    # One set of offsets for all chunks, which costs registers once.
    base += tl.cast(stride_n, tl.int64) * (c * COLUMNS)
    is_token = token < TOKENS - c * COLUMNS
    offsets = row_offsets(token, offs_d, stride_n, stride_d)
    return load_rows(base, offsets, is_token, offs_d, HEAD_DIM, BLOCK_D, c * COLUMNS + WIDTH <= TOKENS)


@triton.jit
def store_rows(
    base, offsets, rows, is_row, offs_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Store rows `[rows, BLOCK_D]` in the output's dtype; counterpart of `load_rows`."""
    rows = rows.to(base.dtype.element_ty)
    if FULL and HEAD_DIM == BLOCK_D:
        tl.store(base + offsets, rows)
    elif HEAD_DIM == BLOCK_D:
        tl.store(base + offsets, rows, mask=is_row[:, None])
    else:
        tl.store(base + offsets, rows, mask=is_row[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def in_base_2(addend):
    """Fp32 addend times log2 e; only minus infinity becomes minus infinity."""
    addend = addend.to(tl.float32)
    return tl.where(addend == -float("inf"), addend, tl.maximum(addend * LOG2E, LOWEST))


@triton.jit
def addend_tile(ptr, row_index, column_index, stride_row, stride_column, TOKENS: tl.constexpr, KIND: tl.constexpr):
    """Base-2 addend of scores of a window: a bias or mask at `ptr`, minus infinity in padding.

    `[rows, columns]`, or `[1, columns]` where there is only padding.

    Args:
        ptr: the tile of one head or window; not read without an addend.
        row_index, column_index: token indices `[rows, 1]`, `[1, columns]`; also for transposed tiles, with the
            strides exchanged. Minus infinity stands where the *column* is past the end.
        stride_row, stride_column: of the tile.
        TOKENS: N.
        KIND: `NO_ADDEND`; `NUMBERS`, added; `FLAGS`, bytes, zero hides.
    """
    is_pair = (row_index < TOKENS) & (column_index < TOKENS)
    offset = row_index.to(tl.int64) * stride_row + column_index.to(tl.int64) * stride_column
    if KIND == NO_ADDEND:
        addend = 0.0
    elif KIND == NUMBERS:
        addend = in_base_2(tl.load(ptr + offset, mask=is_pair, other=0.0))
    else:
        addend = tl.where(tl.load(ptr + offset, mask=is_pair, other=1) != 0, 0.0, -float("inf"))
    return tl.where(column_index < TOKENS, addend, -float("inf"))


@triton.jit
def addend_tiles(
    ptr, offset, rows, stride_row, stride_column, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
    WHOLE: tl.constexpr, CHUNKS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """`addend_tile` of each chunk of columns: `WHOLE` of them `COLUMNS` wide, then, if there is one more, `TAIL`."""
    tiles = ()
    base = ptr + offset if KIND > 0 else 0
    for c in tl.static_range(CHUNKS):
        column = c * COLUMNS + tl.arange(0, COLUMNS if c < WHOLE else TAIL)
        tile = addend_tile(base, rows[:, None], column[None, :], stride_row, stride_column, TOKENS, KIND)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def add_mask_tiles(
    tiles, ptr, group, rows, stride_group, stride_row, stride_column, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    TAIL: tl.constexpr, WHOLE: tl.constexpr, CHUNKS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The addend of each chunk with the mask of one window added."""
    sums = tiles
    if KIND > 0:
        sums = ()
        masks = addend_tiles(
            ptr, tl.cast(group, tl.int64) * stride_group, rows, stride_row, stride_column,
            TOKENS, COLUMNS, TAIL, WHOLE, CHUNKS, KIND,
        )  # fmt: skip
        for c in tl.static_range(CHUNKS):
            sums = sums + (tiles[c] + masks[c],)
    return sums


@triton.jit
def channel_product(rows, columns, PRECISION: tl.constexpr):
    """`rows columns^T`, a sum over channels: of queries and keys, or of output gradients and values.

    Scalar fp32 products of one pair are summed in a chain, whose rounding grows with its length: of 256 channels the
    error was measured 2.6 times that of cuBLAS. Four chains of 64, added up, keep within twice.
    """
    CHANNELS: tl.constexpr = rows.shape[1]
    if PRECISION == "ieee" and CHANNELS > 128:
        PARTS: tl.constexpr = CHANNELS // 64
        rows = tl.permute(tl.reshape(rows, rows.shape[0], PARTS, 64), 1, 0, 2)
        columns = tl.permute(tl.reshape(columns, columns.shape[0], PARTS, 64), 1, 2, 0)
        product = tl.sum(tl.dot(rows, columns, input_precision=PRECISION), 0)
    else:
        product = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
    return product


@triton.jit
def halves(values, HALVED: tl.constexpr):
    """Fp32 `values` as a sum of two bfloat16 numbers, which a `token_product` takes, or as they are.

    Matrix units of four warps read an fp32 tile only along what they sum over. Rows that are summed over channels and
    over tokens would be turned through registers, and the pipeline would not copy them asynchronously. Halves are read
    along either side. Together they have 16 bits, where TF32 has 11, and the range of fp32.
    """
    if HALVED:
        high = values.to(_HALF)
        parts = high, (values - high.to(tl.float32)).to(_HALF)
    else:
        parts = (values,)
    return parts


@triton.jit
def score_factor(scores, other, PRECISION: tl.constexpr, HALVED: tl.constexpr):
    """Weights or score gradients as a factor of a `token_product` with `other`."""
    if HALVED:
        parts = halves(scores, HALVED)
    else:
        parts = (operand(scores, other, PRECISION),)
    return parts


@triton.jit
def transposed(parts):
    """The transposed tile, as `halves` too."""
    turned = (tl.trans(parts[0]),)
    if len(parts) == 2:
        turned = turned + (tl.trans(parts[1]),)
    return turned


@triton.jit
def token_product(left, right, initial, PRECISION: tl.constexpr):
    """`initial + left right`, a sum over tokens of factors as `halves` gives them; low times low is left out."""
    product = initial
    if len(left) == 2:
        product = tl.dot(left[0], right[1], product, input_precision=PRECISION)
        product = tl.dot(left[1], right[0], product, input_precision=PRECISION)
    return tl.dot(left[0], right[0], product, input_precision=PRECISION)


@triton.jit
def softmax_numerators(scores):
    """`exp2(scores - row maximum)`, zero in a row of minus infinities, and the inverse of its row sums."""
    largest = tl.max(scores, 1)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    numerators = tl.exp2(scores - largest[:, None])
    total = tl.sum(numerators, 1)
    return numerators, 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def score_gradients(weights, dweights):
    """Gradient of the scores, `P (dP - rowsum(P dP))`: P before dropout, dP with dropout's factors."""
    delta = tl.sum(weights * dweights, 1)
    return weights * (dweights - delta[:, None])
