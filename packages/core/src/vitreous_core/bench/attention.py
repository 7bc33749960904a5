"""Local attention as a benchmark problem: inputs, truth, gate, and the ways to compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import flex_attention

from ..errors import BackendUnsupported
from ..indexing import layout_for, order_tables
from ..ops.block_sparse_attention import RelativeBias2d, block_sparse_attention, triton
from ..patterns import Neighborhood1d, Neighborhood2d, Pattern, Slide1d, Slide2d, Window1d, Window2d
from .case import Gate, Prepared, Provider, Unavailable, Work

FORWARD, BOTH = "fwd", "fwd+bwd"
FLEX_BLOCK = 128
"""FlexAttention's own block size."""
FLEX_OPTIONS: tuple[dict[str, int], ...] = ({}, {"fwd_num_stages": 2}, {"num_stages": 2}, {"num_stages": 1})
"""FlexAttention's `kernel_options`, tried in turn until one compiles.

Its own choice for an H100 exceeds the shared memory once a score function reads a table: the 128 x 128 entries of a
tile are buffered for each stage.
"""
_LONGEST_FP64 = 4096
"""Tokens up to which the truth is computed in fp64 on a GPU; above it in IEEE fp32, which is faster."""
_MOST_SCORES = 2**29
"""Scores of the truth held at once: it is computed a run of query tokens at a time."""
_ALL = slice(None)


@dataclass(frozen=True)
class AttentionProblem:
    """Attention over the visible pairs of a pattern, on `batch` images.

    Args:
        pattern: who sees whom.
        height, width: the image.
        order: token order that the tensors are in, by name; see `indexing.build_order`.
        tile: side of a window for order `"window"`.
        batch, heads, head_dim: sizes of query, key and value, all `[batch, heads, height * width, head_dim]`.
        dtype: theirs, by name.
        bias_extent: `(a, b)` for a trainable relative-position table of `(2a - 1)(2b - 1)` entries per head.
        series: family of cases that one curve in a plot shows.
    """

    pattern: Pattern
    height: int
    width: int
    order: str = "row_major"
    tile: int | None = None
    batch: int = 16
    heads: int = 2
    head_dim: int = 64
    dtype: str = "float16"
    bias_extent: tuple[int, int] | None = None
    series: str = ""

    @property
    def length(self) -> int:
        """Tokens."""
        return self.height * self.width

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def pairs(self) -> int:
        """Visible pairs of one head of one image."""
        return layout_for(self.pattern, self.order, self.height, self.width, "cpu", tile=self.tile).rule.pairs()

    def work(self, mode: str) -> Work:
        """q, k, v read and o written once; the backward reads q, k, v, do and writes dq, dk, dv.

        Two products per visible pair forward, five backward. A bias table is read, and its gradient written, once.
        """
        tensor = self.batch * self.heads * self.length * self.head_dim * self.torch_dtype.itemsize
        table = 0 if self.bias_extent is None else 4 * self.heads * _table_entries(self.bias_extent)
        product = 2 * self.pairs() * self.head_dim * self.batch * self.heads
        if mode == FORWARD:
            return Work(4 * tensor + table, 2 * product)
        return Work(11 * tensor + 3 * table, 7 * product)

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {
            "series": self.series, "side": self.height, "pattern": repr(self.pattern), "height": self.height,
            "width": self.width, "order": self.order, "batch": self.batch, "heads": self.heads,
            "head_dim": self.head_dim, "dtype": self.dtype, "bias_extent": self.bias_extent,
            "density": self.pairs() / self.length**2,
        }  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """Inputs of one provider, in its own token order. The leaves require gradients.

    Args:
        query, key, value, cotangent: `[B, H, L, D]`.
        table: the bias table, fp32 `[entries, H]`, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cotangent: Tensor
    table: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        inputs = (self.query, self.key, self.value)
        return inputs if self.table is None else (*inputs, self.table)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Build = Callable[[AttentionProblem, Tensors], Attend]


def attention_provider(
    name: str,
    build: Build,
    *,
    order: str | None = None,
    tile: int | None = None,
    pattern: Pattern | None = None,
    instead: AttentionProblem | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Provider:
    """A provider of attention.

    Args:
        name: of the provider.
        build: makes the function to time, with everything that depends on shapes alone done beforehand.
        order, tile: compute in another token order. Tensors are in it when the clock starts.
        pattern: compute through another pattern that sees the same pairs under that order; the gate proves it.
        instead: compute another problem, where a paper compares different patterns; the gate judges by that one.
        facts: for the row.
    """
    settings = {"order": order, "tile": tile, "pattern": pattern}
    changes = {key: value for key, value in settings.items() if value is not None}
    return Provider(name, partial(_prepare, build=build, changes=changes, instead=instead, extra=facts or {}))


def _prepare(
    problem: AttentionProblem,
    device: torch.device,
    *,
    build: Build,
    changes: Mapping[str, Any],
    instead: AttentionProblem | None,
    extra: Mapping[str, Any],
) -> Prepared:
    asked = problem if instead is None else instead
    own = replace(asked, **changes)
    tensors = draw(own, device)
    attend = build(own, tensors)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(tensors.query, tensors.key, tensors.value)

    def both() -> tuple[Tensor, ...]:
        out = attend(tensors.query, tensors.key, tensors.value)
        return torch.autograd.grad(out, tensors.leaves, tensors.cotangent)

    facts = {"provider_order": own.order, "provider_pattern": repr(own.pattern), **extra}
    if instead is not None:
        facts["computes"] = dict(instead.facts())
    return Prepared({FORWARD: forward, BOTH: both}, partial(_gate, attend, asked, own, tensors), facts=facts)


def draw(problem: AttentionProblem, device: torch.device) -> Tensors:
    """Random inputs, the same for every order: drawn image by image in row-major order, then reordered."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (problem.batch, problem.heads, problem.length, problem.head_dim)
    order, _ = order_tables(problem.order, problem.height, problem.width, device, problem.tile)
    query, key, value, cotangent = (
        torch.randn(shape, generator=generator, device=device, dtype=problem.torch_dtype)[:, :, order].contiguous()
        for _ in range(4)
    )
    table = None
    if problem.bias_extent is not None:
        entries = _table_entries(problem.bias_extent)
        table = torch.randn(entries, problem.heads, generator=generator, device=device).requires_grad_()
    for leaf in (query, key, value):
        leaf.requires_grad_()
    return Tensors(query, key, value, cotangent, table)


def _table_entries(extent: tuple[int, int]) -> int:
    return (2 * extent[0] - 1) * (2 * extent[1] - 1)


# The gate.


def _gate(
    attend: Attend, asked: AttentionProblem, own: AttentionProblem, tensors: Tensors, modes: Collection[str]
) -> Gate:
    """Compare outputs and gradients of the first image; a cotangent that is zero elsewhere sees to the table's.

    A provider may err twice as much as dense attention in the same dtype does, plus the rounding of the result.
    """
    device = tensors.query.device
    truth, limits, described = _truth(asked, device)
    _, position = order_tables(own.order, own.height, own.width, device, own.tile)
    got: dict[str, Tensor] = {}
    if FORWARD in modes:
        with torch.no_grad():
            got["out"] = attend(tensors.query, tensors.key, tensors.value)[:1, :, position]
    if BOTH in modes:
        out = attend(tensors.query, tensors.key, tensors.value)
        cotangent = torch.zeros_like(tensors.cotangent)
        cotangent[:1] = tensors.cotangent[:1]
        gradients = torch.autograd.grad(out, tensors.leaves, cotangent)
        in_image_order = [tensor[:1, :, position] for tensor in (out.detach(), *gradients[:3])]
        got |= zip(("out_trained", "dquery", "dkey", "dvalue"), in_image_order, strict=True)
        if own.bias_extent is not None:
            got["dtable"] = gradients[3]
    errors = {name: relative_error(tensor, truth[name.removesuffix("_trained")]) for name, tensor in got.items()}
    return Gate(errors, {name: limits[name.removesuffix("_trained")] for name in errors}, described)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """`norm(got - truth) / norm(truth)`, in the truth's precision."""
    return float((got.to(truth.dtype) - truth).norm() / truth.norm())


