"""Launches are planned once per signature: calls that differ in anything but values never share a plan wrongly."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from vitreous_core.curves import hilbert_order, morton_order
from vitreous_core.ops.block_sparse_attention import contracts
from vitreous_core.ops.block_sparse_attention.triton import arguments
from vitreous_core.patterns import Slide1d, Window1d, Window2d
from vitreous_core.testing.attention import Problem
from vitreous_core.testing.budget import relative_error

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BOTH = [
    pytest.param("interpreter", marks=pytest.mark.interpret),
    pytest.param("gpu", marks=pytest.mark.gpu),
]

BASE = Problem(Window1d(4), 3, 4, hilbert_order(3, 4), 1, 2, 2, 16, torch.float32, "cells")
# One shape; each differs from the first in one thing that a plan depends on, but runs the same compiled kernels.
ALIKE = {
    "strides": BASE.with_(strides="transposed"),
    "cotangent-strides": BASE.with_(strides="strided"),
    "scale": BASE.with_(scale=0.7),
    "order": BASE.with_(order=morton_order(3, 4)),
    "shift": BASE.with_(pattern=Window1d(4, 2)),
    "batch": BASE.with_(batch=2),
}
OTHER_KERNELS = {
    "no-windows": BASE.with_(pattern=Slide1d(5)),
    "image-windows": BASE.with_(pattern=Window2d((3, 2))),
    "distance-bias": BASE.with_(bias="distance"),
    "dense-bias": BASE.with_(bias="dense"),
    "no-bias": BASE.with_(bias="none"),
    "dropout": BASE.with_(dropout_p=0.25),
    "groups": BASE.with_(groups=1),
    "dtype": BASE.with_(dtype=torch.float16),
}


class Counter:
    """Wraps the cache of plans and counts what it had to build."""

    def __init__(self, cache: arguments.TensorCache) -> None:
        self.cache, self.built = cache, 0

    def get(self, tensors: tuple[torch.Tensor, ...], numbers: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        def counted() -> Any:
            self.built += 1
            return build()

        return self.cache.get(tensors, numbers, counted)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Counter:
    from vitreous_core.ops.block_sparse_attention.triton import backward, forward

    counter = Counter(arguments.TensorCache(64))
    for module in (forward, backward):
        monkeypatch.setattr(module, "plans", counter)
    return counter


def assert_is(actual: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """The answer and no other: rounding makes errors of two units here, another plan ones of the answer's size."""
    for name in truth:
        assert relative_error(actual[name], truth[name]) < 16 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("where", BOTH)
def test_calls_in_turn_each_get_their_own_answer(where: str, plans: Counter) -> None:
    problems = [BASE, *ALIKE.values(), *(OTHER_KERNELS.values() if where == "interpreter" else ())]
    cases = [(problem, problem.layout().to(DEVICE), problem.tensors(DEVICE)) for problem in problems]
    first = []
    for problem, layout, tensors in cases:
        truth = problem.run(tensors, layout, "torch", torch.float64)
        first.append(problem.run(tensors, layout, "triton"))
        assert_is(first[-1], truth, problem.dtype)
    assert plans.built == 2 * len(problems)
    for (problem, layout, tensors), before in zip(cases, first, strict=True):
        again = problem.run(tensors, layout, "triton")
        assert all(torch.equal(again[name], before[name]) for name in before)
    assert plans.built == 2 * len(problems)


@pytest.mark.parametrize("where", BOTH)
def test_packed_calls_in_turn_each_get_their_own_answer(where: str, plans: Counter) -> None:
    """Of the same size: heads, strides and scale decide, and the dtypes of a dense bias and of a cotangent."""
    problems = [BASE.with_(strides=strides) for strides in ("contiguous", "transposed", "strided")]
    problems += [BASE.with_(heads=1, groups=1, head_dim=32), BASE.with_(scale=0.7)]
    problems += [BASE.with_(bias="dense"), BASE.with_(bias="dense", scale=0.7)] if where == "interpreter" else []
    cases = [(problem, problem.layout().to(DEVICE), problem.tensors(DEVICE)) for problem in problems]
    for _ in range(2):
        for problem, layout, tensors in cases:
            truth = problem.run_packed(tensors, layout, "torch", torch.float64)
            assert_is(problem.run_packed(tensors, layout, "triton"), truth, problem.dtype)
        assert plans.built == 2 * len(problems)


@pytest.mark.parametrize("where", BOTH)
def test_dtypes_of_every_pointer_decide_the_plan(where: str, plans: Counter) -> None:
    """Code compiled for fp32 pointers would read others wrongly; a planned launch does not look at them."""
    problem = Problem(Slide1d(5), 3, 4, None, 1, 1, 1, 16, torch.float16, "dense")
    layout, tensors = problem.layout().to(DEVICE), problem.tensors(DEVICE)
    for count, dtype in enumerate((torch.float32, torch.float16), 1):
        own = {**tensors, "bias": tensors["bias"].to(dtype)}
        truth = problem.run(own, layout, "torch", torch.float64)
        for _ in range(2):
            assert_is(problem.run(own, layout, "triton"), truth, torch.float16)
            assert plans.built == 2 * count


@pytest.mark.parametrize("where", BOTH)
def test_new_values_need_no_new_plan(where: str, plans: Counter) -> None:
    layout = BASE.layout().to(DEVICE)
    for seed in range(2):
        tensors = BASE.tensors(DEVICE, seed)
        truth = BASE.run(tensors, layout, "torch", torch.float64)
        assert_is(BASE.run(tensors, layout, "triton"), truth, BASE.dtype)
    assert plans.built == 2


@pytest.mark.parametrize("where", BOTH)
def test_a_table_written_to_is_read_again(where: str, plans: Counter) -> None:
    """The order of a bias may be the caller's own tensor."""
    from vitreous_core.ops.block_sparse_attention import RelativeBias2d, block_sparse_attention

    layout, tensors = BASE.layout().to(DEVICE), BASE.tensors(DEVICE)
    table = torch.randn(35, 2, device=DEVICE)
    order = torch.arange(12, device=DEVICE)

    def run(backend: Any) -> torch.Tensor:
        bias = RelativeBias2d(table, 3, 4, order)
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        return block_sparse_attention(query, key, value, layout, bias=bias, backend=backend)

    before = run("triton")
    order.copy_(torch.from_numpy(hilbert_order(3, 4)))
    after = run("triton")
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(after, run("torch"), rtol=1e-4, atol=1e-4)


def test_a_schedule_is_flattened_once_and_not_kept() -> None:
    schedule = BASE.layout().schedule
    rest = (torch.float16, 16, 1, True)
    flat = contracts._remembered_schedule(schedule, *rest)
    assert contracts._remembered_schedule(schedule, *rest) is flat
    assert contracts._remembered_schedule(schedule, torch.float32, *rest[1:]) is not flat
    assert contracts._remembered_schedule(BASE.layout().schedule, *rest) is not flat
    kept = len(contracts._flat_schedules)
    del schedule
    assert len(contracts._flat_schedules) == kept - 1


def test_the_cache_drops_what_was_not_used_for_longest() -> None:
    cache = arguments.TensorCache(2)
    built = []

    def get(name: str) -> str:
        return cache.get((), (name,), lambda: built.append(name) or name)

    assert [get(name) for name in "abacab"] == list("abacab")
    assert built == ["a", "b", "c", "b"]
