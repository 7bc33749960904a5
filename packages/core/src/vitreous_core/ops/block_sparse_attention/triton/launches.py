"""Launching the kernels of one pass; those that are new to this process are compiled side by side first."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ....kernel_launch import launch_kernel

Pointers = tuple[Tensor | None, ...]


class Launch(NamedTuple):
    """One kernel launch, planned: all of it but its pointers.

    Args:
        kernel: a function of `triton.jit`.
        grid: numbers of programs.
        numbers: its arguments after the pointers, in its order.
        constants: its other arguments by name, with warps and stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]


class Pass:
    """Launches that follow each other on the current stream."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.launches = tuple(launches)
        self._is_compiled = False

    def run(self, pointers: Sequence[Pointers], device: torch.device) -> None:
        """Launch in order, each with its pointers."""
        if not self._is_compiled:
            if device.type == "cuda":
                _compile_new(self.launches, pointers, device)
            self._is_compiled = True
        for launch, own in zip(self.launches, pointers, strict=True):
            launch_kernel(launch.kernel, launch.grid, own, launch.numbers, launch.constants)


_known: set[tuple[Any, ...]] = set()


def _compile_new(launches: Sequence[Launch], pointers: Sequence[Pointers], device: torch.device) -> None:
    """Most of a compilation holds no lock of Python's: several together take little longer than the slowest.

    The key leaves out what Triton specialises on besides, such as alignment: what is missed compiles at its launch.
    """
    new = {}
    for launch, own in zip(launches, pointers, strict=True):
        key = (launch.kernel, own[0].dtype, device, *launch.constants.values())
        if key not in _known:
            new[key] = launch, own
    if len(new) > 1:
        with ThreadPoolExecutor(len(new)) as pool:
            with triton.AsyncCompileMode(pool):
                kernels = [
                    launch.kernel.warmup(*own, *launch.numbers, grid=launch.grid, **launch.constants)
                    for launch, own in new.values()
                ]
            list(pool.map(_build_launcher, kernels))
    _known.update(new)


def _build_launcher(kernel: Any) -> None:
    """Leave what launches a kernel in Triton's cache, where the launch looks for it.

    Triton 3.6 makes a C function for each signature, and its compiler takes as long as that of a small kernel.
    """
    if isinstance(kernel, triton.FutureKernel):
        kernel = kernel.result()
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