@lru_cache(1)
def _truth(problem: AttentionProblem, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float], str]:
    """Results of the first image in image order, what dense attention in the problem's dtype allows, and by what."""
    long = problem.length > _LONGEST_FP64 and device.type == "cuda"
    wide = torch.float32 if long else torch.float64
    truth = _dense_results(problem, device, wide)
    rounding = torch.finfo(problem.torch_dtype).eps / 2
    own = _dense_results(problem, device, problem.torch_dtype)
    limits = {name: 2 * (relative_error(tensor, truth[name]) + rounding) for name, tensor in own.items()}
    return truth, limits, f"dense attention in {str(wide).removeprefix('torch.')}, first image of the batch"


def _dense_results(problem: AttentionProblem, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    drawn = draw(problem, device)
    # Half precision on a GPU may only be compared with products that are not rounded to TF32.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        query, key, value, cotangent = (
            tensor.detach()[:1].to(dtype) for tensor in (drawn.query, drawn.key, drawn.value, drawn.cotangent)
        )
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        table = None
        if drawn.table is not None:
            table = drawn.table.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
            leaves.append(table)
        tensors = Tensors(query, key, value, cotangent, table)
        # Summed over the runs in fp32 at least, so that their number does not matter to the problem's dtype.
        gradients = [torch.zeros_like(leaf, dtype=torch.promote_types(dtype, torch.float32)) for leaf in leaves]
        outs = []
        run = _MOST_SCORES // (problem.heads * problem.length)
        for rows in (slice(first, first + run) for first in range(0, problem.length, run)):
            out = dense(problem, tensors, rows)(query[:, :, rows], key, value)
            for gradient, part in zip(gradients, torch.autograd.grad(out, leaves, cotangent[:, :, rows]), strict=True):
                gradient += part
            outs.append(out.detach())
    finally:
        torch.set_float32_matmul_precision(precision)
    _, position = order_tables(problem.order, problem.height, problem.width, device, problem.tile)
    in_image_order = [tensor.to(dtype)[:, :, position] for tensor in (torch.cat(outs, dim=2), *gradients[:3])]
    results = dict(zip(("out", "dquery", "dkey", "dvalue"), in_image_order, strict=True))
    if table is not None:
        results["dtable"] = gradients[3]
    return results


# The ways to compute it. Each takes a problem and its tensors and returns the function to time.


def ours(problem: AttentionProblem, tensors: Tensors) -> Attend:
    """`block_sparse_attention(backend="triton")`."""
    device = tensors.query.device
    layout = layout_for(problem.pattern, problem.order, problem.height, problem.width, device, tile=problem.tile)
    bias = None
    if tensors.table is not None:
        order, _ = order_tables(problem.order, problem.height, problem.width, device, problem.tile)
        bias = RelativeBias2d(tensors.table, problem.height, problem.width, order, problem.bias_extent)
    reasons = triton.unsupported_reasons(tensors.query, tensors.query.shape[-1], layout, needs_grad=True)
    if reasons:
        raise BackendUnsupported("triton", reasons)
    return partial(block_sparse_attention, layout=layout, bias=bias, backend="triton")


def flex(problem: AttentionProblem, tensors: Tensors) -> Attend:
    """Compiled FlexAttention, written as its users write it: masks and offsets in integer arithmetic.

    The lists of its block mask are made from our layout before the clock starts.
    """
    device = tensors.query.device
    if device.type != "cuda":
        raise Unavailable("compiled FlexAttention has no backward on a CPU")
    layout = layout_for(
        problem.pattern, problem.order, problem.height, problem.width, device, tile=problem.tile,
        query_block=FLEX_BLOCK, key_block=FLEX_BLOCK,
    )  # fmt: skip
    mask = layout.to_flex()
    mask.mask_mod = flex_mask(problem) or mask.mask_mod
    score_mod = _flex_bias(problem, tensors.table)
    return first_that_compiles(
        [partial(compiled_flex(), score_mod=score_mod, block_mask=mask, kernel_options=options)
         for options in FLEX_OPTIONS],
        tensors,
    )  # fmt: skip


