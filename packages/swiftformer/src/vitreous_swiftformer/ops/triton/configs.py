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


_MOST_ENCODER_CHANNELS = 256
"""More would leave the result of 64 positions no place in registers."""

_ENCODER_CHANNEL_STEP = 8
"""Rows of other widths are read in shorter vectors, whose addresses spill."""


class EncoderPlan(NamedTuple):
    """How the convolutional block is launched.

    Args:
        block_p: positions of a program.
        block_c: power of two that holds the channels.
        block_h: hidden channels at a time.
        stages: chunks of weights on their way.
        warps: of a program.
    """

    block_p: int
    block_c: int
    block_h: int
    stages: int
    warps: int


def takes_encoder(channels: int) -> bool:
    """Whether the convolutional block has a kernel at this width: multiples of 8 up to 256."""
    return 0 < channels <= _MOST_ENCODER_CHANNELS and channels % _ENCODER_CHANNEL_STEP == 0


def plan_encoder(channels: int) -> EncoderPlan:
    """For channels that `takes_encoder`."""
    # Matrix tiles are at least 16 wide. Wider chunks of hidden channels spill.
    block_c = max(power_of_two(channels), 16)
    return EncoderPlan(block_p=64, block_c=block_c, block_h=32, stages=2, warps=4 if block_c <= 128 else 8)
