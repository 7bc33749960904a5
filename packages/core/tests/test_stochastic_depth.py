"""Factors of stochastic depth: their values, their rates, and that branches are independent."""

from __future__ import annotations

import torch

from vitreous_core.stochastic_depth import branch_factors

CPU = torch.device("cpu")


def test_values_and_rates() -> None:
    torch.manual_seed(0)
    rates, batch = (0.0, 0.2, 0.5, 0.9), 20_000
    first, *factors = branch_factors(rates, batch, CPU)
    assert first is None
    for rate, factor in zip(rates[1:], factors, strict=True):
        assert factor is not None
        assert factor.shape == (batch,)
        assert factor.dtype == torch.float32
        torch.testing.assert_close(factor.unique(), torch.tensor([0.0, 1 / (1 - rate)]))
        # Four standard deviations of a share of so many draws.
        share = (factor == 0).double().mean().item()
        assert abs(share - rate) < 4 * (rate * (1 - rate) / batch) ** 0.5


def test_branches_are_independent() -> None:
    torch.manual_seed(0)
    factors = branch_factors((0.5,) * 6, 4096, CPU)
    kept = torch.stack([factor > 0 for factor in factors if factor is not None]).double()
    correlation = torch.corrcoef(kept) - torch.eye(6)
    assert correlation.abs().max() < 5 / 4096**0.5


def test_nothing_is_drawn_without_a_rate() -> None:
    before = torch.get_rng_state()
    assert branch_factors((0.0, 0.0), 8, CPU) == [None, None]
    assert torch.equal(torch.get_rng_state(), before)


def test_first_call_under_inference_mode_or_a_compiler_leaves_an_ordinary_tensor() -> None:
    with torch.inference_mode():
        branch_factors((0.125,), 8, CPU)
    compiled = torch.compile(lambda x: x * branch_factors((0.125,), 8, CPU)[0], fullgraph=True, backend="aot_eager")
    x = torch.ones(8, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None
    assert set((0.875 * x.grad).tolist()) <= {0.0, 1.0}
