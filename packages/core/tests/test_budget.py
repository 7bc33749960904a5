"""Error budgets, and the plain path in TF32 that kernels in TF32 are judged by."""

from __future__ import annotations

import pytest
import torch

from vitreous_core.testing.budget import TF32Products, assert_within_budget


def test_the_budget_is_twice_the_own_error_and_the_rounding():
    truth = {"out": torch.full((4,), 1 / 3, dtype=torch.float64)}
    rounded = {"out": truth["out"].half()}
    step = truth["out"].half().double() - truth["out"]
    assert_within_budget({"out": truth["out"] + 4 * step}, truth, rounded, precision=torch.float16)
    with pytest.raises(AssertionError, match=r"out: error .* is over"):
        assert_within_budget({"out": truth["out"] + 5 * step}, truth, rounded, precision=torch.float16)


@pytest.mark.parametrize("batched", [False, True])
def test_tf32_products_keep_ten_bits_of_both_operands_in_both_passes(batched):
    kept, lost = 1 + 2.0**-10, 1 + 2.0**-11
    shape = (1, 2, 2) if batched else (2, 2)
    left = torch.tensor([[kept, 0.0], [0.0, -lost]]).view(shape).requires_grad_()
    right = torch.tensor([[lost, 0.0], [0.0, kept]]).view(shape).requires_grad_()
    with TF32Products():
        product = left @ right
        gradients = torch.autograd.grad(product, (left, right), lost * torch.eye(2).view(shape))
    # Cut off towards zero: 1 + 2^-11 is 1, and -(1 + 2^-11) is -1.
    assert product.flatten().tolist() == [kept, 0.0, 0.0, -kept]
    assert gradients[0].flatten().tolist() == [1.0, 0.0, 0.0, kept]
    assert gradients[1].flatten().tolist() == [kept, 0.0, 0.0, -1.0]
    assert torch.equal(left @ right, torch.diag(torch.tensor([kept * lost, -lost * kept])).view(shape))


def test_tf32_products_leave_other_precisions_alone():
    wide = torch.full((1, 1), 1 + 2.0**-40, dtype=torch.float64)
    with TF32Products():
        assert (wide @ wide).item() == (1 + 2.0**-40) ** 2
