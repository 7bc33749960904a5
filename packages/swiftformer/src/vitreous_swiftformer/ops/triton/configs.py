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


MOST_MLP_CHANNELS = 256
"""More would leave the result of 64 positions no place in registers."""

_MLP_CHANNEL_STEP = 4
"""Rows of other widths are read in shorter vectors, whose addresses spill."""


def takes_mlp(channels: int) -> bool:
    """Whether the kernel of two 1x1 convolutions has this width: multiples of 4 up to 256."""
    return 0 < channels <= MOST_MLP_CHANNELS and channels % _MLP_CHANNEL_STEP == 0


def plan_mlp(channels: int, hidden: int, shared_memory: int) -> MlpPlan:
    """For channels that `takes_mlp`; measured at the widths of XS and L1 on an H100.

    Fewer chunks on their way, then smaller ones, where a program's shared memory (bytes) is small.
    """
    plan = _wanted_mlp(channels, hidden)
    while _mlp_bytes(plan, hidden) > shared_memory and plan.stages > 1:
        plan = plan._replace(stages=plan.stages - 1)
    while _mlp_bytes(plan, hidden) > shared_memory and plan.block_h > 16:
        plan = plan._replace(block_h=plan.block_h // 2)
    return plan


def _wanted_mlp(channels: int, hidden: int) -> MlpPlan:
    first, second = split(channels)
    is_local = hidden <= channels
    if channels <= 64 and is_local:
        return MlpPlan(64, first, second, 64, programs=4, stages=2, warps=4)
    if channels <= 64 and hidden <= 256:
        # Chunks that fill their block; as many programs as registers hold.
        wide = hidden % 64 == 0
        return MlpPlan(64, first, second, 64 if wide else 32, programs=3 if wide else 2, stages=1, warps=4)
    if channels <= 128 and second == 0:
        return MlpPlan(64, first, second, 64, programs=0, stages=2, warps=4)
    if channels <= 192:
        return MlpPlan(64, first, second, 32, programs=0, stages=2 if is_local else 3, warps=4)
    return MlpPlan(64, first, second, 64 if is_local else 32, programs=0, stages=2 if is_local else 3, warps=8)


def _mlp_bytes(plan: MlpPlan, hidden: int) -> int:
    """Shared memory of a program: tiles of the map, also of the residual where they are on their way, and weights."""
    row = 2 * (plan.first + plan.second)
    if plan.programs:
        tiles = 1 if plan.stages == 1 else 2 * plan.stages
        return row * (tiles * plan.block_p + 2 * _ceil_div(hidden, plan.block_h) * plan.block_h) + 1024
    return row * (plan.block_p + 2 * plan.stages * plan.block_h) + 1024


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


def plan_halving(channels: int, outputs: int, shared_memory: int) -> HalvingPlan:
    """For any number of channels; measured at the widths of XS and L1 on an H100.

    Less on its way where a program's shared memory (bytes) is small.
    """
    block_o = max(power_of_two(outputs), 16)
    if channels <= 3:
        plan = HalvingPlan(128, 32, min(block_o, 64), stages=1, warps=4)
    elif block_o <= 64:
        plan = HalvingPlan(128, 64, block_o, stages=3, warps=4)
    elif outputs <= 192:
        plan = HalvingPlan(128, 64, 128, stages=3, warps=8)
    elif outputs <= 256:
        plan = HalvingPlan(64, 64, 256, stages=3, warps=8)
    else:
        plan = HalvingPlan(64, 64, 128, stages=3, warps=4)
    while 2 * plan.stages * plan.block_k * (plan.block_p + plan.block_o) + 1024 > shared_memory and plan.stages > 1:
        plan = plan._replace(stages=plan.stages - 1)
    return plan
