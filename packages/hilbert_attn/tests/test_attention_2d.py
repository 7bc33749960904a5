"""Attention to squares of the image: NATTEN's and Swin's definitions by brute force, orders, small maps, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vitreous_core import indexing
from vitreous_hilbert_attn import NeighborhoodAttention2d, SlideAttention2d, WindowAttention2d
from vitreous_hilbert_attn.image_attention import tiling_of
from vitreous_hilbert_attn.reorder import Curve

DIM, HEADS = 8, 2
# Two fp64 ways to the same sum; measured 4.1e-14.
EXACT = {"rtol": 0, "atol": 1e-12}
SIZES = [(1, 1), (1, 9), (9, 1), (2, 5), (3, 3), (7, 11), (13, 5), (12, 17)]
TILES = {"window": 3, "tile": (2, 4)}


def natten_axis(length: int, kernel: int, dilation: int) -> list[list[int]]:
    """Visible cells of every cell of an axis: the window among the cells of its residue, moved inwards at the ends."""
    seen = []
    for cell in range(length):
        group = list(range(cell % dilation, length, dilation))
        start = min(max(group.index(cell) - kernel // 2, 0), max(len(group) - kernel, 0))
        seen.append(group[start : start + kernel])
    return seen


def slide_axis(length: int, kernel: int, dilation: int) -> list[list[int]]:
    steps = range(-(kernel // 2), kernel // 2 + 1)
    return [[c for c in (cell + step * dilation for step in steps) if 0 <= c < length] for cell in range(length)]


def window_axis(length: int, window: int, shift: int) -> list[list[int]]:
    """Swin's roll by `-shift`, windows from the start, and the mask that parts what the roll brought together."""
    if length <= window:
        shift = 0
    rolled = [(cell + shift) % length for cell in range(length)]
    seen: list[list[int]] = [[] for _ in range(length)]
    for start in range(0, length, window):
        cells = rolled[start : start + window]
        for cell in cells:
            # A window may begin in the last cells and end in the first ones, which the roll moved behind them.
            seen[cell] = [other for other in cells if (other < shift) == (cell < shift)]
    return seen


