"""How the windows of a packed image are dealt out, and tiles of the kernels, as data."""

from __future__ import annotations

import pytest
import torch

from vitreous_flash_window.ops.triton.shifted_configs import LARGEST_TILE, choose, deal, fits_on_chip

HALF, SINGLE, CPU = torch.float16, torch.float32, torch.device("cpu")
SLOTS = 264
"""Programs at once on an H100, two per multiprocessor; a CPU counts as three multiprocessors."""


def _steps(zones: tuple[int, ...], owners: int, waves: int, cost_of_a_wave: int = 2) -> int:
    """Windows that the slot with most work visits."""
    load, parts = deal(zones, owners, SLOTS // 3, waves, cost_of_a_wave, CPU)
    assert parts == sum(-(-size // load) for size in zones)
    return -(-parts * owners // SLOTS) * load


@pytest.mark.parametrize("zones", [(1,), (32,), (2048,), (32, 32, 32, 32), (1568, 224, 224, 32), (0, 0, 16, 16)])
@pytest.mark.parametrize("owners", [3, 9, 36, 72, 400])
def test_one_wave_fits_and_further_ones_only_help(zones, owners):
    load, parts = deal(zones, owners, SLOTS // 3, 1, 2, CPU)
    assert sum(zones) <= load * parts
    assert parts * owners <= max(SLOTS, owners * sum(size > 0 for size in zones))
    assert _steps(zones, owners, 4) <= _steps(zones, owners, 1)


def test_small_zones_are_cut_into_several_waves():
    # Stage 3 of Swin-T at 384 pixels: one wave would have room for 7 parts, but the four zones are equal.
    assert _steps((32,) * 4, 36, 1) == 32
    assert _steps((32,) * 4, 36, 4) == 22


def test_the_forward_pass_takes_fewer_waves():
    # Stage 2 of Swin-T at 384 pixels.
    zones, config = (288, 96, 96, 32), choose(144, 32, HALF, "tf32", False)
    assert _steps(zones, 18, 4, config.queries.cost_of_a_wave) == 36
    assert _steps(zones, 18, 4, config.forward.cost_of_a_wave) == 42


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("dtype", "head_dim"), [(HALF, 32), (HALF, 64), (SINGLE, 32)])
def test_somebody_sums_the_bias_gradient_and_chunks_see_every_column(dtype, head_dim, cosine):
    for window in range(1, 17):
        tokens = window**2
        if not fits_on_chip(tokens, head_dim, dtype.itemsize):
            continue
        config = choose(tokens, head_dim, dtype, "tf32", cosine)
        assert (config.keys is None) == (tokens <= LARGEST_TILE)
        assert (config.bias is not None) == (tokens > LARGEST_TILE and (cosine or tokens > 144))
        for tile in filter(None, config):
            options = tile.options(tokens)
            covered = (options["CHUNKS"] - 1) * options["CHUNK"] + options["LAST"]
            assert tokens <= covered <= options["CHUNKS"] * options["CHUNK"]
