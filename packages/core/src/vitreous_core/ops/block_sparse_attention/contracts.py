"""The registered operators: schema, fakes, autograd. No Triton import; the kernels are imported when first run.

Registered operators take tensors and numbers, so a problem is flattened here and put together again in `triton/`.
Both operators are functional: outputs never alias inputs. Autocast is applied above them, in `api`, since
`torch.library` can only cast to one fixed dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...layout import BlockLayout
from ...schedule import Schedule
from .bias import Bias, RelativeBias1d, RelativeBias2d

NO_BIAS, CELL_BIAS, DISTANCE_BIAS, DENSE_BIAS = 0, 1, 2, 3


class Tables(NamedTuple):
    """Tensors of a schedule, cut for the tiles of each pass (see `vitreous_core.schedule`)."""

    forward_tiles: Tensor
    dq_tiles: Tensor
    dkv_tiles: Tensor
    closed_tiles: Tensor
    bias_tiles: Tensor
    query_bounds: Tensor
    query_bits: Tensor
    key_bounds: Tensor
    key_bits: Tensor
    position: Tensor


class Facts(NamedTuple):
    """Numbers of a schedule and a bias.

    Args:
        geometry, height, width: of the schedule.
        forward_steps, dq_steps, dkv_steps, closed_steps, bias_steps: 0 when rows of that pass differ in what they
            see; else a number that divides the columns of every tile (the rows for the closed pass).
        bias: which kind, one of the constants above.
        image_height, image_width, row_step, column_step: of a bias by cells: the image and the steps it counts in.
        code_width, centre: of the bias: row length of the table, index of offset zero.
    """

    geometry: int
    height: int
    width: int
    forward_steps: int
    dq_steps: int
    dkv_steps: int
    closed_steps: int
    bias_steps: int
    bias: int
    image_height: int
    image_width: int
    row_step: int
    column_step: int
    code_width: int
    centre: int


def attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, bias: Bias | None, scale: float,
    dropout_p: float, dropout_seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Flatten the problem and call the operator."""
    table, cells, kind, numbers = _flat_bias(bias, query.device)
    flat = _flat_schedule if torch.compiler.is_compiling() else _remembered_schedule
    tables, facts, tiling = flat(
        layout.schedule, query.dtype, query.shape[-1], query.shape[1] // key.shape[1], kind, numbers
    )
    return block_sparse_attention(
        query, key, value, table, cells, dropout_seed, tables, facts, tiling, scale, dropout_p,
    )[0]  # fmt: skip


_BiasNumbers = tuple[int, int, int, int, int, int]
_Flat = tuple[Tables, Facts, tuple[int, ...]]


def _flat_schedule(
    schedule: Schedule, dtype: torch.dtype, head_dim: int, group: int, kind: int, numbers: _BiasNumbers
) -> _Flat:
    from .triton.configs import choose

    config = choose(dtype, head_dim, schedule, group, kind != NO_BIAS)
    forward, dq = schedule.queries.at(config.forward.rows), schedule.queries.at(config.dq.rows)
    dkv, of_bias = schedule.keys.at(config.dkv.rows), schedule.queries.at(config.bias.rows)
    closed = schedule.queries.at(config.closed.rows) if config.closed.rows else dq
    tables = Tables(
        forward.table, dq.table, dkv.table, closed.table, of_bias.table,
        schedule.queries.bounds, schedule.queries.bits, schedule.keys.bounds, schedule.keys.bits, schedule.position,
    )  # fmt: skip
    steps = [0 if tiles.masked else tiles.column_multiple for tiles in (forward, dq, dkv)]
    facts = Facts(
        schedule.geometry, schedule.height, schedule.width,
        steps[0], steps[1], steps[2],
        0 if closed.masked else closed.row_multiple, 0 if of_bias.masked else of_bias.column_multiple,
        kind, *numbers,
    )  # fmt: skip
    return tables, facts, tuple([number for tile in config for number in tile])


# Of each schedule while it is there. Dynamo traces through `_flat_schedule` once instead.
_flat_schedules: WeakKeyDictionary[Schedule, dict[tuple[Any, ...], _Flat]] = WeakKeyDictionary()


def _remembered_schedule(schedule: Schedule, *rest: Any) -> _Flat:
    known = _flat_schedules.setdefault(schedule, {})
    if rest not in known:
        known[rest] = _flat_schedule(schedule, *rest)
    return known[rest]


