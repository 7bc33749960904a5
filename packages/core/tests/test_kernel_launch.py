"""Launches that repeat an earlier one skip Triton's binding of arguments; all others go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from vitreous_core import kernel_launch
from vitreous_core.kernel_launch import Launch, LaunchSequence, device_of, launch_kernel


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

    function, packed_metadata = "code", (4, 1, 0)

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda *arguments: self.log.append(("watched", grid, arguments))

    def run(self, x: int, y: int, z: int, stream: str, function: str, metadata: tuple[int, ...], *rest: Any) -> None:
        assert (stream, function, metadata, rest[:3]) == (STREAM, "code", (4, 1, 0), (None, None, None))
        self.log.append(("repeated", (x, y, z), rest[3:]))


STREAM = "the current stream"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(kernel_launch, "_known", {})
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(kernel_launch._Repeat, "stream", lambda repeat: STREAM)


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


@pytest.fixture
def profiler() -> Iterator[None]:
    """Hooks into every launch, as Triton's profiler does."""

    def hook(metadata: object) -> None:
        pass

    knobs.runtime.launch_exit_hook.add(hook)
    yield
    knobs.runtime.launch_exit_hook.remove(hook)


def test_a_profiler_sees_repeated_launches(profiler: None) -> None:
    kernel = Kernel()
    assert [run(kernel), run(kernel)] == ["bound", "watched"]
    assert kernel.log[-1][1:] == ((3, 1, 1), (X, Y, 7, 0.5, 16, True))


# --- sequences


def sequence(kernel: Kernel, *, further: int = 0, fixed: torch.Tensor | None = Y, **settings: Any) -> LaunchSequence:
    """Two launches on two buffers and a tensor that does not change."""
    launches = [
        Launch(kernel, (3,), ("x", "fixed"), (7, 0.5), CONSTANTS),
        Launch(kernel, (4, 2), ("y", "x"), (8, 0.5), CONSTANTS),
    ]
    return LaunchSequence(launches, {"x": (0, 0), "y": (1, further)}, {"fixed": fixed}, **settings)


def ways(kernel: Kernel) -> list[str]:
    """How the last two launches went."""
    return [str(launch[0]) for launch in kernel.log[-2:]]


def test_a_sequence_repeats_with_the_addresses_of_its_buffers() -> None:
    kernel = Kernel()
    planned = sequence(kernel, further=8)
    planned.run((X, Y))
    assert ways(kernel) == ["bound", "bound"]
    assert kernel.log[0][2] == (X, Y, 7, 0.5)
    bound = kernel.log[1][2]
    assert (bound[0].data_ptr(), bound[0].dtype, bound[1]) == (Y.data_ptr() + 32, Y.dtype, X)
    other = torch.zeros(64)
    planned.run((other, X))
    assert ways(kernel) == ["repeated", "repeated"]
    assert kernel.log[2][1:] == ((3, 1, 1), (other.data_ptr(), Y.data_ptr(), 7, 0.5, 16, True))
    assert kernel.log[3][1:] == ((4, 2, 1), (X.data_ptr() + 32, other.data_ptr(), 8, 0.5, 16, True))


def test_a_misaligned_buffer_is_bound_and_changes_nothing_for_the_next() -> None:
    kernel = Kernel()
    planned = sequence(kernel)
    planned.run((X, Y))
    planned.run((X, Y[1:]))
    assert ways(kernel) == ["repeated", "bound"]  # the first launch does not read it
    assert kernel.log[-2][2][0] is X, "tensors, as another alignment asks for"
    planned.run((X, Y[1:]))
    assert ways(kernel) == ["repeated", "repeated"]
    assert kernel.log[-1][2][0].data_ptr() == Y.data_ptr() + 4
    planned.run((X, Y))
    assert kernel.log[-1][2][:2] == (Y.data_ptr(), X.data_ptr())


def test_what_was_misaligned_at_first_is_remembered_once_it_is_not() -> None:
    kernel = Kernel()
    planned = sequence(kernel)
    for _ in range(2):
        planned.run((X[1:], Y))
        assert isinstance(kernel.log[-1][2][0], torch.Tensor)
    for _ in range(2):
        planned.run((X, Y))
    assert kernel.log[-1][2][:2] == (Y.data_ptr(), X.data_ptr())


