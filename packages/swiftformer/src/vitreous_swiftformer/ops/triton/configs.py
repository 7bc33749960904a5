"""How a problem is cut into programs: pure functions of its sizes."""

from __future__ import annotations

from typing import NamedTuple

MOST_CHANNELS = 2048
"""A tile of one token."""

WARPS = 4
FORWARD_REGISTERS, BACKWARD_REGISTERS = 128, 168
"""Most of a thread: without a bound, the compiler spills a few to fit in one more program."""

_ELEMENTS = 2048
"""Of a tile: with more, a backward's three do not fit into the registers."""

_PROGRAMS_PER_MULTIPROCESSOR = 8
"""That are resident at once; fewer leave memory idle."""

_PARTIAL_ELEMENTS = 8192
"""Most partial sums of an image, which every program of the second pass adds up in one tile."""


class Plan(NamedTuple):
    """How the tokens of an image are shared out.

    Args:
        block_c: power of two that holds the channels.
        block_l: tokens in a tile.
        parts: programs per image, none of them without tokens; with one, both passes are one launch.
        tokens_per_part: whole tiles; the last part's can lie beyond the tokens.
    """

    block_c: int
    block_l: int
    parts: int
    tokens_per_part: int


def make_plan(batch: int, tokens: int, channels: int, multiprocessors: int) -> Plan:
    """For at least one image of at least one token."""
    block_c = max(power_of_two(channels), 16)
    block_l = min(_ELEMENTS // block_c, power_of_two(tokens))
    tiles = _ceil_div(tokens, block_l)
    wanted = _ceil_div(multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR, batch)
    parts = min(tiles, wanted, max(_PARTIAL_ELEMENTS // block_c, 1))
    tokens_per_part = _ceil_div(tiles, parts) * block_l
    return Plan(block_c, block_l, _ceil_div(tokens, tokens_per_part), tokens_per_part)


def power_of_two(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length()


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


class MlpPlan(NamedTuple):
    """How two 1x1 convolutions with a GELU between are launched.

    Args:
        block_p: positions of a tile.
        first, second: powers of two that hold the channels between them; the second can be 0.
        block_h: hidden channels at a time.
        programs: per multiprocessor, that keep all weights on chip; 0 for one program per tile, which reads them.
        stages: chunks of weights on their way, where they are read; else tiles of the map.
        warps: of a program.
    """

    block_p: int
    first: int
    second: int
    block_h: int
    programs: int
    stages: int
    warps: int


MOST_MLP_CHANNELS = 384
"""More would leave the result of 64 positions no place in registers."""

_MLP_CHANNEL_STEP = 4
"""Rows of other widths are read in shorter vectors, whose addresses spill."""


def takes_mlp(channels: int) -> bool:
    """Whether the kernel of two 1x1 convolutions has this width: multiples of 4 up to 384."""
    return 0 < channels <= MOST_MLP_CHANNELS and channels % _MLP_CHANNEL_STEP == 0


def plan_mlp(channels: int, hidden: int) -> MlpPlan:
    """For channels that `takes_mlp`."""
    first, second = split(channels)
    if channels <= 64 and hidden <= 256:
        return MlpPlan(64, first, second, 64 if hidden % 64 == 0 else 32, 3, 1, 4)
    return MlpPlan(64, first, second, 64 if channels <= 128 else 32, 0, 2, 4 if channels < 200 else 8)


def split(channels: int) -> tuple[int, int]:
    """Two powers of two that hold the channels between them with the least room to spare, the second perhaps 0.

    From 32 up, since narrower products waste more of the matrix units.
    """
    whole = max(power_of_two(channels), 16)
    half, rest = whole // 2, max(power_of_two(max(channels - whole // 2, 1)), 32)
    return (half, rest) if half + rest < whole else (whole, 0)


class HalvingPlan(NamedTuple):
    """How a 3x3 convolution of stride 2 is launched.

    Args:
        block_p: output cells of a tile.
        block_k: neighbours times channels at a time.
        block_o: output channels of a tile.
        stages: products whose factors are on their way.
        warps: of a program.
    """

    block_p: int
    block_k: int
    block_o: int
    stages: int
    warps: int


_WIDEST_HALVING = 128
"""Output channels of a tile, whose sums are in registers."""


def plan_halving(channels: int, outputs: int) -> HalvingPlan:
    """For any number of channels."""
    block_o = min(max(power_of_two(outputs), 16), _WIDEST_HALVING)
    block_k = 32 if channels <= 3 else 64
    return HalvingPlan(128 if block_o <= 64 else 64, block_k, block_o, 3, 4)
