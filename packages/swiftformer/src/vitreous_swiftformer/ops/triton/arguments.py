"""What the launchers share: launches planned once for all tensors of the same shapes and strides."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from .configs import WARPS, make_plan, power_of_two

PLANS = 1024
"""How many launches of each kernel are remembered."""

_ALIGNMENTS = (8, 4, 2)


class Launch(NamedTuple):
    """One launch, planned: what `launch_kernel` takes beside pointers."""

    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]


@lru_cache(maxsize=PLANS)
def plan_passes(
    shape: tuple[int, int, int], device: torch.device, passes: tuple[str, str], registers: int,
    *strides: tuple[int, int, int],
) -> tuple[int, tuple[Launch, ...]]:  # fmt: skip
    """Programs per image, and the launches of additive attention or its derivative: two, or one with both passes.

    Args:
        shape: `[B, L, D]` of every tensor, none of them zero.
        device: where they are.
        passes: names of the constants that say which passes a launch makes, in order.
        registers: most of a thread.
        strides: of every tensor, in the kernel's order.
    """
    batch, tokens, channels = shape
    multiprocessors, _ = resources(device)
    plan = make_plan(batch, tokens, channels, multiprocessors)
    align, numbers = strides_of(shape, strides)
    numbers += [tokens, plan.parts, plan.tokens_per_part]
    constants = {
        "ALIGN": align, "CHANNELS": channels, "BLOCK_L": plan.block_l, "BLOCK_C": plan.block_c,
        "PARTS": power_of_two(plan.parts), "num_warps": WARPS, "maxnreg": registers,
    }  # fmt: skip
    first, second = passes
    launches = ((True, True),) if plan.parts == 1 else ((True, False), (False, True))
    grid = (batch * plan.parts,)
    return plan.parts, tuple(
        Launch(grid, tuple(numbers), {first: does_first, second: does_second, **constants})
        for does_first, does_second in launches
    )


def strides_of(shape: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...]) -> tuple[int, list[int]]:
    """A number that divides the strides of images and tokens, and the strides as kernels take them.

    Triton knows of an integer only whether 16 divides it. Kernels take strides over the number, a constant at compile
    time, and multiply: rows of 56 or 220 channels are then read in vectors too. The stride of an only entry, which may
    be anything, is 0.

    Args:
        shape: `[B, L, D]`, the same for each tensor.
        strides: of each tensor.

    Returns:
        8, 4, 2 or 1; for each tensor the strides of images and tokens over that number, and that of channels.
    """
    batch, tokens, _ = shape
    outer = [(image if batch > 1 else 0, token if tokens > 1 else 0) for image, token, _ in strides]
    align = next(
        (number for number in _ALIGNMENTS if all(stride % number == 0 for pair in outer for stride in pair)), 1
    )
    numbers = []
    for (image, token), (_, _, channel) in zip(outer, strides, strict=True):
        numbers += [image // align, token // align, channel]
    return align, numbers


@cache
def resources(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have: one and no bound in the interpreter."""
    if device.type != "cuda":
        return 1, 1 << 30
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin
