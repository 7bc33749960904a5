"""Launching Triton kernels at little cost to the host; importing this needs no Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes: Triton compiles other code for pointers that are no multiples of it."""

_MOST_LAUNCHES = 4096

_known: dict[tuple[Any, ...], tuple[Callable[..., object], tuple[Any, ...], Any]] = {}


def launch_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    pointers: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: Mapping[str, Any],
) -> None:
    """Launch on the current stream of the current device, which must be that of the tensors.

    `kernel[grid](...)` looks at every argument by itself to find the code that was compiled for such arguments: with
    fifty of them that takes the host several times as long as the launch. Here a launch that differs from an earlier
    one in nothing but addresses is repeated: the same numbers, and pointers of the same dtypes and alignment.

    Args:
        kernel: a function of `triton.jit` whose arguments are pointers, then numbers, then constants.
        grid: numbers of programs.
        pointers: tensors, or None.
        numbers: ints and floats.
        constants: by name: its `tl.constexpr` arguments, and options such as `num_warps`.
    """
    key = (
        id(kernel), grid, numbers, *constants.items(),
        *[None if tensor is None else (tensor.dtype, tensor.data_ptr() % _ALIGNMENT) for tensor in pointers],
        next(tensor.get_device() for tensor in pointers if tensor is not None),
    )  # fmt: skip
    known = _known.get(key)
    if known is not None:
        run, rest, _ = known
        run(*pointers, *rest)
        return
    compiled = kernel[grid](*pointers, *numbers, **constants)
    if compiled is None:  # Triton's interpreter compiles nothing
        return
    if len(_known) >= _MOST_LAUNCHES:
        _known.clear()
    names = kernel.arg_names[len(pointers) + len(numbers) :]
    rest = (*numbers, *(constants[name] for name in names))
    # The kernel is kept, so that nothing else gets its id.
    _known[key] = compiled[(*grid, 1, 1)[:3]], rest, kernel


_HERE: AbstractContextManager[object] = nullcontext()


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current, as launches need; nothing to do where it is, or on a CPU (the interpreter)."""
    index = tensor.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)
