"""Where the tokens of a window lie in the image: cyclic shift, partition and padding as index arithmetic.

A window of side w has N = w * w tokens, row-major. Offsets into one image count in units of `ALIGN` elements: 32 bits
then reach 2^33 elements and more, and Triton, which knows of an integer argument only whether 16 divides it, sees
that rows can be moved 16 bytes at a time.

The wrap of the cyclic shift crosses only the last row and the last column of windows. So windows come in zones: 0, no
wrap; 1, the last row; 2, the last column; 3, the corner. A program walks over windows of one zone, of any images: what
it adds to the scores is the same for all of them.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import MAX_LOGIT_SCALE as _MAX_LOGIT_SCALE
from ..reference import NORM_EPS as _NORM_EPS
from ..reference import REGION_PENALTY as _REGION_PENALTY
from .shifted_arguments import NO_PADDING as _NO_PADDING
from .shifted_arguments import TOKEN_PADDING as _TOKEN_PADDING
from .tile_math import LOG2E, channel_product, in_base_2

NO_PADDING, TOKEN_PADDING = tl.constexpr(_NO_PADDING), tl.constexpr(_TOKEN_PADDING)
REGION_PENALTY = tl.constexpr(_REGION_PENALTY)
MAX_LOGIT_SCALE = tl.constexpr(_MAX_LOGIT_SCALE)
NORM_EPS = tl.constexpr(_NORM_EPS)


@triton.jit
def windows_of_part(part, load, images, window_rows, window_columns, SHIFT: tl.constexpr):
    """Zone of a part, and first, last + 1 and step of its windows by their numbers in the zone.

    Parts of a zone take turns, so that what they work on at one time is close in memory; none gets more than `load`
    windows (see `shifted_configs.deal`).
    """
    zone, size = 0, images * window_rows * window_columns
    if SHIFT > 0:
        size = images * (window_rows - 1) * (window_columns - 1)
        for other in tl.static_range(1, 4):
            is_past = (zone == other - 1) & (part * load >= size)
            part -= tl.where(is_past, tl.cdiv(size, load), 0)
            zone += tl.where(is_past, 1, 0)
            next_size = images * (window_columns - 1 if other == 1 else window_rows - 1 if other == 2 else 1)
            size = tl.where(is_past, next_size, size)
    return zone, part, size, tl.cdiv(size, load)


@triton.jit
def window_place(item, zone, window_rows, window_columns, SHIFT: tl.constexpr):
    """Image, window row and window column of number `item` of a zone."""
    rows, columns, first_row, first_column = window_rows, window_columns, 0, 0
    if SHIFT > 0:
        is_last_row, is_last_column = zone % 2 == 1, zone >= 2
        first_row = tl.where(is_last_row, window_rows - 1, 0)
        first_column = tl.where(is_last_column, window_columns - 1, 0)
        rows = tl.where(is_last_row, 1, window_rows - 1)
        columns = tl.where(is_last_column, 1, window_columns - 1)
    row = item // columns
    image = row // rows
    return image, row - image * rows + first_row, item - row * columns + first_column


@triton.jit
def chunk_tokens(chunk: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LAST: tl.constexpr):
    """Tokens of one chunk of a window: `CHUNK`, and `LAST` in the last one."""
    if chunk == CHUNKS - 1:
        tokens = chunk * CHUNK + tl.arange(0, LAST)
    else:
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    return tokens


@triton.jit
def token_places(tokens, place, stride_y, stride_x, WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr):
    """Offset of each token in its image, and whether it lies in the image or in the padding.

    Args:
        tokens: `[rows]`, numbers of tokens in the window; those past the last one lie nowhere.
        place: window row, window column, window rows, window columns, height, width.
        stride_y, stride_x: in units of `ALIGN` elements.

    Returns:
        offset in units of `ALIGN` elements, int32 `[rows]`, and bool `[rows]`.
    """
    window_row, window_column, window_rows, window_columns, height, width = place
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
    image_ptr, pad_ptr, channel, tokens, offs_d, place, stride_y, stride_x,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows `[rows, D]` of one head: from the image; in the padding from its token; zero past the window.

    Args:
        image_ptr: the image.
        pad_ptr: the token of the padding for `TOKEN_PADDING`; else None, and the padding is zero.
        channel: first one of the head.
        tokens, place, stride_y, stride_x: see `token_places`.
    """
    offset, in_image = token_places(tokens, place, stride_y, stride_x, WINDOW, SHIFT, PAD)
    pointers = image_ptr + channel + offset.to(tl.int64)[:, None] * ALIGN + offs_d[None, :]
    mask = in_image[:, None]
    if (PAD == TOKEN_PADDING) and (pad_ptr is not None):
        pointers = tl.where(mask, pointers, pad_ptr + channel + offs_d[None, :])
        mask = (tokens < WINDOW * WINDOW)[:, None]
    if offs_d.shape[0] != HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tokens(
    image_ptr, channel, tokens, offs_d, place, stride_y, stride_x, values,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write rows `[rows, D]` of one head; those outside the image are dropped."""
    offset, in_image = token_places(tokens, place, stride_y, stride_x, WINDOW, SHIFT, PAD)
    pointers = image_ptr + channel + offset.to(tl.int64)[:, None] * ALIGN + offs_d[None, :]
    mask = in_image[:, None]
    if offs_d.shape[0] != HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(pointers, values.to(image_ptr.dtype.element_ty), mask=mask)


@triton.jit
def window_addend(
    table_ptr, head, queries, keys, zone, stride_entry, stride_head,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """What a head adds to the base-2 scores of every window of a zone; minus infinity for keys past the window.

    The bias is entry `(y_q - y_k + w - 1) * (2 * w - 1) + (x_q - x_k + w - 1)` of the table; the penalty falls on
    pairs that were no neighbours before the shift (Swin, arXiv 2103.14030, section 3.2).

    Args:
        queries, keys: tokens `[rows, 1]` and `[1, columns]`, or the other way round.
    """
    query_y, query_x, key_y, key_x = queries // WINDOW, queries % WINDOW, keys // WINDOW, keys % WINDOW
    is_pair = (keys < WINDOW * WINDOW) & (queries < WINDOW * WINDOW)
    if BIAS:
        entry = (query_y - key_y + (WINDOW - 1)) * (2 * WINDOW - 1) + (query_x - key_x + (WINDOW - 1))
        pointers = table_ptr + head * stride_head + entry * stride_entry
        addend = in_base_2(tl.load(pointers, mask=is_pair, other=0.0))
    else:
        addend = tl.where(is_pair, 0.0, 0.0)
    if SHIFT > 0:
        apart = (zone % 2 == 1) & ((query_y >= WINDOW - SHIFT) != (key_y >= WINDOW - SHIFT))
        apart |= (zone >= 2) & ((query_x >= WINDOW - SHIFT) != (key_x >= WINDOW - SHIFT))
        addend += tl.where(apart, REGION_PENALTY * LOG2E, 0.0)
    return tl.where(keys < WINDOW * WINDOW, addend, -float("inf"))


@triton.jit
def score_factor(logit_ptr, head, scale, COSINE: tl.constexpr):
    """What products of queries and keys are multiplied by: the scale, or `exp(min(logit_scale, log 100))`.

    Returns:
        the factor, and whether the clamp lets the gradient of `logit_scale` pass (at equality it does).
    """
    factor, passes = scale, True
    if COSINE:
        logit = tl.load(logit_ptr + head).to(tl.float32)
        passes = logit <= MAX_LOGIT_SCALE
        # In fp64, for the fast fp32 exponential is off by more than scores of up to 100 can bear.
        factor = tl.exp(tl.minimum(logit, MAX_LOGIT_SCALE).to(tl.float64)).to(tl.float32)
    return factor, passes


@triton.jit
def inverse_norms(rows):
    """One over the norm of each row, norms below 1e-12 counted as that, as in `torch.nn.functional.normalize`."""
    wide = rows.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(wide * wide, 1)), NORM_EPS)


@triton.jit
def window_products(rows, columns, factor, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """Base-2 scores of one window without their addend: `rows` are queries and `columns` keys, or the other way round.

    Cosines are products of the raw rows, divided by the norms afterwards: normalised rows of a half dtype would be
    rounded, and a factor of up to 100 would show it.
    """
    products = channel_product(rows, columns, PRECISION)
    if COSINE:
        products = products * (inverse_norms(rows) * (factor * LOG2E))[:, None] * inverse_norms(columns)[None, :]
    else:
        products = products * (factor * LOG2E)
    return products


@triton.jit
def window_scores(rows, columns, addend, factor, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """Base-2 scores of one window, see `window_products`.

    The addend must come as it is kept over windows: a sum of it and of numbers of this window would be formed in the
    layout that the addend was loaded in, and every tile of it would go through shared memory for every window.
    """
    return window_products(rows, columns, factor, COSINE, PRECISION) + addend
