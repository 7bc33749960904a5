"""Error budgets: a fast path is judged by what the plain path itself loses in that precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """`|actual - truth| / |truth|` in the Euclidean norm, counted in fp64; NaN stays NaN."""
    truth = truth.double()
    distance = torch.linalg.vector_norm(actual.double().to(truth.device) - truth)
    size = torch.linalg.vector_norm(truth)
    return float(distance / size) if size > 0 else float(distance)


def assert_within_budget(
    actual: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
    precision: torch.dtype | None = None,
) -> None:
    """Each tensor's error is at most twice the baseline's own error plus the rounding of the truth.

    Args:
        actual: results by name, of the path under test.
        truth: the same in fp64, computed from the same inputs.
        baseline: the same by the plain path in the precision under test.
        precision: dtype whose rounding counts; None is each actual tensor's own. Name the inputs' dtype where a
            result is wider than what it was made from.

    Raises:
        AssertionError: naming every tensor that is missing, misshapen or over budget, with its figures.
    """
    failures = []
    if actual.keys() != truth.keys():
        failures.append(f"results are {sorted(actual)}, expected {sorted(truth)}")
    for name in actual.keys() & truth.keys():
        got, want = actual[name], truth[name]
        if got.shape != want.shape:
            failures.append(f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            continue
        rounding = relative_error(want.to(precision or got.dtype), want)
        own = relative_error(baseline[name], want)
        error, budget = relative_error(got, want), 2 * (own + rounding)
        if not error <= budget:
            failures.append(
                f"{name}: error {error:.2e} is over {budget:.2e} (baseline {own:.2e}, rounding {rounding:.2e})"
            )
    assert not failures, "; ".join(failures)


class TF32Products(TorchDispatchMode):
    """Multiply matrices of fp32 as TF32 units do: the last 13 bits of both operands are cut off, the rest is exact.

    A plain path under it is the baseline of kernels in TF32. PyTorch's own switch is not: cuBLAS does without TF32
    where rows are no multiple of 16 bytes, and a CPU has none.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = tuple(_cut_to_tf32(operand) for operand in args)
        return func(*args, **(kwargs or {}))


def _cut_to_tf32(values: Tensor) -> Tensor:
    if values.dtype != torch.float32:
        return values
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
