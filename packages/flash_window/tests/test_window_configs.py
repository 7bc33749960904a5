"""Launches of the short kernels as data: what they cover and how many programs they make."""

from __future__ import annotations

import pytest
import torch

from vitreous_core.bench.measure import matmul_precision
from vitreous_flash_window.ops.triton import configs

HALF, SINGLE = torch.float16, torch.float32
PASSES = (configs.choose_forward, configs.choose_rows, configs.choose_keys)
SHAPES = [
    (dtype, tokens, head_dim)
    for dtype in (HALF, SINGLE)
    for head_dim in (16, 32, 64, 128, 256)
    for tokens in range(1, configs.LARGEST_TOKENS + 1)
    if configs.fits_on_chip(tokens, head_dim, dtype.itemsize)
]


def _launches(choose, *shape):
    chosen = choose(*shape)
    return [chosen] if isinstance(chosen, configs.Tile) else chosen


@pytest.mark.parametrize("choose", PASSES)
def test_launches_own_each_row_once_and_see_every_column(choose):
    for shape in SHAPES:
        tokens, end = shape[1], 0
        for tile in _launches(choose, *shape):
            assert tile.first == end
            end = tile.first + tile.strips * tile.rows
            if tile.rest:
                assert 0 < tokens - end <= tile.rest
                end = tokens
            whole = tokens // tile.columns if tile.tail else -(-tokens // tile.columns)
            assert tile.columns * whole + tile.tail >= tokens > tile.columns * (whole - 1)
        assert end >= tokens


def test_only_queries_of_slim_windows_share_a_launch_with_their_rest():
    assert [(tile.rows, tile.rest) for tile in configs.choose_rows(HALF, 144, 32)] == [(64, 16)]
    assert configs.choose_forward(HALF, 144, 32).rest == 0
    assert [(tile.rows, tile.rest) for tile in configs.choose_keys(HALF, 144, 32)] == [(64, 0), (16, 0)]
    assert [(tile.rows, tile.rest) for tile in configs.choose_rows(HALF, 144, 64)] == [(64, 0), (16, 0)]
    assert [(tile.rows, tile.rest) for tile in configs.choose_rows(HALF, 81, 32)] == [(64, 0), (32, 0)]


def test_factors_are_halved_where_four_warps_compute_in_tf32():
    def halved(dtype, tokens, head_dim):
        tiles = configs.choose_rows(dtype, tokens, head_dim) + configs.choose_keys(dtype, tokens, head_dim)
        return {(tile.rows, tile.halved) for tile in tiles}

    assert halved(SINGLE, 49, 32) == {(64, False)}
    with matmul_precision("high"):
        assert halved(SINGLE, 49, 32) == {(64, True)}
        assert halved(SINGLE, 144, 32) == {(64, True), (16, False)}
        assert halved(HALF, 49, 32) == {(64, False)}
    assert configs.choose_channels(64, 128, "tf32").backward.halved
    assert not configs.choose_channels(64, 256, "tf32").backward.halved
    assert not configs.choose_channels(32, 128, "tf32").backward.halved
    assert not configs.choose_channels(64, 128, "ieee").backward.halved


def test_tiles_of_the_bias_gradient_cover_the_scores():
    for dtype, tokens, head_dim in SHAPES:
        tile = configs.choose_bias_gradient(dtype, tokens, head_dim, False)
        assert (tile is None) == (tokens <= 144)
        assert tile is None or tile.rows * (tile.strips - 1) < tokens <= tile.rows * tile.strips


@pytest.mark.parametrize("heads", [1, 3, 24, 500])
@pytest.mark.parametrize("windows", [1, 7, 64, 4096])
@pytest.mark.parametrize("tokens", [49, 144, 196, 256])
def test_parts_never_outnumber_windows_nor_leave_a_wave_half_empty(tokens, windows, heads):
    slots = 132 * 2
    tile = configs.choose_rows(HALF, tokens, 32)[0]
    cost = 0.5 if tile.rest else 0.0
    parts, rest_parts = configs._count_parts(slots, heads, tile.strips, cost, windows)
    assert 1 <= parts <= windows
    assert (1 <= rest_parts <= windows) == bool(tile.rest)
    programs = (parts * tile.strips + rest_parts) * heads
    if windows == 4096 and heads <= 24:  # enough of them to fill the machine
        assert programs > 0.75 * slots * -(-programs // slots)
