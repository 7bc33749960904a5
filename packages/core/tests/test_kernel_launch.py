"""Launches that repeat an earlier one skip Triton's binding of arguments; all others go through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vitreous_core import kernel_launch
from vitreous_core.kernel_launch import device_of, launch_kernel


class Kernel:
    """Stands for a function of `triton.jit` with two pointers, two numbers and two constants; writes launches down."""

    arg_names = ("x_ptr", "y_ptr", "length", "scale", "BLOCK", "FLAG")

    def __init__(self, compiles: bool = True) -> None:
        self.compiles = compiles
        self.log: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def bind(*arguments: Any, **settings: Any) -> object:
            self.log.append(("bound", grid, arguments, settings))
            return Compiled(self.log) if self.compiles else None

        return bind


class Compiled:
    """Stands for the compiled kernel, which takes every argument by its place."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda *arguments: self.log.append(("repeated", grid, arguments))


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_launch, "_known", {})


X, Y = torch.zeros(64), torch.zeros(64)
# The kernel's order of constants is not that of the caller, and an option is no argument.
CONSTANTS = {"num_warps": 4, "FLAG": True, "BLOCK": 16}


def run(
    kernel: Kernel, *, grid: tuple[int, ...] = (3,), x: torch.Tensor = X, y: torch.Tensor | None = Y, length: int = 7,
    constants: dict[str, Any] = CONSTANTS,
) -> str:  # fmt: skip
    """How one launch went."""
    launch_kernel(kernel, grid, (x, y), (length, 0.5), constants)
    return str(kernel.log[-1][0])


def test_a_launch_like_an_earlier_one_is_repeated_with_its_own_tensors() -> None:
    kernel = Kernel()
    assert run(kernel) == "bound"
    _, grid, arguments, settings = kernel.log[-1]
    assert grid == (3,)
    assert arguments == (X, Y, 7, 0.5)
    assert settings == CONSTANTS
    assert run(kernel, x=Y, y=X) == "repeated"
    _, grid, arguments = kernel.log[-1]
    assert grid == (3, 1, 1)
    assert arguments[0] is Y
    assert arguments[1] is X
    assert arguments[2:] == (7, 0.5, 16, True)


@pytest.mark.parametrize(
    "change",
    [
        {"grid": (4,)},
        {"length": 8},
        {"x": X[1:]},
        {"x": X.half()},
        {"y": None},
        {"constants": {**CONSTANTS, "BLOCK": 32}},
        {"constants": {**CONSTANTS, "num_warps": 8}},
    ],
    ids=["grid", "number", "alignment", "dtype", "none", "constant", "option"],
)
def test_a_launch_that_differs_is_bound_anew(change: dict[str, Any]) -> None:
    kernel = Kernel()
    run(kernel)
    assert run(kernel, **change) == "bound"
    assert run(kernel, **change) == "repeated"
    assert run(kernel) == "repeated"


def test_another_kernel_is_another_launch() -> None:
    first, second = Kernel(), Kernel()
    run(first)
    assert run(second) == "bound"


def test_what_compiles_to_nothing_is_never_repeated() -> None:
    kernel = Kernel(compiles=False)
    assert [run(kernel), run(kernel)] == ["bound", "bound"]


def test_memory_of_launches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_launch, "_MOST_LAUNCHES", 2)
    kernel = Kernel()
    for length in range(5):
        run(kernel, length=length)
        assert len(kernel_launch._known) <= 2


def test_no_device_is_made_current_for_a_cpu() -> None:
    with device_of(X):
        pass


@pytest.mark.gpu
def test_repeated_launches_on_gpu() -> None:
    triton = pytest.importorskip("triton")
    from triton import language as tl

    @triton.jit
    def add_kernel(x_ptr, y_ptr, out_ptr, length, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + place, mask=place < length)
        if y_ptr is not None:
            x += factor * tl.load(y_ptr + place, mask=place < length)
        tl.store(out_ptr + place, x, mask=place < length)

    for _ in range(3):
        for length, offset in ((100, 0), (97, 1), (96, 4), (1, 3)):
            x, y = (torch.randn(200, device="cuda")[offset:][:length] for _ in range(2))
            for other in (y, None):
                out = torch.empty(length, device="cuda")
                launch_kernel(add_kernel, (2,), (x, other, out), (length, 0.5), {"BLOCK": 64})
                torch.testing.assert_close(out, x if other is None else x + 0.5 * y)
    assert len(kernel_launch._known) == 8
