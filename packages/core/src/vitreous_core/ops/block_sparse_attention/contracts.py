"""The registered operators: schema, fakes, autograd. No Triton import; the kernels are imported when first run.

Registered operators take tensors and numbers, so a problem is flattened here and put together again in `triton/`.
There are two families, on query, key and value and on one packed tensor: each an operator that `torch.compile` sees
and that autograd goes through, and its two passes. Passes are functional: outputs never alias inputs. Autocast is
applied above them, in `api`, since `torch.library` can only cast to one fixed dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...layout import BlockLayout
from ...schedule import Schedule
from .bias import Bias, RelativeBias1d, RelativeBias2d
from .triton.configs import Config, Tile, choose

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


_OF_BIAS = Facts._fields.index("bias")
"""Where the facts of a bias begin."""


class Inputs(NamedTuple):
    """Queries, keys and values as operators get them.

    Args:
        query, key, value: `[B, H, L, D]`; or three times the packed tensor `[B, L, 3 * C]`.
        packed_heads: heads of the packed tensor; 0 when there are three.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    packed_heads: int


class Problem(NamedTuple):
    """What both operators take after their inputs and the bias: tensors, text and numbers.

    Args:
        cells: integer `[L]`, image cell of every token, for a bias by cells; None: the token itself.
        seed: int64 `[]`, of the dropout.
        tables: `Tables`.
        walk: the facts of the schedule and the tiles of a `triton.configs.Config`, as text: the dispatcher takes
            one thing on where a list has as many as it has numbers.
        bias_numbers: the facts of the bias, which `torch.compile` may know as symbols and cannot write down.
        scale, dropout_p: as in `api.block_sparse_attention`, the scale positive.
    """

    cells: Tensor | None
    seed: Tensor | None
    tables: Sequence[Tensor]
    walk: str
    bias_numbers: Sequence[int]
    scale: float
    dropout_p: float


def attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, bias: Bias | None, scale: float,
    dropout_p: float, dropout_seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Flatten the problem and call the operator."""
    group = query.shape[1] // key.shape[1]
    table, problem = _flat(query, query.shape[-1], group, layout, bias, scale, dropout_p, dropout_seed)
    # Dynamo knows operators; without it, these need not be found in the dispatcher.
    call = block_sparse_attention if torch.compiler.is_compiling() else _differentiable
    return call(query, key, value, table, *problem)


def packed_attention(
    qkv: Tensor, num_heads: int, layout: BlockLayout, bias: Bias | None, scale: float, dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Flatten the problem and call the operator on a packed tensor."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    table, problem = _flat(qkv, head_dim, 1, layout, bias, scale, dropout_p, dropout_seed)
    call = packed_block_sparse_attention if torch.compiler.is_compiling() else _packed_differentiable
    return call(qkv, num_heads, table, *problem)


def _flat(
    like: Tensor, head_dim: int, group: int, layout: BlockLayout, bias: Bias | None, scale: float, dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor | None, Problem]:  # fmt: skip
    """The tensor of the bias, and the rest of the problem."""
    table, cells, bias_numbers = _flat_bias(bias, like.device)
    flat = _flat_schedule if torch.compiler.is_compiling() else _remembered_schedule
    tables, walk = flat(layout.schedule, like.dtype, head_dim, group, bias is not None)
    return table, Problem(cells, seed, tables, walk, bias_numbers, scale, dropout_p)


def _flat_schedule(
    schedule: Schedule, dtype: torch.dtype, head_dim: int, group: int, has_bias: bool
) -> tuple[Tables, str]:
    config = choose(dtype, head_dim, schedule, group, has_bias)
    forward, dq = schedule.queries.at(config.forward.rows), schedule.queries.at(config.dq.rows)
    dkv, of_bias = schedule.keys.at(config.dkv.rows), schedule.queries.at(config.bias.rows)
    closed = schedule.queries.at(config.closed.rows) if config.closed.rows else dq
    tables = Tables(
        forward.table, dq.table, dkv.table, closed.table, of_bias.table,
        schedule.queries.bounds, schedule.queries.bits, schedule.keys.bounds, schedule.keys.bits, schedule.position,
    )  # fmt: skip
    steps = [0 if tiles.masked else tiles.column_multiple for tiles in (forward, dq, dkv)]
    facts = (
        schedule.geometry, schedule.height, schedule.width,
        *steps, 0 if closed.masked else closed.row_multiple, 0 if of_bias.masked else of_bias.column_multiple,
    )  # fmt: skip
    return tables, " ".join([str(number) for numbers in (facts, *config) for number in numbers])


# Of each schedule while it is there. Dynamo traces through `_flat_schedule` once instead.
_flat_schedules: WeakKeyDictionary[Schedule, dict[tuple[Any, ...], tuple[Tables, str]]] = WeakKeyDictionary()


def _remembered_schedule(schedule: Schedule, *rest: Any) -> tuple[Tables, str]:
    known = _flat_schedules.setdefault(schedule, {})
    if rest not in known:
        known[rest] = _flat_schedule(schedule, *rest)
    return known[rest]


@lru_cache(256)
def read_numbers(walk: str, bias_numbers: tuple[int, ...]) -> tuple[Facts, Config]:
    """What `Problem` holds as text and numbers."""
    numbers = [int(number) for number in walk.split()]
    tiles = numbers[_OF_BIAS:]
    config = Config(*(Tile(*tiles[start : start + 4]) for start in range(0, len(tiles), 4)))
    return Facts(*numbers[:_OF_BIAS], *bias_numbers), config


def _flat_bias(bias: Bias | None, device: torch.device) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """A bias as tensor, cells, and the numbers of `Facts`, which begin with its kind."""
    image = (1, 1, 1, 1)
    match bias:
        case None:
            return None, None, (NO_BIAS, *image, 1, 0)
        case RelativeBias2d():
            a, b = bias.reach
            image = (bias.height, bias.width, *bias.steps)
            return bias.table, bias.cells(device), (CELL_BIAS, *image, 2 * b - 1, (a - 1) * (2 * b - 1) + b - 1)
        case RelativeBias1d():
            return bias.table, None, (DISTANCE_BIAS, *image, 1, bias.kernel - 1)
        case Tensor():
            return bias, None, (DENSE_BIAS, *image, 1, 0)


# `custom_op` would be shorter; its Python layers cost ten times as much per call as these, more than a small kernel.
_library = torch.library.Library("vitreous", "FRAGMENT")
_TAG = torch.Tag.pt2_compliant_tag
_PROBLEM = (
    "Tensor? bias, Tensor? cells, Tensor? seed, Tensor[] tables, str walk, int[] bias_numbers, float scale, "
    "float dropout_p"
)
_SAVED = "Tensor out, Tensor lse, Tensor table"

for _name, _inputs, _gradients in (
    ("block_sparse_attention", "Tensor query, Tensor key, Tensor value", "Tensor, Tensor, Tensor"),
    ("packed_block_sparse_attention", "Tensor qkv, int num_heads", "Tensor"),
):
    _library.define(f"{_name}({_inputs}, {_PROBLEM}) -> Tensor", tags=_TAG)
    _library.define(f"{_name}_forward({_inputs}, {_PROBLEM}) -> (Tensor, Tensor, Tensor)", tags=_TAG)
    _library.define(
        f"{_name}_backward(Tensor dout, {_inputs}, {_SAVED}, {_PROBLEM}, bool needs_bias) -> ({_gradients}, Tensor)",
        tags=_TAG,
    )

block_sparse_attention = torch.ops.vitreous.block_sparse_attention.default
block_sparse_attention_forward = torch.ops.vitreous.block_sparse_attention_forward.default
block_sparse_attention_backward = torch.ops.vitreous.block_sparse_attention_backward.default
packed_block_sparse_attention = torch.ops.vitreous.packed_block_sparse_attention.default
packed_block_sparse_attention_forward = torch.ops.vitreous.packed_block_sparse_attention_forward.default
packed_block_sparse_attention_backward = torch.ops.vitreous.packed_block_sparse_attention_backward.default


@torch.library.impl(_library, "block_sparse_attention_forward", "CompositeExplicitAutograd")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *problem: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, L, D]`; base-2 log-sum-exp `[B, H, L]` fp32 (+inf for rows that see nothing); a relative bias as
    kernels add it, fp32 `[H, entries]` (else empty), which the backward pass need not make again.

    Args:
        query, key, value: as in `api.block_sparse_attention`.
        bias: table of a relative bias, or a dense bias.
        problem: `Problem`.
    """
    launch_forward, _ = _launchers()
    return launch_forward(Inputs(query, key, value, 0), bias, *problem)