def first_that_compiles(ways: Sequence[Attend], tensors: Tensors) -> Attend:
    """The first of several ways whose forward and backward TorchInductor can build.

    Raises:
        Unavailable: when there is none, with the last reason.
    """
    reason = "no way was given"
    for attend in ways:
        try:
            out = attend(tensors.query, tensors.key, tensors.value)
            torch.autograd.grad(out, tensors.leaves, tensors.cotangent)
        except InductorError as error:
            reason = str(error).strip().splitlines()[0]
        else:
            return attend
    raise Unavailable(f"does not compile: {reason}")


def flex_mask(problem: AttentionProblem) -> Callable[..., Tensor] | None:
    """The pattern as arithmetic on token indices; None where only our tables can say it."""
    length, width = problem.length, problem.width
    match problem.pattern:
        case Window1d(size, shift):
            return lambda batch, head, q, k: (q + shift) // size == (k + shift) // size
        case Slide1d(kernel):
            return lambda batch, head, q, k: (q - k).abs() <= kernel // 2
        case Neighborhood1d(kernel) if kernel <= length:
            return lambda batch, head, q, k: _is_neighbor(q, k, length, kernel)
    if problem.order != "row_major":
        return None
    match problem.pattern:
        case Window2d(int(side), 0):
            return lambda batch, head, q, k: (
                (q // width // side == k // width // side) & (q % width // side == k % width // side)
            )
        case Slide2d(int(kernel), 1):
            return lambda batch, head, q, k: (
                ((q // width - k // width).abs() <= kernel // 2) & ((q % width - k % width).abs() <= kernel // 2)
            )
        case Neighborhood2d(int(kernel), 1) if kernel <= min(problem.height, width):
            return lambda batch, head, q, k: (
                _is_neighbor(q // width, k // width, problem.height, kernel)
                & _is_neighbor(q % width, k % width, width, kernel)
            )
    return None


def _is_neighbor(query: Tensor, key: Tensor, cells: int, kernel: int) -> Tensor:
    start = (query - kernel // 2).clamp(0, cells - kernel)
    return (key >= start) & (key < start + kernel)


def _flex_bias(problem: AttentionProblem, table: Tensor | None) -> Callable[..., Tensor] | None:
    if table is None or problem.bias_extent is None:
        return None
    width, rows, columns = problem.width, problem.bias_extent[0] - 1, problem.bias_extent[1] - 1
    order, _ = order_tables(problem.order, problem.height, width, table.device, problem.tile)
    cell = None if problem.order == "row_major" else order.to(torch.int32)

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if cell is not None:
            q, k = cell[q], cell[k]
        # Masked pairs of a partial block may be further apart than the table reaches.
        row = (q // width - k // width).clamp(-rows, rows) + rows
        column = (q % width - k % width).clamp(-columns, columns) + columns
        return score + table[row * (2 * columns + 1) + column, head]

    return add_bias


@cache
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention through `torch.compile`."""
    # Static shapes: the kernels of a second size would otherwise be compiled for any size.
    return torch.compile(flex_attention, dynamic=False)


def dense(problem: AttentionProblem, tensors: Tensors, rows: slice = _ALL) -> Attend:
    """Masked attention over all pairs in the input's dtype, in eager PyTorch, for the query tokens in `rows`."""
    mask = _additive_mask(problem, tensors.query, rows)
    bias = _dense_bias(problem, tensors, rows)
    scale = problem.head_dim**-0.5

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale) @ key.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias()
        return torch.softmax(scores + mask, dim=-1) @ value

    return attend


def sdpa(problem: AttentionProblem, tensors: Tensors) -> Attend:
    """PyTorch's fused attention over all pairs, with an additive mask."""
    mask = _additive_mask(problem, tensors.query)
    bias = _dense_bias(problem, tensors)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask if bias is None else bias() + mask)

    return attend


def windowed(problem: AttentionProblem, tensors: Tensors, *, fused: bool) -> Attend:
    """Dense attention on cut windows, eager or fused: exact where windows are runs of tokens or whole tiles.

    Windows of a sequence are views. Windows of an image cost the copies of partition and merge, on the clock.
    """
    cut, merge, window = _window_cutter(problem)
    bias = None if tensors.table is None else _window_bias(problem, tensors, window)
    scale = problem.head_dim**-0.5

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = cut(query), cut(key), cut(value)
        if fused:
            # The fused kernels take four dimensions; these are views.
            batch = query.shape[0]
            mask = None if bias is None else bias().repeat(batch, 1, 1, 1)
            out = F.scaled_dot_product_attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), mask)
            return merge(out.unflatten(0, (batch, -1)))
        scores = (query * scale) @ key.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias()
        return merge(torch.softmax(scores, dim=-1) @ value)

    return attend


def unfolded(problem: AttentionProblem, tensors: Tensors) -> Attend:
    """Slide attention by unfolding: every query's keys and values are copied out of the padded image."""
    pattern = problem.pattern
    if not isinstance(pattern, Slide2d) or not isinstance(pattern.kernel, int) or problem.order != "row_major":
        raise Unavailable("unfolding computes Slide2d with one kernel side, in row-major order")
    kernel, height, width = pattern.kernel, problem.height, problem.width
    radius = kernel // 2
    scale = problem.head_dim**-0.5

    def unfold(tensor: Tensor) -> Tensor:
        image = tensor.unflatten(2, (height, width)).movedim(-1, 2)  # [B, H, D, height, width]
        views = F.pad(image, (radius,) * 4).unfold(3, kernel, 1).unfold(4, kernel, 1)
        return views.movedim(2, 4).flatten(2, 3).flatten(-2)  # [B, H, L, D, K]

    inside = torch.ones(1, 1, height * width, 1, dtype=torch.bool, device=tensors.query.device)
    visible = unfold(inside.to(problem.torch_dtype))  # [1, 1, L, 1, K]
    mask = torch.zeros_like(visible).masked_fill(visible == 0, -math.inf)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale).unsqueeze(-2) @ unfold(key) + mask  # [B, H, L, 1, K]
        weights = torch.softmax(scores, dim=-1)
        return (weights @ unfold(value).transpose(-2, -1)).squeeze(-2)

    return attend


def _coordinates(problem: AttentionProblem, device: torch.device) -> tuple[Tensor, Tensor]:
    order, _ = order_tables(problem.order, problem.height, problem.width, device, problem.tile)
    return order // problem.width, order % problem.width


def _visible(problem: AttentionProblem, device: torch.device, rows: slice) -> Tensor:
    layout = layout_for(problem.pattern, problem.order, problem.height, problem.width, device, tile=problem.tile)
    token = torch.arange(problem.length, device=device)
    return layout.rule.allows(token[rows, None], token[None, :])


def _additive_mask(problem: AttentionProblem, like: Tensor, rows: slice = _ALL) -> Tensor:
    visible = _visible(problem, like.device, rows)
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, -math.inf)


