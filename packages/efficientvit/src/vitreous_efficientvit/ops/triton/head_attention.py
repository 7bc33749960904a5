"""One head's attention in windows, forward and backward; `../README.md` explains the design.

A program walks over windows. What depends on the head alone stays with it: the bias of every pair of tokens, gathered
once, and the sum of the scores' gradients, from which each entry of the bias table takes its pairs at the end.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel
from vitreous_core.ops.block_sparse_attention.triton.primitives import operand

from ..head_contract import empty_map
from . import resources
from .attention import LOG2E
from .configs import PLANS, HeadTile, Launch, head_tile, precision


@triton.jit(do_not_specialize=["windows"])
def _head_fwd_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr,
    q_w, q_d, q_n, k_w, k_d, k_n, v_w, v_d, v_n, out_w, out_d, out_n, windows, scale_log2,
    SIDE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`o = softmax(scale q k^T + bias) v`. Grid: programs that walk over windows."""
    bias = _spread_table(table_ptr, SIDE, BLOCK_N)
    for item in tl.range(tl.program_id(0), windows, tl.num_programs(0), num_stages=STAGES):
        window = tl.cast(item, tl.int64)
        q = _load(q_ptr + window * q_w, q_d, q_n, SIDE, KEY_DIM, BLOCK_N, BLOCK_K)
        k = _load(k_ptr + window * k_w, k_d, k_n, SIDE, KEY_DIM, BLOCK_N, BLOCK_K)
        v = _load(v_ptr + window * v_w, v_d, v_n, SIDE, VALUE_DIM, BLOCK_N, BLOCK_V)
        weights, total = _weigh(q, k, bias, scale_log2, PRECISION)
        out = tl.dot(operand(weights, v, PRECISION), v, input_precision=PRECISION) / total[:, None]
        _store(out_ptr + window * out_w, out_d, out_n, out, SIDE, VALUE_DIM, BLOCK_N, BLOCK_V)


@triton.jit(do_not_specialize=["windows"])
def _head_bwd_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, partials_ptr,
    q_w, q_d, q_n, k_w, k_d, k_n, v_w, v_d, v_n, dout_w, dout_d, dout_n,
    dq_w, dq_d, dq_n, dk_w, dk_d, dk_n, dv_w, dv_d, dv_n, windows, scale_log2, scale,
    SIDE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, NEEDS_TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every gradient, the weights made again; of the table one partial sum a program, `[programs, r * r]`.

    Grid: programs that walk over windows.
    """
    bias = _spread_table(table_ptr, SIDE, BLOCK_N)
    dbias = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for item in tl.range(tl.program_id(0), windows, tl.num_programs(0), num_stages=STAGES):
        window = tl.cast(item, tl.int64)
        q = _load(q_ptr + window * q_w, q_d, q_n, SIDE, KEY_DIM, BLOCK_N, BLOCK_K)
        k = _load(k_ptr + window * k_w, k_d, k_n, SIDE, KEY_DIM, BLOCK_N, BLOCK_K)
        v = _load(v_ptr + window * v_w, v_d, v_n, SIDE, VALUE_DIM, BLOCK_N, BLOCK_V)
        # Rows past the window are zero here, and with them all that they would add to any gradient.
        dout = _load(dout_ptr + window * dout_w, dout_d, dout_n, SIDE, VALUE_DIM, BLOCK_N, BLOCK_V)
        weights, total = _weigh(q, k, bias, scale_log2, PRECISION)
        weights /= total[:, None]
        dv = tl.dot(tl.trans(operand(weights, dout, PRECISION)), dout, input_precision=PRECISION)
        _store(dv_ptr + window * dv_w, dv_d, dv_n, dv, SIDE, VALUE_DIM, BLOCK_N, BLOCK_V)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        if NEEDS_TABLE:
            dbias += dscores
        rounded = operand(dscores, q, PRECISION)
        dq = tl.dot(rounded, k, input_precision=PRECISION) * scale
        _store(dq_ptr + window * dq_w, dq_d, dq_n, dq, SIDE, KEY_DIM, BLOCK_N, BLOCK_K)
        dk = tl.dot(tl.trans(rounded), q, input_precision=PRECISION) * scale
        _store(dk_ptr + window * dk_w, dk_d, dk_n, dk, SIDE, KEY_DIM, BLOCK_N, BLOCK_K)
    if NEEDS_TABLE:
        entry = tl.arange(0, BLOCK_N)
        dtable = _fold_pairs(dbias, SIDE, BLOCK_N)
        tl.store(partials_ptr + tl.program_id(0) * SIDE * SIDE + entry, dtable, mask=entry < SIDE * SIDE)


@triton.jit
def _weigh(q, k, bias, scale_log2, PRECISION: tl.constexpr):
    """Numerators of the softmax, and their sum in each row."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights, tl.sum(weights, 1)


