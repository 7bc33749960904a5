"""Launching the kernels of one pass; those that are new to this process are compiled side by side first."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton

from .configs import Tile


class Launch(NamedTuple):
    """One kernel launch.

    Args:
        kernel: a function of `triton.jit`.
        grid: numbers of programs.
        arguments: in the kernel's order, without its constants.
        constants: by name.
        tile: for its warps and stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    tile: Tile

    @property
    def settings(self) -> dict[str, Any]:
        """All keyword arguments."""
        return {**self.constants, "num_warps": self.tile.warps, "num_stages": self.tile.stages}


_known: set[tuple[Any, ...]] = set()


def launch_all(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch in order on the current stream."""
    if device.type == "cuda":
        _compile_new(launches, device)
    for launch in launches:
        launch.kernel[launch.grid](*launch.arguments, **launch.settings)


def _compile_new(launches: Sequence[Launch], device: torch.device) -> None:
    """Most of a compilation holds no lock of Python's: several together take little longer than the slowest.

    The key leaves out what Triton specialises on besides, such as alignment: what is missed compiles at its launch.
    """
    new = {}
    for launch in launches:
        key = (launch.kernel, launch.arguments[0].dtype, device, launch.tile, *launch.constants.values())
        if key not in _known:
            new[key] = launch
    if len(new) > 1:
        with ThreadPoolExecutor(len(new)) as pool:
            with triton.AsyncCompileMode(pool):
                kernels = [
                    launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.settings)
                    for launch in new.values()
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
