"""Forward of long windows on the packed image: the kernel of `long_forward` on views, and norms for the cosines."""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of

from ..reference import NORM_EPS as _NORM_EPS
from ..reference import logit_factor
from .arguments import new_statistics, padded_head_dim
from .long_arguments import COUNTS, NO_MASK, REGIONS, Call, Geometry, rows_contiguous
from .long_bias import spread_table
from .long_forward import run_forward
from .long_tiles import load_input, pad_distance, place_tokens

NORM_EPS = tl.constexpr(_NORM_EPS)

_NORM_ROWS = 64


@triton.jit(do_not_specialize=COUNTS[:-1])
def _inverse_norm_kernel(
    q_ptr, k_ptr, pad_ptr, norm_ptr, stride_qi, stride_qh, stride_qy, stride_qx,
    images, windows, heads, tokens, columns, height, width, padded_height, padded_width, shift,
    SIDE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`1 / max(|x|, eps)` of queries, then of keys, fp32 `[2, B*W, H, N]`. Grid: strips x units x heads."""
    geometry = (columns, height, width, padded_height, padded_width, shift)
    strides = (stride_qi, stride_qh, stride_qy, stride_qx)
    strips = tl.cdiv(tokens, BLOCK_M)
    pid = tl.program_id(0)
    token = pid % strips * BLOCK_M + tl.arange(0, BLOCK_M)
    head = pid // strips % heads
    unit = pid // (strips * heads)
    image, window = unit // windows, unit % windows

    offs_d = tl.arange(0, BLOCK_D)
    y, x = place_tokens(tl.minimum(token, tokens - 1), window, geometry, SIDE)
    unit_row = (unit.to(tl.int64) * heads + head) * tokens + token
    q_pad = pad_distance(pad_ptr, q_ptr, 0, heads, HEAD_DIM, ALIGN) if PADDED else 0
    k_pad = pad_distance(pad_ptr, k_ptr, 1, heads, HEAD_DIM, ALIGN) if PADDED else 0
    q = load_input(
        q_ptr, q_pad, image, window, head, windows, y, x, strides, geometry, offs_d,
        SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
    ).to(tl.float32)  # fmt: skip
    k = load_input(
        k_ptr, k_pad, image, window, head, windows, y, x, strides, geometry, offs_d,
        SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
    ).to(tl.float32)  # fmt: skip
    to_key = images.to(tl.int64) * windows * heads * tokens
    tl.store(norm_ptr + unit_row, 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(q * q, 1)), NORM_EPS), mask=token < tokens)
    tl.store(
        norm_ptr + to_key + unit_row, 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(k * k, 1)), NORM_EPS), mask=token < tokens
    )


def launch_shifted_long_forward(
    qkv: Tensor, bias_table: Tensor | None, pad_qkv: Tensor | None, logit_scale: Tensor | None, seed: Tensor | None,
    num_heads: int, window_size: int, shift_size: int, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and statistics of windows on the image; see `contracts_shifted`."""
    batch, height, width, packed = qkv.shape
    out = qkv.new_empty(batch, height, width, packed // 3)
    geometry = image_geometry(qkv, num_heads, window_size, shift_size)
    statistics = new_statistics(qkv, geometry.units, num_heads, geometry.tokens)
    if qkv.numel():
        call = image_call(geometry, qkv, bias_table, pad_qkv, logit_scale, seed, scale, dropout_p)
        run_forward(call, out.unflatten(-1, (num_heads, -1)), statistics)
    return out, statistics


def image_geometry(qkv: Tensor, num_heads: int, window_size: int, shift_size: int) -> Geometry:
    """How the windows of a packed image lie."""
    batch, height, width, packed = qkv.shape
    rows, columns = -(-height // window_size), -(-width // window_size)
    return Geometry(
        batch, rows * columns, num_heads, window_size**2, packed // (3 * num_heads),
        window_size, columns, height, width, shift_size,
    )  # fmt: skip


def image_call(
    geometry: Geometry, qkv: Tensor, bias_table: Tensor | None, pad_qkv: Tensor | None, logit_scale: Tensor | None,
    seed: Tensor | None, scale: float, dropout_p: float,
) -> Call:  # fmt: skip
    """A call on the packed image: views of queries, keys and values, the table spread out, the norms."""
    qkv = rows_contiguous(qkv)
    query, key, value = qkv.unflatten(-1, (3, geometry.heads, geometry.head_dim)).unbind(3)
    pad = None
    if geometry.has_padding:
        channels = qkv.shape[-1]
        pad = qkv.new_zeros(channels) if pad_qkv is None else pad_qkv.to(qkv.dtype).contiguous()
    call = Call(
        geometry, query, key, value,
        None if bias_table is None else spread_table(bias_table, geometry.side, turned=False),
        None, REGIONS if geometry.shift > 0 else NO_MASK, pad, seed, None, None, scale, dropout_p,
    )  # fmt: skip
    if logit_scale is None:
        return call
    factor = logit_factor(logit_scale.float()).flatten()
    return replace(call, norms=_inverse_norms(call), factor=factor)


def _inverse_norms(call: Call) -> Tensor:
    geometry = call.geometry
    shape = (2, geometry.units, geometry.heads, geometry.tokens)
    norms = torch.empty(shape, dtype=torch.float32, device=call.query.device)
    programs = -(-geometry.tokens // _NORM_ROWS) * geometry.units * geometry.heads
    with device_of(norms):
        _inverse_norm_kernel[(programs,)](
            call.query, call.key, call.pad, norms, *call.strides[:4], *geometry.numbers(),
            SIDE=geometry.side, PADDED=geometry.has_padding, ALIGN=call.align, HEAD_DIM=geometry.head_dim,
            BLOCK_D=padded_head_dim(geometry.head_dim), BLOCK_M=_NORM_ROWS, num_warps=4,
        )  # fmt: skip
    return norms