def _dense_bias(problem: AttentionProblem, tensors: Tensors, rows: slice = _ALL) -> Callable[[], Tensor] | None:
    """The bias `[H, L, L]`, gathered from its table on every call, as training must; or some rows of it."""
    table = tensors.table
    if table is None or problem.bias_extent is None:
        return None
    y, x = _coordinates(problem, table.device)
    index = _offset_index(y, x, problem.bias_extent, rows)
    # Invisible pairs have a gradient of zero, but their offsets are clamped to few entries, and PyTorch adds what
    # belongs to one entry one after another. Spread over all entries they cost little.
    anywhere = torch.arange(index.numel(), device=index.device).remainder_(len(table)).view_as(index)
    index = torch.where(_visible(problem, table.device, rows), index, anywhere)
    return partial(_gathered, table, index, tensors.query.dtype)


def _window_bias(problem: AttentionProblem, tensors: Tensors, window: int) -> Callable[[], Tensor]:
    """The bias of one window `[H, 1, N, N]`, which all windows must share."""
    assert tensors.table is not None
    assert problem.bias_extent is not None
    y, x = _coordinates(problem, tensors.table.device)
    if problem.order not in ("row_major", "window"):
        raise Unavailable(f"windows under order {problem.order!r} share no bias: their cells come in several orders")
    if problem.order == "row_major":
        side = math.isqrt(window)
        y = torch.arange(side, device=y.device).repeat_interleave(side)
        x = torch.arange(side, device=y.device).repeat(side)
    index = _offset_index(y[:window], x[:window], problem.bias_extent)
    return partial(_gathered, tensors.table, index, tensors.query.dtype, windows=True)


