"""Launching Triton kernels at little cost to the host; importing this needs no Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes: Triton compiles other code for pointers that are no multiples of it."""

_MOST_LAUNCHES = 4096

Pointers = tuple[Tensor | None, ...]


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], pointers: Pointers, numbers: tuple[float, ...], constants: Mapping[str, Any]
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
    _launch(kernel, grid, pointers, numbers, constants)


def _launch(
    kernel: Any, grid: tuple[int, ...], pointers: Pointers, numbers: tuple[float, ...], constants: Mapping[str, Any]
) -> _Repeat | None:
    """Launch, and return what repeats this launch."""
    device = next(tensor.get_device() for tensor in pointers if tensor is not None)
    key = (
        id(kernel), grid, numbers, *constants.items(),
        *[None if tensor is None else (tensor.dtype, tensor.data_ptr() % _ALIGNMENT) for tensor in pointers], device,
    )  # fmt: skip
    known = _known.get(key)
    if known is not None:
        if known.is_watched():
            known.compiled[known.grid](*pointers, *known.rest)
        else:
            known.start(known.stream(), *known.code, *pointers, *known.rest)
        return known
    compiled = kernel[grid](*pointers, *numbers, **constants)
    if compiled is None:  # Triton's interpreter compiles nothing
        return None
    if len(_known) >= _MOST_LAUNCHES:
        _known.clear()
    names = kernel.arg_names[len(pointers) + len(numbers) :]
    rest = (*numbers, *(constants[name] for name in names))
    known = _known[key] = _Repeat(kernel, compiled, (*grid, 1, 1)[:3], rest, device)
    return known


class _Repeat:
    """A launch of compiled code, as Triton's own runner does it, without what that does for hooks of profilers.

    Args:
        kernel: kept, so that nothing else gets its id.
        compiled: Triton's compiled kernel.
        grid: three numbers of programs.
        rest: all arguments after the pointers.
        device: index of the GPU.
    """

    def __init__(self, kernel: Any, compiled: Any, grid: tuple[int, ...], rest: tuple[Any, ...], device: int) -> None:
        from triton import knobs
        from triton.runtime import driver

        self.kernel, self.compiled, self.grid, self.rest = kernel, compiled, grid, rest
        self.start = partial(compiled.run, *grid)
        self.code = compiled.function, compiled.packed_metadata, None, None, None  # no hooks, nothing to tell them
        self._driver, self._device, self._hooks = driver, device, knobs.runtime

    def stream(self) -> Any:
        """The current one."""
        return self._driver.active.get_current_stream(self._device)

    def is_watched(self) -> bool:
        """Whether a profiler has hooks that Triton's own runner calls."""
        enter, leave = self._hooks.launch_enter_hook, self._hooks.launch_exit_hook
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


_known: dict[tuple[Any, ...], _Repeat] = {}


class Launch(NamedTuple):
    """One launch of a `LaunchSequence`: all of it but addresses.

    Args:
        kernel, grid, numbers, constants: as in `launch_kernel`.
        pointers: of the kernel, by the names of their places.
    """

    kernel: Any
    grid: tuple[int, ...]
    pointers: tuple[str, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]


class LaunchSequence:
    """Launches that follow each other on the current stream, planned once and run with ever new buffers.

    A run looks at nothing but addresses, so whoever keeps one must plan another wherever something else decides what
    code is compiled: a buffer has the same dtype and device in every run of a sequence, and is None in all or in none.

    Args:
        launches: in their order.
        places: what the names of pointers stand for: the index of a buffer, and how many of its elements further.
        fixed: by name: tensors (or None) that are the same in every run.
        before_first: called before the first run with every launch and its pointers, to compile them.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        places: Mapping[str, tuple[int, int]],
        fixed: Mapping[str, Tensor | None],
        before_first: Callable[[Sequence[tuple[Launch, Pointers]]], None] | None = None,
    ) -> None:
        self.launches = tuple(launches)
        self._places = places
        self._fixed = fixed
        self._before_first = before_first
        self._repeats: list[tuple[_Repeat, itemgetter[Any]]] = []
        self._fixed_addresses: list[int] = []
        self._further: list[tuple[int, int]] = []

    def run(self, buffers: Sequence[Tensor | None]) -> None:
        """Launch in order, on the device of the buffers, which must be the current one."""
        addresses = [0 if buffer is None else buffer.data_ptr() for buffer in buffers]
        addresses += self._fixed_addresses
        addresses += [addresses[buffer] + further for buffer, further in self._further]
        repeats = self._repeats
        if not repeats or reduce(or_, addresses) % _ALIGNMENT or repeats[0][0].is_watched():
            self._bind(buffers)
            return
        stream = repeats[0][0].stream()
        for launch, own in repeats:
            launch.start(stream, *launch.code, *own(addresses), *launch.rest)

    def _bind(self, buffers: Sequence[Tensor | None]) -> None:
        """Launch with tensors, whatever their alignment; where all are aligned, remember how to repeat it."""
        tensors = {name: _element(buffers[buffer], further) for name, (buffer, further) in self._places.items()}
        tensors |= self._fixed
        launches = [(launch, tuple(tensors[name] for name in launch.pointers)) for launch in self.launches]
        if self._before_first is not None:
            self._before_first(launches)
            self._before_first = None
        known = [
            _launch(launch.kernel, launch.grid, pointers, launch.numbers, launch.constants)
            for launch, pointers in launches
        ]
        is_aligned = all(tensor is None or tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors.values())
        if is_aligned and not self._repeats:
            self._remember([repeat for repeat in known if repeat is not None], buffers)

    def _remember(self, known: list[_Repeat], buffers: Sequence[Tensor | None]) -> None:
        """Note which of a run's addresses each launch takes; nothing where the interpreter compiled nothing."""
        if not known:
            return
        index = {name: len(buffers) + number for number, name in enumerate(self._fixed)}
        self._fixed_addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self._fixed.values()]
        for name, (buffer, further) in self._places.items():
            tensor = buffers[buffer]
            index[name] = buffer
            if tensor is not None and further:
                index[name] = len(buffers) + len(self._fixed) + len(self._further)
                self._further.append((buffer, further * tensor.element_size()))
        self._repeats = [
            (repeat, itemgetter(*(index[name] for name in launch.pointers)))
            for launch, repeat in zip(self.launches, known, strict=True)
        ]


def _element(buffer: Tensor | None, further: int) -> Tensor | None:
    """A tensor that starts at an element of a buffer; kernels see no more of it than its address and dtype."""
    if buffer is None or not further:
        return buffer
    return buffer.as_strided((1,), (1,), buffer.storage_offset() + further)


_HERE: AbstractContextManager[object] = nullcontext()


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current, as launches need; nothing to do where it is, or on a CPU (the interpreter)."""
    index = tensor.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)
