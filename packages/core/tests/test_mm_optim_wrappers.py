"""Adaptive clipping by a hand-worked case, and through the wrappers that configs name."""

import pytest
import torch
from mmpretrain.registry import OPTIM_WRAPPERS
from torch import nn

from vitreous_core.mm import AGCAmpOptimWrapper, CPUAmpOptimWrapper
from vitreous_core.mm.optim_wrappers import AGCCPUAmpOptimWrapper, adaptive_clip_grad_


def _parameter(value, gradient):
    parameter = nn.Parameter(torch.tensor(value))
    parameter.grad = torch.tensor(gradient)
    return parameter


def test_rows_of_a_matrix_are_units():
    # |W| = 5, 0, 1; limits 0.02 * (5, eps, 1) = 0.1, 2e-5, 0.02; gradient norms 10, 1, 0.01.
    weight = _parameter([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]], [[6.0, 8.0], [0.0, 1.0], [0.01, 0.0]])
    adaptive_clip_grad_([weight], clip_factor=0.02, eps=1e-3)
    expected = torch.tensor([[0.06, 0.08], [0.0, 2e-5], [0.01, 0.0]])
    torch.testing.assert_close(weight.grad, expected)


def test_filters_of_a_convolution_and_whole_vectors_are_units():
    filters = _parameter([[[[3.0, 0.0], [0.0, 4.0]]]], [[[[0.0, 2.0], [0.0, 0.0]]]])  # |W| = 5, |G| = 2
    bias = _parameter([0.6, 0.8], [3.0, 4.0])  # |W| = 1, |G| = 5
    scalar = _parameter(2.0, -1.0)
    adaptive_clip_grad_([filters, bias, scalar], clip_factor=0.1)
    torch.testing.assert_close(filters.grad, torch.tensor([[[[0.0, 0.5], [0.0, 0.0]]]]))
    torch.testing.assert_close(bias.grad, torch.tensor([0.06, 0.08]))
    torch.testing.assert_close(scalar.grad, torch.tensor(-0.2))


def test_zero_and_absent_gradients_stay():
    still, absent = _parameter([[1.0]], [[0.0]]), nn.Parameter(torch.ones(2))
    adaptive_clip_grad_([still, absent], clip_factor=0.1)
    assert still.grad.item() == 0.0
    assert absent.grad is None


def _build(kind, parameter, **settings):
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    return OPTIM_WRAPPERS.build({"type": kind, "optimizer": optimizer, **settings})


@pytest.mark.parametrize("kind", ["AGCOptimWrapper", "AGCCPUAmpOptimWrapper"])
def test_wrapper_clips_before_it_steps(kind):
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    wrapper = _build(kind, weight, clip_grad={"type": "agc", "clip_factor": 0.02, "eps": 1e-3})
    wrapper.update_params((weight * torch.tensor([[6.0, 8.0]])).sum())
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.94, 3.92]]))


def test_wrapper_keeps_the_other_ways_of_clipping():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    wrapper = _build("AGCOptimWrapper", weight, clip_grad={"max_norm": 1.0})
    wrapper.update_params((weight * torch.tensor([[6.0, 8.0]])).sum())
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.4, 3.2]]))


def test_unknown_setting_is_refused():
    with pytest.raises(ValueError, match=r"takes clip_factor and eps; got also \['max_norm'\]"):
        _build("AGCOptimWrapper", nn.Parameter(torch.ones(1)), clip_grad={"type": "agc", "max_norm": 1})


def test_cpu_amp_computes_in_bfloat16_and_keeps_fp32_weights():
    linear = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for wrapper in (CPUAmpOptimWrapper(optimizer=optimizer), AGCCPUAmpOptimWrapper(optimizer=optimizer)):
        with wrapper.optim_context(linear):
            output = linear(torch.ones(2, 4))
        assert output.dtype == torch.bfloat16
        wrapper.update_params(output.sum())
        assert linear.weight.dtype == torch.float32


@pytest.mark.gpu
def test_gpu_amp_clips_unscaled_gradients():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], device="cuda"))
    wrapper = AGCAmpOptimWrapper(
        optimizer=torch.optim.SGD([weight], lr=1.0), clip_grad={"type": "agc", "clip_factor": 0.02}
    )
    wrapper.update_params((weight * torch.tensor([[6.0, 8.0]], device="cuda")).sum())
    torch.testing.assert_close(weight.detach().cpu(), torch.tensor([[2.94, 3.92]]))
