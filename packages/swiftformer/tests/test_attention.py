"""Efficient additive attention: a case worked by hand, its invariances, gradients and small dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitreous_swiftformer import EfficientAdditiveAttention


@pytest.fixture
def attention() -> EfficientAdditiveAttention:
    torch.manual_seed(0)
    return EfficientAdditiveAttention(6).double()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_by_hand() -> None:
    attention = EfficientAdditiveAttention(2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.to_query.weight.copy_(torch.eye(2))
        attention.to_key.weight.copy_(-torch.eye(2))
        attention.Proj.weight.copy_(2 * torch.eye(2))
        attention.final.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        attention.final.bias.copy_(torch.tensor([1.0, 0.0]))
        attention.w_g.copy_(torch.tensor([[1.0], [0.0]]))
    x = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [-8.0, 6.0]]])
    # Q = (.6 .8) (0 1) (-.8 .6) and K = -Q. The weights .6 0 -.8 have length one already, after the factor
    # 1/sqrt(2) has cancelled. G = .6 (.6 .8) - .8 (-.8 .6) = (1 0), so G K = (-.6 0) (0 0) (.8 0), and
    # 2 G K + Q = (-.6 .8) (0 1) (.8 .6). `final` swaps the channels and adds one to the first.
    expected = torch.tensor([[[1.8, -0.6], [2.0, 0.0], [1.6, 0.8]]])
    assert torch.allclose(attention(x), expected, atol=1e-6)


def test_gradcheck(attention: EfficientAdditiveAttention) -> None:
    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), (x,))

    names, parameters = zip(*attention.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(run, (tokens(2, 3, 6).requires_grad_(), *parameters))


@torch.no_grad()
def test_order_of_tokens_and_other_images_do_not_matter(attention: EfficientAdditiveAttention) -> None:
    x = tokens(3, 7, 6)
    order = torch.randperm(7)
    assert torch.allclose(attention(x[:, order]), attention(x)[:, order], atol=1e-13)
    assert torch.allclose(attention(x[1:2]), attention(x)[1:2], atol=1e-13)


@torch.no_grad()
def test_lengths_of_tokens_and_of_w_g_cancel(attention: EfficientAdditiveAttention) -> None:
    for layer in (attention.to_query, attention.to_key):
        layer.bias.zero_()
    x = tokens(2, 5, 6)
    expected = attention(x)
    assert torch.allclose(attention(x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])[:, None]), expected, atol=1e-13)
    attention.w_g *= 7.0
    assert torch.allclose(attention(x), expected, atol=1e-13)
    attention.w_g *= -1.0
    assert not torch.allclose(attention(x), expected, atol=1e-3), "weights have a sign"


@torch.no_grad()
def test_strides_and_odd_batches(attention: EfficientAdditiveAttention) -> None:
    maps = tokens(2, 6, 3, 5)
    strided = maps.flatten(2).transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.allclose(attention(strided), attention(strided.contiguous()), atol=1e-14)
    assert attention(strided[:0]).shape == (0, 15, 6)
    assert attention(strided[:, :1]).shape == (2, 1, 6)


def test_zero_tokens_have_finite_outputs_and_gradients(attention: EfficientAdditiveAttention) -> None:
    with torch.no_grad():
        for layer in (attention.to_query, attention.to_key):
            layer.bias.zero_()
    x = torch.zeros(1, 4, 6, dtype=torch.float64, requires_grad=True)
    y = attention(x)
    y.sum().backward()
    offset = attention.final(attention.Proj.bias)
    assert torch.allclose(y, offset.expand_as(y))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 3e3])
@torch.no_grad()
def test_half_precision_keeps_its_range(dtype: torch.dtype, magnitude: float) -> None:
    # Squares of queries this small or large leave fp16: lengths must be accumulated in a wider type.
    torch.manual_seed(0)
    attention = EfficientAdditiveAttention(64)
    for layer in (attention.to_query, attention.to_key):
        layer.bias.zero_()
    attention = attention.to(dtype)
    x = (magnitude * torch.randn(2, 49, 64)).to(dtype)
    expected = attention.double()(x.double())
    measured = (attention.to(dtype)(x) - expected).abs().max() / expected.abs().max()
    # Measured: 0.34 to 0.43.
    assert measured < torch.finfo(dtype).eps


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="dim must be positive; got 0"):
        EfficientAdditiveAttention(0)
    attention = EfficientAdditiveAttention(4)
    for shape in ((2, 3, 5), (3, 4), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"x must be tokens \[B, L, 4\]"):
            attention(torch.zeros(shape))