def truth(module: nn.Module, maps: Tensor, axes: list[list[list[int]]], entry: Callable[..., Tensor]) -> Tensor:
    """Attention pixel by pixel, in image order. `entry(dy, dx)` is the bias `[H]` of a query and a key that far on."""
    height, width = maps.shape[1:3]
    query, key, value = module.qkv(maps).unflatten(3, (3, HEADS, DIM // HEADS)).unbind(3)
    rows = []
    for y in range(height):
        for x in range(width):
            cells = [(i, j) for i in axes[0][y] for j in axes[1][x]]
            k, v = (torch.stack([t[:, i, j] for i, j in cells], dim=2) for t in (key, value))  # [B, H, keys, D]
            scores = (query[:, y, x, :, None] @ k.mT).squeeze(2) * (DIM // HEADS) ** -0.5
            scores = scores + torch.stack([entry(i - y, j - x) for i, j in cells], dim=1)
            rows.append((scores.softmax(-1)[:, :, None] @ v).squeeze(2).flatten(1))
    return module.proj(torch.stack(rows, dim=1)).unflatten(1, (height, width))


def rpb_entry(module: nn.Module) -> Callable[[int, int], Tensor]:
    """The entry of an offset, counted from the middle of the table."""
    down, across = module._pattern.dilations()
    middle = tuple(side // 2 for side in module.rpb.shape[1:])
    return lambda dy, dx: module.rpb[:, middle[0] + dy // down, middle[1] + dx // across]


def swin_entry(module: nn.Module) -> Callable[[int, int], Tensor]:
    rows, columns = module.window_size
    table = module.relative_position_bias_table
    return lambda dy, dx: table[(-dy + rows - 1) * (2 * columns - 1) - dx + columns - 1]


def neighborhood(kernel: object, dilation: object = 1) -> tuple:
    pairs = [value if isinstance(value, tuple) else (value, value) for value in (kernel, dilation)]
    return (
        lambda **settings: NeighborhoodAttention2d(DIM, HEADS, kernel, dilation, **settings),
        lambda length, axis: natten_axis(length, pairs[0][axis], pairs[1][axis]),
        rpb_entry,
    )


CASES = {
    "neighborhood-3": neighborhood(3),
    "neighborhood-7": neighborhood(7),
    "neighborhood-even": neighborhood(4),
    "neighborhood-dilated": neighborhood(3, 2),
    "neighborhood-even-rectangle-dilated": neighborhood((4, 5), (2, 3)),
    "slide-5": (
        lambda **settings: SlideAttention2d(DIM, HEADS, 5, relative_bias=True, **settings),
        lambda length, axis: slide_axis(length, 5, 1),
        rpb_entry,
    ),
    "slide-rectangle-dilated": (
        lambda **settings: SlideAttention2d(DIM, HEADS, (3, 5), (1, 2), relative_bias=True, **settings),
        lambda length, axis: slide_axis(length, (3, 5)[axis], (1, 2)[axis]),
        rpb_entry,
    ),
    "window-4": (
        lambda **settings: WindowAttention2d(DIM, HEADS, 4, **settings),
        lambda length, axis: window_axis(length, 4, 0),
        swin_entry,
    ),
}


def with_a_bias_that_matters(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        if name in ("rpb", "relative_position_bias_table"):
            nn.init.normal_(parameter)
    return module.double()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_gradients_are_those_of_the_definition(size: tuple[int, int], case: str) -> None:
    build, axis, entry = CASES[case]
    torch.manual_seed(0)
    module = with_a_bias_that_matters(build(backend="torch"))
    maps = torch.randn(2, *size, DIM, dtype=torch.float64, requires_grad=True)
    expected = truth(module, maps, [axis(side, index) for index, side in enumerate(size)], entry(module))
    out = module(maps)
    torch.testing.assert_close(out, expected, **EXACT)
    inputs, cotangent = (maps, *module.parameters()), torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    for got, want in zip(gradients, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("size", [(12, 16), (8, 4), (3, 16)], ids=str)
def test_shifted_windows_are_swins(size: tuple[int, int]) -> None:
    """Where windows divide the map (or hold it), there is nothing that Swin would pad."""
    module = with_a_bias_that_matters(WindowAttention2d(DIM, HEADS, 4, 2))
    maps = torch.randn(2, *size, DIM, dtype=torch.float64)
    axes = [window_axis(side, 4, 2) for side in size]
    torch.testing.assert_close(module(maps), truth(module, maps, axes, swin_entry(module)), **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_every_order_gives_the_same_result(case: str) -> None:
    build, *_ = CASES[case]
    maps = torch.randn(2, 9, 10, DIM, dtype=torch.float64, requires_grad=True)
    results = []
    for order in indexing.ORDERS:
        torch.manual_seed(0)
        module = with_a_bias_that_matters(build(order=order, order_tile=TILES.get(order)))
        out = module(maps)
        results.append((out, *torch.autograd.grad(out.square().sum(), (maps, *module.parameters()))))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_natten_refuses_what_we_take_whole() -> None:
    """A kernel longer than the map sees all of it, and nothing else: full attention with the bias by offset."""
    module = with_a_bias_that_matters(NeighborhoodAttention2d(DIM, HEADS, 7))
    maps = torch.randn(1, 3, 5, DIM, dtype=torch.float64)
    everything = [[list(range(side))] * side for side in (3, 5)]
    torch.testing.assert_close(module(maps), truth(module, maps, everything, rpb_entry(module)), **EXACT)


def test_tokens_on_the_curve_and_maps_are_the_same_call() -> None:
    module = NeighborhoodAttention2d(DIM, HEADS, 3).double()
    maps = torch.randn(2, 5, 7, DIM, dtype=torch.float64)
    tokens = maps.flatten(1, 2)
    torch.testing.assert_close(module(tokens, (5, 7)), module(maps).flatten(1, 2), rtol=0, atol=0)
    on_curve = module(module.curve.put_on(tokens, 5, 7), (5, 7), on_curve=True)
    torch.testing.assert_close(module.curve.take_off(on_curve, 5, 7), module(tokens, (5, 7)), rtol=0, atol=0)


def test_flex_agrees_with_torch() -> None:
    maps = torch.randn(1, 6, 7, DIM)
    for build, *_ in CASES.values():
        module = with_a_bias_that_matters(build()).float()
        with torch.no_grad():
            expected = module(maps)
            module.backend = "flex"
            torch.testing.assert_close(module(maps), expected, rtol=1e-5, atol=1e-6)


def test_the_torch_backend_visits_few_keys_in_vain() -> None:
    tiling = tiling_of(NeighborhoodAttention2d(DIM, HEADS, 7).pattern(56, 56), Curve("hilbert"), 56, 56, "cpu")
    visited = tiling.visible.shape[0] * tiling.visible.shape[1] * tiling.visible.shape[2]
    assert int(tiling.visible.sum()) == 56 * 56 * 49
    assert visited < 5 * 56 * 56 * 49


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NeighborhoodAttention2d(8, 3, 7), "num_heads must divide dim 8"),
        (lambda: NeighborhoodAttention2d(8, 2, 0), "kernel must be at least 1"),
        (lambda: NeighborhoodAttention2d(8, 2, 7, 0), "dilation must be at least 1"),
        (lambda: NeighborhoodAttention2d(8, 2, (7, 7, 7)), "kernel must be one number or"),
        (lambda: NeighborhoodAttention2d(8, 2, 7, order="peano"), "order must be one of"),
        (lambda: SlideAttention2d(8, 2, 6), "must be odd"),
        (lambda: WindowAttention2d(8, 2, 4, 4), r"shift must lie in 0\.\.3"),
        (lambda: NeighborhoodAttention2d(8, 2, 7)(torch.randn(1, 12, 8)), "size must be the"),
        (lambda: NeighborhoodAttention2d(8, 2, 7)(torch.randn(1, 3, 4, 8), on_curve=True), "size must be the"),
        (lambda: NeighborhoodAttention2d(8, 2, 7)(torch.randn(1, 12, 8), (3, 5)), "15 per image; got 12"),
    ],
)
def test_bad_input_is_named(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
