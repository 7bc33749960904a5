"""Where the tokens of a window lie in the image: cyclic shift, partition and padding as index arithmetic.

A window of side w has N = w * w tokens, row-major. Windows of a batch are numbered image by image, row-major.
Offsets into an image are kept in units of `VECTOR` elements: 32 bits then reach far beyond any GPU's memory, and
Triton, which knows of an integer argument only whether 16 divides it, sees that rows can be loaded 16 bytes at a time.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import VECTOR as _VECTOR
from .tile_math import LOG2E

VECTOR = tl.constexpr(_VECTOR)

NO_PADDING, ZERO_PADDING, TOKEN_PADDING = (tl.constexpr(kind) for kind in (0, 1, 2))
"""What fills the image to whole windows: it needs nothing; zeros; a token given by the caller."""

REGION_PENALTY = tl.constexpr(-100.0)


@triton.jit
def window_place(window, window_rows, window_columns):
    """Image, window row and window column of a window."""
    row = window // window_columns
    image = row // window_rows
    return image, row - image * window_rows, window - row * window_columns


@triton.jit
def token_places(
    tokens, window_row, window_column, window_rows, window_columns, height, width, stride_y, stride_x,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Offset of each token in its image, and whether it lies in the image or in the padding.

    Args:
        tokens: `[rows]`, numbers of tokens in the window; those past the last one get places that must be masked.
        stride_y, stride_x: in units of `VECTOR` elements.

    Returns:
        offset in units of `VECTOR` elements, int32 `[rows]`, and `[rows]` bool.
    """
    y = window_row * WINDOW + tokens // WINDOW
    x = window_column * WINDOW + tokens % WINDOW
    if SHIFT > 0:
        y += SHIFT
        x += SHIFT
        y = tl.where(y >= window_rows * WINDOW, y - window_rows * WINDOW, y)
        x = tl.where(x >= window_columns * WINDOW, x - window_columns * WINDOW, x)
    in_image = tokens < WINDOW * WINDOW
    if PAD != NO_PADDING:
        in_image &= (y < height) & (x < width)
    return y * stride_y + x * stride_x, in_image


@triton.jit
def load_tokens(
    image_ptr, pad_ptr, offset, in_image, tokens, offs_d,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Rows `[rows, D]` of one head: from the image, from the padding token, zero past the window.

    Args:
        image_ptr: first element of the head in the image.
        pad_ptr: the same in the padding token, for `TOKEN_PADDING`.
    """
    pointers = image_ptr + offset.to(tl.int64)[:, None] * VECTOR + offs_d[None, :]
    mask = in_image[:, None]
    if PAD == TOKEN_PADDING:
        pointers = tl.where(mask, pointers, pad_ptr + (offset * 0)[:, None] + offs_d[None, :])
        mask = (tokens < WINDOW * WINDOW)[:, None]
    if HEAD_DIM != offs_d.shape[0]:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tokens(image_ptr, offset, in_image, offs_d, values, HEAD_DIM: tl.constexpr):
    """Write rows `[rows, D]` of one head; those outside the image are dropped."""
    pointers = image_ptr + offset.to(tl.int64)[:, None] * VECTOR + offs_d[None, :]
    mask = in_image[:, None]
    if HEAD_DIM != offs_d.shape[0]:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(pointers, values.to(image_ptr.dtype.element_ty), mask=mask)


@triton.jit
def relative_bias(
    table_ptr, head, queries, keys, stride_entry, stride_head, WINDOW: tl.constexpr, BIAS: tl.constexpr
):
    """What a window adds to its scores, in base 2: `[queries, keys]`, -inf for keys past the window.

    Entry `(y_q - y_k + w - 1) * (2 * w - 1) + (x_q - x_k + w - 1)` of the table (Swin, arXiv 2103.14030, section 3.2).
    """
    is_key = (keys < WINDOW * WINDOW)[None, :]
    if BIAS:
        WIDE: tl.constexpr = 2 * WINDOW - 1
        CENTRE: tl.constexpr = (WINDOW - 1) * WIDE + WINDOW - 1
        query_code = queries // WINDOW * WIDE + queries % WINDOW
        key_code = keys // WINDOW * WIDE + keys % WINDOW
        entry = query_code[:, None] - key_code[None, :] + CENTRE
        is_pair = is_key & (queries < WINDOW * WINDOW)[:, None]
        pointers = table_ptr + head * stride_head + entry * stride_entry
        addend = tl.load(pointers, mask=is_pair, other=0.0).to(tl.float32) * LOG2E
        addend = tl.where(is_key, addend, float("-inf"))
    else:
        addend = tl.where(is_key, 0.0, float("-inf"))
        addend += tl.zeros([queries.shape[0], 1], tl.float32)
    return addend


@triton.jit
def regions(tokens, is_last_row, is_last_column, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Region of each token of a shifted window, int32: the wrap crosses only the last window row and column."""
    below = (tokens // WINDOW >= WINDOW - SHIFT) & is_last_row
    beyond = (tokens % WINDOW >= WINDOW - SHIFT) & is_last_column
    return 2 * below.to(tl.int32) + beyond.to(tl.int32)


@triton.jit
def add_region_penalty(
    scores, queries, keys, is_last_row, is_last_column, WINDOW: tl.constexpr, SHIFT: tl.constexpr
):
    """Add Swin's -100 to the base-2 scores of pairs that were no neighbours before the cyclic shift.

    Most windows hold one region only and skip it by a branch that is uniform over the program.
    """
    if SHIFT > 0:
        if is_last_row | is_last_column:
            query_region = regions(queries, is_last_row, is_last_column, WINDOW, SHIFT)
            key_region = regions(keys, is_last_row, is_last_column, WINDOW, SHIFT)
            scores += tl.where(query_region[:, None] == key_region[None, :], 0.0, REGION_PENALTY * LOG2E)
    return scores