def _offset_index(y: Tensor, x: Tensor, extent: tuple[int, int], queries: slice = _ALL) -> Tensor:
    rows, columns = extent[0] - 1, extent[1] - 1
    row = (y[queries, None] - y[None, :]).clamp(-rows, rows) + rows
    column = (x[queries, None] - x[None, :]).clamp(-columns, columns) + columns
    return row * (2 * columns + 1) + column


def _gathered(table: Tensor, index: Tensor, dtype: torch.dtype, windows: bool = False) -> Tensor:
    bias = table[index].permute(2, 0, 1).to(dtype)
    return bias[:, None] if windows else bias


Reshape = Callable[[Tensor], Tensor]


def _window_cutter(problem: AttentionProblem) -> tuple[Reshape, Reshape, int]:
    """Cut `[B, H, L, D]` into `[B, H, W, N, D]` and merge it back; and N."""
    pattern = problem.pattern
    if isinstance(pattern, Window1d) and pattern.shift == 0 and problem.length % pattern.size == 0:
        size = pattern.size
    elif isinstance(pattern, Window2d) and pattern.shift == 0 and isinstance(pattern.window, int):
        side = pattern.window
        if problem.height % side or problem.width % side:
            raise Unavailable(f"windows of {side} do not divide {problem.height} x {problem.width}")
        if problem.order == "row_major":
            return (*_image_cutter(problem.height, problem.width, side), side**2)
        if (problem.order, problem.tile) != ("window", side):
            raise Unavailable(f"windows are neither tiles nor runs of tokens under order {problem.order!r}")
        size = side**2
    else:
        raise Unavailable(f"{pattern} does not cut the tokens into equal windows")
    return lambda x: x.unflatten(2, (-1, size)), lambda x: x.flatten(2, 3), size


def _image_cutter(height: int, width: int, side: int) -> tuple[Reshape, Reshape]:
    down, across = height // side, width // side

    def cut(tensor: Tensor) -> Tensor:
        image = tensor.unflatten(2, (down, side, across, side))
        return image.transpose(3, 4).reshape(*tensor.shape[:2], down * across, side**2, -1)

    def merge(windows: Tensor) -> Tensor:
        tiles = windows.unflatten(3, (side, side)).unflatten(2, (down, across))
        return tiles.transpose(3, 4).reshape(*windows.shape[:2], height * width, -1)

    return cut, merge


TRITON = attention_provider("triton", ours)
FLEX = attention_provider(
    "flex", flex,
    facts={"compiled": "torch.compile(dynamic=False)", "block": FLEX_BLOCK,
           "kernel_options": f"the first of {FLEX_OPTIONS} that compiles"},
)  # fmt: skip
EAGER = attention_provider("eager", dense)
SDPA = attention_provider("sdpa", sdpa)
SDPA_WINDOWS = attention_provider("sdpa-windows", partial(windowed, fused=True))
EAGER_WINDOWS = attention_provider("eager-windows", partial(windowed, fused=False))
UNFOLD = attention_provider("unfold", unfolded)
