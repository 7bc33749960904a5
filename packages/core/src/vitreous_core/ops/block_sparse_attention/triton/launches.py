"""Compiling the kernels of a pass that are new to this process, side by side."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

from ....kernel_launch import Launch, Pointers

_known: set[tuple[Any, ...]] = set()


def compile_new(launches: Sequence[tuple[Launch, Pointers]]) -> None:
    """Most of a compilation holds no lock of Python's: several together take little longer than the slowest.

    The key leaves out what Triton specialises on besides, such as alignment: what is missed compiles at its launch.
    """
    new = {}
    for launch, own in launches:
        if not own[0].is_cuda:  # the interpreter
            return
        key = (launch.kernel, own[0].dtype, own[0].device, *launch.constants.values())
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