@triton.jit
def _spread_table(table_ptr, SIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bias `[BLOCK_N, BLOCK_N]` of each (query, key) pair times log2 e; minus infinity where the key is padding."""
    query, key = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
    entry = tl.abs(query // SIDE - key // SIDE) * SIDE + tl.abs(query % SIDE - key % SIDE)
    is_pair = (query < SIDE * SIDE) & (key < SIDE * SIDE)
    bias = tl.load(table_ptr + entry, mask=is_pair, other=0.0).to(tl.float32) * LOG2E
    return tl.where(key < SIDE * SIDE, bias, -float("inf"))


@triton.jit
def _fold_pairs(dbias, SIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gradient `[BLOCK_N]` of the table from that of the bias of each pair.

    A query has at most four keys at `(|dy|, |dx|)`, one in each direction: column `e` takes the pairs of entry `e`.
    """
    query, entry = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
    dy, dx = entry // SIDE, entry % SIDE
    taken = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for up in tl.static_range(-1, 2, 2):
        for left in tl.static_range(-1, 2, 2):
            y, x = query // SIDE + up * dy, query % SIDE + left * dx
            is_key = (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE) & (query < SIDE * SIDE) & (entry < SIDE * SIDE)
            # No step is the same in both directions.
            if up < 0:
                is_key &= dy > 0
            if left < 0:
                is_key &= dx > 0
            taken += tl.where(is_key, tl.gather(dbias, tl.where(is_key, y * SIDE + x, 0), 1), 0.0)
    return tl.sum(taken, 0)


@triton.jit
def _load(
    ptr, stride_d, stride_n, SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Tokens `[BLOCK_N, BLOCK_D]` of one window, zero in the padding."""
    offs_n, offs_d = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_n < SIDE * SIDE) & (offs_d < CHANNELS)
    return tl.load(ptr + offs_n * stride_n + offs_d * stride_d, mask=mask, other=0.0)


@triton.jit
def _store(
    ptr, stride_d, stride_n, tokens, SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Counterpart of `_load`; rounds to the dtype of the memory."""
    offs_n, offs_d = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_n < SIDE * SIDE) & (offs_d < CHANNELS)
    tl.store(ptr + offs_n * stride_n + offs_d * stride_d, tokens.to(ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=PLANS)
def _plan(
    shape: tuple[int, ...], key_dim: int, dtype: torch.dtype, device: torch.device, products: str, backward: bool,
    scale: float, needs_table: bool, strides: tuple[tuple[int, ...], ...],
) -> Launch:  # fmt: skip
    """The launch for values of some shape; `strides` of all maps, by window, channel and token."""
    windows, value_dim, side, _ = shape
    tile: HeadTile = head_tile(dtype, side * side, value_dim, backward)
    constants = {
        "SIDE": side, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, **({"NEEDS_TABLE": needs_table} if backward else {}),
        "BLOCK_N": tile.tokens, "BLOCK_K": _padded(key_dim), "BLOCK_V": _padded(value_dim), "PRECISION": products,
        "STAGES": tile.stages, "num_warps": tile.warps,
    }  # fmt: skip
    multiprocessors, _ = resources(device)
    factors = (scale * LOG2E.value, scale) if backward else (scale * LOG2E.value,)
    programs = min(windows, multiprocessors * tile.programs)
    return Launch((programs,), (*chain(*strides), windows, *factors), constants)


def launch_forward(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """The output, in the memory format of the values; arguments as the operator's."""
    out = empty_map(value)
    if not out.numel():
        return out
    maps = [_with_tokens(tensor) for tensor in (query, key, value)]
    launch = _plan(
        value.shape, query.shape[1], value.dtype, value.device, precision(value.dtype), False, scale, False,
        tuple(map(_strides, (*maps, out))),
    )  # fmt: skip
    with device_of(value):
        launch_kernel(_head_fwd_kernel, launch.grid, (*maps, table.contiguous(), out), *launch[1:])
    return out


def launch_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float, needs_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, in their memory formats, and of the table (`[0]` unless needed)."""
    gradients = [empty_map(tensor) for tensor in (query, key, value)]
    if not value.numel():
        return *gradients, torch.zeros_like(table) if needs_table else table.new_empty(0)
    maps = [_with_tokens(tensor) for tensor in (query, key, value, dout)]
    launch = _plan(
        value.shape, query.shape[1], value.dtype, value.device, precision(value.dtype), True, scale, needs_table,
        tuple(map(_strides, (*maps, *gradients))),
    )  # fmt: skip
    shape = (*launch.grid, len(table)) if needs_table else (0,)
    partials = table.new_empty(shape, dtype=torch.float32)
    with device_of(value):
        launch_kernel(
            _head_bwd_kernel, launch.grid,
            (*maps[:3], table.contiguous(), maps[3], *gradients, partials if needs_table else None), *launch[1:],
        )  # fmt: skip
    dtable = partials.sum(0).to(table.dtype) if needs_table else table.new_empty(0)
    return *gradients, dtable


def _with_tokens(tensor: Tensor) -> Tensor:
    """`[B*W, D, r, r]` whose tokens are one step apart, row-major, or a copy; and offsets in a window fit 32 bits."""
    _, channels, side, _ = tensor.shape
    _, stride_d, stride_y, stride_x = tensor.stride()
    is_flat = side == 1 or stride_y == side * stride_x
    is_near = (channels - 1) * stride_d + (side * side - 1) * stride_x < 2**31
    return tensor if is_flat and is_near else tensor.contiguous()


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride()[0], tensor.stride()[1], tensor.stride()[3]


def _padded(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)