def _flat_bias(bias: Bias | None, device: torch.device) -> tuple[Tensor | None, Tensor | None, int, _BiasNumbers]:
    image = (1, 1, 1, 1)
    match bias:
        case None:
            return None, None, NO_BIAS, (*image, 1, 0)
        case RelativeBias2d():
            a, b = bias.reach
            image = (bias.height, bias.width, *bias.steps)
            return bias.table, bias.cells(device), CELL_BIAS, (*image, 2 * b - 1, (a - 1) * (2 * b - 1) + b - 1)
        case RelativeBias1d():
            return bias.table, None, DISTANCE_BIAS, (*image, 1, bias.kernel - 1)
        case Tensor():
            return bias, None, DENSE_BIAS, (*image, 1, 0)


# `custom_op` would be shorter; its Python layers cost ten times as much per call as these, more than a small kernel.
_library = torch.library.Library("vitreous", "FRAGMENT")
_library.define(
    "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cells, Tensor? seed, "
    "Tensor[] tables, int[] facts, int[] tiling, float scale, float dropout_p) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "block_sparse_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor table, Tensor? bias, Tensor? cells, Tensor? seed, Tensor[] tables, int[] facts, int[] tiling, "
    "float scale, float dropout_p, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
block_sparse_attention = torch.ops.vitreous.block_sparse_attention.default
block_sparse_attention_backward = torch.ops.vitreous.block_sparse_attention_backward.default


@torch.library.impl(_library, "block_sparse_attention", "CompositeExplicitAutograd")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cells: Tensor | None,
    seed: Tensor | None,
    tables: Sequence[Tensor],
    facts: Sequence[int],
    tiling: Sequence[int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, L, D]`; base-2 log-sum-exp `[B, H, L]` fp32 (+inf for rows that see nothing); a relative bias as
    kernels add it, fp32 `[H, entries]` (else empty), which the backward pass need not make again.

    Args:
        query, key, value: as in `api.block_sparse_attention`.
        bias: table of a relative bias, or a dense bias.
        cells: integer `[L]`, image cell of every token, for a bias by cells; None: the token itself.
        seed: int64 `[]`, of the dropout.
        tables, facts: `Tables` and `Facts`.
        tiling: the tiles of a `triton.configs.Config`, flat.
        scale, dropout_p: as in `api.block_sparse_attention`, the scale positive.
    """
    from .triton.forward import launch_forward

    return launch_forward(
        query, key, value, bias, cells, seed, Tables(*tables), Facts(*facts), tuple(tiling), scale, dropout_p
    )


@torch.library.register_fake("vitreous::block_sparse_attention", lib=_library)
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cells: Tensor | None, seed: Tensor | None,
    tables: Sequence[Tensor], facts: Sequence[int], *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind = Facts(*facts).bias
    if bias is None or kind in (NO_BIAS, DENSE_BIAS):
        table = query.new_empty(0, dtype=torch.float32)
    else:
        table = query.new_empty(bias.shape if kind == DISTANCE_BIAS else bias.shape[::-1], dtype=torch.float32)
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32), table


@torch.library.impl(_library, "block_sparse_attention_backward", "CompositeExplicitAutograd")
def _launch_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    bias: Tensor | None,
    cells: Tensor | None,
    seed: Tensor | None,
    tables: Sequence[Tensor],
    facts: Sequence[int],
    tiling: Sequence[int],
    scale: float,
    dropout_p: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty unless `needs_bias`); `out`, `lse`, `table` are the outputs."""
    from .triton.backward import launch_backward

    return launch_backward(
        dout, query, key, value, out, lse, table, bias, cells, seed, Tables(*tables), Facts(*facts), tuple(tiling),
        scale, dropout_p, needs_bias,
    )  # fmt: skip


@torch.library.register_fake("vitreous::block_sparse_attention_backward", lib=_library)
def _(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_bias = rest[-1]
    if needs_bias:
        assert bias is not None
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    else:
        dbias = query.new_empty(0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), dbias


class _Attention(torch.autograd.Function):
    """Saves query, key, value, output, log-sum-exp and tables; never the scores."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, table = block_sparse_attention(*arguments)
        query, key, value, bias, cells, seed, tables, *ctx.numbers = arguments
        ctx.mark_non_differentiable(lse, table)
        ctx.set_materialize_grads(False)  # for these two zeros would be filled in at every call
        ctx.save_for_backward(query, key, value, out, lse, table, bias, cells, seed, *tables)
        return out, lse, table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 11
        query, key, value, out, lse, table, bias, cells, seed, *tables = ctx.saved_tensors
        needs_bias = bias is not None and ctx.needs_input_grad[3]
        dq, dk, dv, dbias = block_sparse_attention_backward(
            dout, query, key, value, out, lse, table, bias, cells, seed, tables, *ctx.numbers, needs_bias
        )
        return dq, dk, dv, dbias if needs_bias else None, *[None] * 7


@torch.library.impl(_library, "block_sparse_attention", "Autograd")
def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tracked = arguments[:4]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tracked):
        return _Attention.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return block_sparse_attention(*arguments)