def test_a_misaligned_place_in_an_aligned_buffer_is_never_taken_for_aligned() -> None:
    kernel = Kernel()
    planned = sequence(kernel, further=2)
    for _ in range(3):
        planned.run((X, Y))
        assert kernel.log[-1][2][0].data_ptr() == Y.data_ptr() + 8


def test_absent_tensors_are_null() -> None:
    kernel = Kernel()
    planned = sequence(kernel, fixed=None)
    for _ in range(2):
        planned.run((X, None))
    assert kernel.log[0][2][1] is None
    assert kernel.log[1][2][0] is None
    assert kernel.log[2][2][:2] == (X.data_ptr(), 0)
    assert kernel.log[3][2][:2] == (0, X.data_ptr())


def test_sequences_with_other_dtypes_or_constants_share_nothing() -> None:
    """The code depends on them; a sequence must not look for the other's."""
    kernel = Kernel()
    for x in (X, X.half()):
        planned = sequence(kernel)
        planned.run((x, Y))
        assert ways(kernel) == ["bound", "bound"]
        planned.run((x, Y))
        assert ways(kernel) == ["repeated", "repeated"]


def test_a_profiler_sees_sequences(profiler: None) -> None:
    kernel = Kernel()
    planned = sequence(kernel)
    planned.run((X, Y))
    planned.run((X, Y))
    assert ways(kernel) == ["watched", "watched"]


def test_a_sequence_that_compiles_to_nothing_is_always_bound() -> None:
    kernel = Kernel(compiles=False)
    planned = sequence(kernel)
    for _ in range(2):
        planned.run((X, Y))
        assert ways(kernel) == ["bound", "bound"]


def test_compilation_comes_before_the_first_run_only() -> None:
    kernel = Kernel()
    seen: list[Any] = []
    planned = sequence(kernel, before_first=lambda launches: seen.append((list(launches), len(kernel.log))))
    planned.run((X, Y))
    planned.run((X[1:], Y))
    [(launches, launched)] = seen
    assert launched == 0
    assert [(launch.grid, pointers) for launch, pointers in launches] == [((3,), (X, Y)), ((4, 2), (Y, X))]


def test_no_device_is_made_current_for_a_cpu() -> None:
    with device_of(X):
        pass


@pytest.mark.gpu
def test_repeated_launches_on_gpu() -> None:
    import triton
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


@pytest.mark.gpu
def test_sequences_on_gpu() -> None:
    """Addresses in the place of tensors, parts of buffers, absent tensors, any alignment, another stream, a graph."""
    from triton import jit
    from triton import language as tl

    @jit
    def scale_kernel(x_ptr, y_ptr, out_ptr, length, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = factor * tl.load(x_ptr + place, mask=place < length)
        if y_ptr is not None:
            x += tl.load(y_ptr + place, mask=place < length)
        tl.store(out_ptr + place, x, mask=place < length)

    def launch(x: str, y: str, out: str, factor: float) -> Launch:
        return Launch(scale_kernel, (2,), (x, y, out), (100, factor), {"BLOCK": 64})

    fixed = torch.randn(100, device="cuda")
    planned = LaunchSequence(
        [launch("x", "fixed", "half", 0.5), launch("half", "absent", "out", 3.0)],
        {"x": (0, 0), "half": (1, 0), "out": (1, 112), "absent": (2, 0)}, {"fixed": fixed},
    )  # fmt: skip

    def check(offset: int) -> None:
        x, work = torch.randn(200, device="cuda")[offset:][:100], torch.empty(212, device="cuda")
        planned.run((x, work, None))
        torch.testing.assert_close(work[112:], 3 * (0.5 * x + fixed))

    for offset in (0, 0, 1, 4, 0):
        check(offset)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check(0)
    torch.cuda.current_stream().wait_stream(stream)
    x, work, graph = torch.randn(100, device="cuda"), torch.empty(212, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planned.run((x, work, None))
    x.normal_()
    graph.replay()
    torch.testing.assert_close(work[112:], 3 * (0.5 * x + fixed))
