"""The attention modules: official numbers, core's dense truth, token orders, changing sizes, backends, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitreous_core import indexing
from vitreous_core.errors import BackendUnsupported
from vitreous_core.ops.block_sparse_attention import RelativeBias2d, block_sparse_attention
from vitreous_core.patterns import Neighborhood2d, Slide2d, Window2d
from vitreous_core.testing.golden import golden_path
from vitreous_hilbert_attn import (
    Curve,
    HilbertNeighborhoodAttention,
    HilbertSlideAttention,
    HilbertWindowAttention,
    permute_tokens,
    resize_bias_table,
)
from vitreous_hilbert_attn.attention import image_bias
from vitreous_hilbert_attn.reorder import Gather, slots_of
from vitreous_hilbert_attn.sequence_attention import neighborhood_attention

HERE = Path(__file__).parent
GRID = (12, 20)
DIM, HEADS = 32, 2
# fp64 results against files rounded to fp32; measured 4.1e-7, in the tables' largest entries.
ROUNDING = {"rtol": 1e-7, "atol": 1e-6}
# Two fp64 ways to the same sum; measured 1.5e-14.
EXACT = {"rtol": 0, "atol": 1e-12}


# --- official numbers


def window(size: int, shift: int = 0, bias: bool = False, order: str = "hilbert") -> HilbertWindowAttention:
    return HilbertWindowAttention(DIM, HEADS, size, shift, order=order, relative_bias=bias, map_size=GRID)


def on_image(pattern: object) -> Callable:
    """Two-dimensional patterns in Hilbert order, which only core has."""

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        order, position = indexing.order_tables("hilbert", *GRID, "cpu")
        heads = [t[0].flatten(1, 2)[:, order].transpose(1, 2) for t in (q[None], k[None], v[None])]
        layout = indexing.layout_for(pattern, "hilbert", *GRID, "cpu")
        out = block_sparse_attention(*heads, layout, backend="torch")
        return out.transpose(1, 2)[:, position].view_as(q)

    return attend


def through(module: nn.Module) -> Callable:
    """The module without its projections, fed with queries, keys and values in image order."""
    module.qkv, module.proj = nn.Identity(), nn.Identity()

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        if table is not None:
            del module.relative_position_bias_table
            module.relative_position_bias_table = table
        packed = torch.stack((q, k, v), dim=3)
        return module(packed.reshape(1, q.shape[1] * q.shape[2], 3 * DIM), GRID).view_as(q)

    return attend


def neighborhood_with_image_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
    order, position = indexing.order_tables("hilbert", *GRID, "cpu")
    heads = [t.flatten(1, 2)[:, order].transpose(1, 2) for t in (q, k, v)]
    bias = image_bias(RelativeBias2d(table, *GRID, order))
    out = neighborhood_attention(*heads, 49, scale=0.25, bias=bias)
    return out.transpose(1, 2)[:, position].view_as(q)


GOLDEN_CASES = {
    "hwa_16": lambda: through(window(4)),
    "hwa_16_bias": lambda: through(window(4, bias=True)),
    "hwa_49": lambda: through(window(7)),
    "hswa_16": lambda: through(window(4, shift=8)),
    "hswa_16_bias": lambda: through(window(4, shift=8, bias=True)),
    "hswa_49": lambda: through(window(7, shift=24)),
    "hsa_9": lambda: through(HilbertSlideAttention(DIM, HEADS, 9)),
    "hna_9": lambda: through(HilbertNeighborhoodAttention(DIM, HEADS, 9, relative_bias=False)),
    "hna_49_bias": lambda: neighborhood_with_image_bias,
    "wsa_4": lambda: through(window(4, order="window")),
    "sa_5": lambda: on_image(Slide2d(5)),
    "na_5": lambda: on_image(Neighborhood2d(5)),
}


def compare_with_golden(case: str, stored: np.lib.npyio.NpzFile, dtype: torch.dtype) -> int:
    """Check every result of a case that the file has; returns how many these are."""
    height, width, heads, dim = (int(stored[name]) for name in ("height", "width", "heads", "head_dim"))
    rng = np.random.default_rng(int(stored["seed"]))
    draws = [rng.standard_normal((1, height, width, heads, dim)).astype(np.float32) for _ in range(4)]
    q, k, v, cotangent = (torch.from_numpy(draw).to(dtype) for draw in draws)
    entries = (2 * height - 1) * (2 * width - 1)
    table = torch.from_numpy((0.5 * rng.standard_normal((entries, heads))).astype(np.float32)).to(dtype)
    inputs = {"dq": q, "dk": k, "dv": v} | ({"dtable": table} if case.endswith("_bias") else {})
    for tensor in inputs.values():
        tensor.requires_grad_()

    out = GOLDEN_CASES[case]()(q, k, v, inputs.get("dtable"))
    grads = torch.autograd.grad((out * cotangent).sum(), inputs.values())
    results = {"o": out, **dict(zip(inputs, grads, strict=True))}
    compared = 0
    for name, result in results.items():
        if f"{case}.{name}" not in stored:
            continue
        golden = torch.from_numpy(stored[f"{case}.{name}"]).to(dtype)
        fp32 = {"rtol": 1e-5, "atol": 5e-5 if name == "dtable" else 2e-5}  # the file's own; measured 3.4e-6
        torch.testing.assert_close(result, golden, **(ROUNDING if dtype == torch.float64 else fp32))
        compared += 1
    return compared


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_operators(case: str, dtype: torch.dtype) -> None:
    stored = np.load(golden_path(HERE, "ops_12x20.npz"))
    assert case in stored["names"]
    assert compare_with_golden(case, stored, dtype) == 4 + case.endswith("_bias")


def test_golden_operators_from_the_part_kept_here() -> None:
    stored = np.load(golden_path(HERE, "ops_12x20_part.npz"))
    cases = sorted({name.split(".")[0] for name in stored.files if "." in name})
    assert sum(compare_with_golden(case, stored, torch.float64) for case in cases) == 8


# --- core's truth


def make_modules(order: str, map_size: tuple[int, int]) -> list[nn.Module]:
    tile = {"window": 3, "tile": (2, 4)}.get(order)
    shared = {"order": order, "order_tile": tile, "backend": "torch"}
    torch.manual_seed(0)
    return [
        HilbertWindowAttention(8, 2, 3, map_size=map_size, **shared).double(),
        HilbertWindowAttention(8, 2, 3, 4, map_size=map_size, **shared).double(),
        HilbertWindowAttention(8, 2, 2, 3, relative_bias=False, **shared).double(),
        HilbertSlideAttention(8, 2, 5, relative_bias=True, **shared).double(),
        HilbertNeighborhoodAttention(8, 2, 5, **shared).double(),
        HilbertNeighborhoodAttention(8, 2, 6, relative_bias=False, qkv_bias=False, **shared).double(),
    ]


SIZES = [(1, 1), (1, 9), (9, 1), (2, 5), (3, 3), (7, 11), (13, 5), (12, 20)]


@pytest.mark.parametrize("order", indexing.ORDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_operator_equals_the_dense_truth(size: tuple[int, int], order: str) -> None:
    height, width = size
    tokens = torch.randn(2, height * width, 8, dtype=torch.float64, requires_grad=True)
    for module in make_modules(order, size):
        for table in (getattr(module, "rpb", None), getattr(module, "relative_position_bias_table", None)):
            if table is not None:
                nn.init.normal_(table)
        gather, back = module.order_tables(height, width, "cpu")
        heads = module.qkv(tokens[:, gather]).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        layout = module.pattern(height, width).layout(height, width)
        bias = module._bias(height, width, tokens.device)
        mixed = block_sparse_attention(*heads, layout, bias=bias, backend="torch")
        truth = module.proj(mixed.transpose(1, 2).flatten(2))[:, back]

        out = module(tokens, size)
        torch.testing.assert_close(out, truth, **EXACT)
        inputs = (tokens, *module.parameters())
        weights = torch.randn_like(out)
        grads = torch.autograd.grad((out * weights).sum(), inputs)
        truths = torch.autograd.grad((truth * weights).sum(), inputs)
        for grad, true in zip(grads, truths, strict=True):
            torch.testing.assert_close(grad, true, **EXACT)


def test_windows_in_window_order_are_ordinary_window_attention() -> None:
    pattern = HilbertWindowAttention(8, 2, 4, relative_bias=False, order="window").pattern(8, 12)
    order = indexing.build_order("window", 8, 12, 4)
    np.testing.assert_array_equal(pattern.dense(8, 12), Window2d(4).dense(8, 12, order))


@pytest.mark.parametrize("size", [(4, 4), (8, 6), (12, 16)], ids=str)
def test_shifted_windows_are_the_rolled_and_masked_ones_of_the_release(size: tuple[int, int]) -> None:
    """Its way: roll the sequence on by the shift, cut windows, part the wrapped window's tail from its head."""
    height, width, area, shift = *size, 16, 8
    length = height * width
    module = HilbertWindowAttention(8, 2, 4, shift, map_size=size).double()
    nn.init.normal_(module.relative_position_bias_table)
    tokens = torch.randn(2, length, 8, dtype=torch.float64)
    # The module's own rule: on a map no larger than the window nothing is shifted.
    shift = shift if min(size) > 4 else 0

    order, position = module.order_tables(height, width, "cpu")
    rolled = tokens[:, order].roll(shift, 1)
    query, key, value = module.qkv(rolled).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unflatten(3, (-1, area))
    cell = order.roll(shift)
    y, x = (cell // width).view(-1, area), (cell % width).view(-1, area)
    entry = (y[:, :, None] - y[:, None] + height - 1) * (2 * width - 1) + x[:, :, None] - x[:, None] + width - 1
    part = torch.zeros(length // area, area)
    part[0, :shift] = 1
    scores = query @ key.mT * 4**-0.5 + module.relative_position_bias_table[entry].permute(3, 0, 1, 2)
    scores = scores.masked_fill(part[:, :, None] != part[:, None], -torch.inf)
    mixed = (scores.softmax(-1) @ value).flatten(2, 3).transpose(1, 2).flatten(2)
    expected = module.proj(mixed.roll(-shift, 1))[:, position]
    torch.testing.assert_close(module(tokens, size), expected, **EXACT)


def test_a_window_larger_than_the_map_shrinks_to_the_smaller_side_without_shift() -> None:
    module = HilbertWindowAttention(8, 2, 7, 24, relative_bias=False)
    assert (module.pattern(8, 20).size, module.pattern(8, 20).shift) == (49, 24)
    assert (module.pattern(7, 20).size, module.pattern(7, 20).shift) == (49, 0)
    assert (module.pattern(20, 4).size, module.pattern(20, 4).shift) == (16, 0)
    tokens = torch.randn(1, 9, 8)
    whole = module(tokens, (3, 3))
    query, key, value = module.qkv(tokens).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    everyone = nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(whole, module.proj(everyone.transpose(1, 2).flatten(2)), rtol=0, atol=1e-6)


# --- orders and sizes


def test_tokens_already_on_the_curve_give_the_same_answer() -> None:
    tokens = torch.randn(2, 77, 8, dtype=torch.float64)
    for module in make_modules("hilbert", (7, 11)):
        order, position = module.order_tables(7, 11, "cpu")
        on_curve = module(permute_tokens(tokens, order, position), (7, 11), on_curve=True)
        torch.testing.assert_close(permute_tokens(on_curve, position, order), module(tokens, (7, 11)), rtol=0, atol=0)


@pytest.mark.parametrize("order", ["hilbert", "morton", "window", "tile"])
def test_an_image_reordered_by_hand_gives_the_same_answer(order: str) -> None:
    """Along a curve is along the rows of the image that the curve unrolls to. (Image biases know true cells.)"""
    height, width = 6, 10
    tokens = torch.randn(2, 60, 8, dtype=torch.float64)
    for curved, rows in zip(make_modules(order, (6, 10)), make_modules("row_major", (6, 10)), strict=True):
        if getattr(curved, "relative_position_bias_table", None) is not None:
            continue
        rows.load_state_dict(curved.state_dict())
        gather, back = curved.order_tables(height, width, "cpu")
        by_hand = rows(tokens[:, gather], (height, width))[:, back]
        torch.testing.assert_close(curved(tokens, (height, width)), by_hand, **EXACT)


def test_permuting_is_undone_by_its_inverse_and_its_gradient_is_exact() -> None:
    order, position = indexing.order_tables("hilbert", 3, 5, "cpu")
    tokens = torch.randn(2, 15, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(permute_tokens(tokens, order, position), tokens[:, order], rtol=0, atol=0)
    back = permute_tokens(permute_tokens(tokens, order, position), position, order)
    torch.testing.assert_close(back, tokens, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda t: permute_tokens(t, order, position), tokens)
    assert torch.autograd.gradgradcheck(lambda t: permute_tokens(t, order, position) ** 2, tokens)


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (5, 7), (1, 1), (1, 8), (9, 1)], ids=str)
@pytest.mark.parametrize("orders", [("hilbert", "hilbert"), ("window", "row_major")], ids=str)
def test_merging_joins_squares_of_cells(orders: tuple[str, str], size: tuple[int, int]) -> None:
    source, target = (Curve(order, 3 if order == "window" else None) for order in orders)
    height, width = size
    maps = torch.randn(2, *size, 3, dtype=torch.float64)
    padded = nn.functional.pad(maps, (0, 0, 0, width % 2, 0, height % 2))
    squares = torch.cat([padded[:, y::2, x::2] for y, x in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=-1)
    order, _ = target.tables(*squares.shape[1:3], "cpu")

    def merge(tokens: Tensor) -> Tensor:
        return source.merge(source.put_on(tokens, height, width), height, width, target)

    tokens = maps.flatten(1, 2).requires_grad_()
    torch.testing.assert_close(merge(tokens), squares.flatten(1, 2)[:, order], rtol=0, atol=0)
    assert torch.autograd.gradcheck(merge, tokens)
    assert torch.autograd.gradgradcheck(lambda t: merge(t) ** 2, tokens)


def test_gathering_copies_sums_them_in_the_gradient() -> None:
    table = np.array([2, 0, 2, 2, 3])
    is_real = np.array([True, True, True, False, True])  # the fourth is padding: its gradient is nobody's
    gather = Gather(torch.from_numpy(table), torch.from_numpy(slots_of(table, is_real, 4)))
    tokens = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    out = gather(tokens)
    torch.testing.assert_close(out, tokens[:, table], rtol=0, atol=0)
    (grad,) = torch.autograd.grad(out, tokens, torch.ones_like(out))
    assert grad[0, :, 0].tolist() == [1, 0, 2, 1]


def test_changing_sizes_reuse_cached_tables() -> None:
    indexing.clear_caches()
    module = HilbertWindowAttention(8, 2, 3, 4, map_size=(7, 11))
    sizes = [(7, 11), (4, 4), (5, 9), (7, 11), (4, 4), (9, 5)]
    outputs = [module(torch.ones(1, h * w, 8).cumsum(1), (h, w)) for h, w in sizes]
    cached = indexing._order_tables.cache_info()
    assert (cached.misses, cached.hits) == (4, 14)  # three look-ups per call: on the curve, its bias, off again
    torch.testing.assert_close(outputs[0], outputs[3], rtol=0, atol=0)
    assert not torch.equal(outputs[2], outputs[5])


def test_module_gradcheck() -> None:
    module = HilbertWindowAttention(4, 2, 2, 2, map_size=(3, 4)).double()
    tokens = torch.randn(1, 12, 4, dtype=torch.float64, requires_grad=True)
    table = module.relative_position_bias_table

    def run(tokens: Tensor, table: Tensor) -> Tensor:
        name = {"relative_position_bias_table": table}
        return torch.func.functional_call(module, name, (tokens, (3, 4)))

    assert torch.autograd.gradcheck(run, (tokens, table))


# --- the global table at another size


def test_resizing_the_table_keeps_offset_zero_and_symmetry() -> None:
    rows, columns = torch.meshgrid(torch.arange(-6.0, 7), torch.arange(-4.0, 5), indexing="ij")
    table = torch.stack((torch.exp(-(rows**2 + columns**2) / 40), rows / 10), dim=-1).view(-1, 2)
    resized = resize_bias_table(table, (7, 5), (12, 9)).view(23, 17, 2)
    assert resized[11, 8, 0] == resized[..., 0].max()
    torch.testing.assert_close(resized[..., 0], resized.flip(0, 1)[..., 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(resized[..., 1], -resized.flip(0)[..., 1], rtol=0, atol=1e-6)
    assert resized[11, 8, 1].abs() < 1e-6
    # A ramp rises on the whole as before, over more offsets (bicubic weights are not exact between its nodes).
    rise = float(resized[11 + 9, 8, 1] - resized[11 - 9, 8, 1])
    assert rise == pytest.approx(0.1 * 18 * 13 / 23, rel=0.02)


def test_resizing_to_the_same_size_changes_nothing_and_keeps_the_precision() -> None:
    table = torch.randn(13 * 9, 2, dtype=torch.float64)
    torch.testing.assert_close(resize_bias_table(table, (7, 5), (7, 5)), table, rtol=0, atol=1e-12)
    assert resize_bias_table(table.bfloat16(), (7, 5), (8, 8)).dtype == torch.bfloat16


def test_the_table_trains_at_another_size() -> None:
    module = HilbertWindowAttention(8, 2, 3, map_size=(7, 5))
    module(torch.randn(1, 99, 8), (9, 11)).square().sum().backward()
    assert module.relative_position_bias_table.grad.abs().sum() > 0


# --- backends


def test_flex_agrees_with_torch() -> None:
    tokens = torch.randn(1, 35, 8)
    for module in make_modules("hilbert", (5, 7)):
        module.float()
        with torch.no_grad():
            truth = module(tokens, (5, 7))
            module.backend = "flex"
            torch.testing.assert_close(module(tokens, (5, 7)), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.compile
def test_flex_compiles_into_one_graph() -> None:
    tokens = torch.randn(1, 35, 8)
    for module in make_modules("hilbert", (5, 7))[1::2]:
        module.float().backend = "flex"
        with torch.no_grad():
            compiled = torch.compile(lambda t, module=module: module(t, (5, 7)), backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(tokens), module(tokens, (5, 7)), rtol=0, atol=1e-6)


def test_a_named_backend_refuses_rather_than_falls_back() -> None:
    for module in make_modules("hilbert", (5, 7)):
        module.backend = "flex"
        with pytest.raises(BackendUnsupported, match="float64"):
            module(torch.randn(1, 35, 8, dtype=torch.float64), (5, 7))
        module.backend = "triton"
        with pytest.raises(BackendUnsupported, match="triton"):
            module(torch.randn(1, 35, 8, dtype=torch.float64), (5, 7))


def test_auto_on_a_cpu_is_torch() -> None:
    for named in make_modules("hilbert", (5, 7)):
        tokens = torch.randn(1, 35, 8, dtype=torch.float64)
        truth = named(tokens, (5, 7))
        named.backend = "auto"
        torch.testing.assert_close(named(tokens, (5, 7)), truth, rtol=0, atol=0)


# --- bad input


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: HilbertWindowAttention(30, 4, 7, map_size=(8, 8)), ValueError, "num_heads must divide dim 30"),
        (lambda: HilbertWindowAttention(8, 2, 7), ValueError, "map_size must be"),
        (lambda: HilbertWindowAttention(8, 2, 4, 16, map_size=(8, 8)), ValueError, "shift must lie in 0..15"),
        (lambda: HilbertWindowAttention(8, 2, 0, map_size=(8, 8)), ValueError, "window_size must be at least 1"),
        (lambda: HilbertWindowAttention(8, 2, 7.0, map_size=(8, 8)), TypeError, "window_size must be an integer"),
        (lambda: HilbertSlideAttention(8, 2, 8), ValueError, "must be odd"),
        (lambda: HilbertSlideAttention(8, 2, 9, order="peano"), ValueError, "order must be one of"),
        (lambda: HilbertSlideAttention(8, 2, 9, order="window"), ValueError, "a side for 'window'"),
        (lambda: HilbertNeighborhoodAttention(8, 2, 0), ValueError, "kernel_size must be at least 1"),
        (lambda: HilbertNeighborhoodAttention(8, 2, 9, order=[3, 1, 1]), ValueError, "order must be one of"),
        (lambda: HilbertNeighborhoodAttention(8, 2, 9, backend="cuda"), ValueError, "backend must be one of"),
        (
            lambda: HilbertSlideAttention(8, 2, 9)(torch.randn(1, 12, 8), (4, 4)),
            ValueError,
            r"tokens must be height \* width = 4 \* 4 = 16 per image; got 12",
        ),
    ],
)
def test_bad_input_is_named(build: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