@torch.library.impl(_library, "packed_block_sparse_attention_forward", "CompositeExplicitAutograd")
def _packed_forward(qkv: Tensor, num_heads: int, bias: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, L, C]` and the rest of `_forward`, for `qkv` `[B, L, 3 * C]` of any strides."""
    launch_forward, _ = _launchers()
    return launch_forward(Inputs(qkv, qkv, qkv, num_heads), bias, *problem)


@torch.library.impl(_library, "block_sparse_attention_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, table: Tensor,
    bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and bias (empty unless asked for).

    Args:
        dout: gradient of the output.
        out, lse, table: what `_forward` gave.
        query, key, value, bias: its inputs.
        rest: `Problem`, and whether the gradient of the bias is asked for.
    """
    _, launch_backward = _launchers()
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    inputs, gradients = Inputs(query, key, value, 0), Inputs(dq, dk, dv, 0)
    return dq, dk, dv, launch_backward(dout, inputs, gradients, out, lse, table, bias, *rest)


@torch.library.impl(_library, "packed_block_sparse_attention_backward", "CompositeExplicitAutograd")
def _packed_backward(
    dout: Tensor, qkv: Tensor, num_heads: int, out: Tensor, lse: Tensor, table: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of the packed tensor and the bias; see `_backward`."""
    _, launch_backward = _launchers()
    dqkv = torch.empty_like(qkv)
    inputs, gradients = Inputs(qkv, qkv, qkv, num_heads), Inputs(dqkv, dqkv, dqkv, num_heads)
    return dqkv, launch_backward(dout, inputs, gradients, out, lse, table, bias, *rest)


@cache
def _launchers() -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]:
    """Of the kernels; they import Triton, and importing again would take longer than an allocation."""
    from .triton.backward import launch_backward
    from .triton.forward import launch_forward

    return launch_forward, launch_backward


@torch.library.register_fake("vitreous::block_sparse_attention_forward", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse, table = _fake_rest(query, query.shape[:3], bias, *problem)
    return torch.empty_like(query), lse, table


@torch.library.register_fake("vitreous::packed_block_sparse_attention_forward", lib=_library)
def _(qkv: Tensor, num_heads: int, bias: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = qkv.shape
    lse, table = _fake_rest(qkv, (batch, num_heads, length), bias, *problem)
    return qkv.new_empty(batch, length, channels // 3), lse, table


def _fake_rest(like: Tensor, rows: Sequence[int], bias: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and table of a forward pass."""
    kind = Problem(*problem).bias_numbers[0]
    shape: Sequence[int] = (0,)
    if bias is not None and kind in (CELL_BIAS, DISTANCE_BIAS):
        shape = bias.shape if kind == DISTANCE_BIAS else bias.shape[::-1]
    return like.new_empty(rows, dtype=torch.float32), like.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("vitreous::block_sparse_attention_backward", lib=_library)
def _(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, table: Tensor,
    bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = _fake_bias_gradient(query, bias, rest[-1])
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), dbias


@torch.library.register_fake("vitreous::packed_block_sparse_attention_backward", lib=_library)
def _(
    dout: Tensor, qkv: Tensor, num_heads: int, out: Tensor, lse: Tensor, table: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), _fake_bias_gradient(qkv, bias, rest[-1])


def _fake_bias_gradient(like: Tensor, bias: Tensor | None, needs_bias: bool) -> Tensor:
    if not needs_bias:
        return like.new_empty(0)
    assert bias is not None
    return torch.empty_like(bias, memory_format=torch.contiguous_format)


class _Attention(torch.autograd.Function):
    """Saves query, key, value, output, log-sum-exp and tables; never the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        out, lse, table = block_sparse_attention_forward(query, key, value, bias, *problem)
        ctx.save_for_backward(query, key, value, out, lse, table, bias, problem.cells, problem.seed)
        ctx.constants = problem[2:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        needs_bias = ctx.needs_input_grad[3]
        *gradients, dbias = block_sparse_attention_backward(dout, *ctx.saved_tensors, *ctx.constants, needs_bias)
        return *gradients, dbias if needs_bias else None, None


class _PackedAttention(torch.autograd.Function):
    """`_Attention` of a packed tensor."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, bias: Tensor | None, problem: Problem) -> Tensor:
        out, lse, table = packed_block_sparse_attention_forward(qkv, num_heads, bias, *problem)
        ctx.save_for_backward(out, lse, table, bias, problem.cells, problem.seed, qkv)
        ctx.num_heads, ctx.constants = num_heads, problem[2:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        *saved, qkv = ctx.saved_tensors
        needs_bias = ctx.needs_input_grad[2]
        dqkv, dbias = packed_block_sparse_attention_backward(
            dout, qkv, ctx.num_heads, *saved, *ctx.constants, needs_bias
        )
        return dqkv, None, dbias if needs_bias else None, None


# Composite operators are there for `torch.compile`: graphs hold the passes that they call.
@torch.library.impl(_library, "block_sparse_attention", "CompositeImplicitAutograd")
def _differentiable(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *problem: Any) -> Tensor:
    if _needs_grad(query, key, value, bias):
        return _Attention.apply(query, key, value, bias, Problem(*problem))
    return block_sparse_attention_forward(query, key, value, bias, *problem)[0]


@torch.library.impl(_library, "packed_block_sparse_attention", "CompositeImplicitAutograd")
def _packed_differentiable(qkv: Tensor, num_heads: int, bias: Tensor | None, *problem: Any) -> Tensor:
    if _needs_grad(qkv, bias):
        return _PackedAttention.apply(qkv, num_heads, bias, Problem(*problem))
    return packed_block_sparse_attention_forward(qkv, num_heads, bias, *problem)[0]


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
