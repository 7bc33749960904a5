"""Folding a batch norm is exact: fp64 modules agree to 1e-12, and dtype and device are kept."""

import pytest
import torch
from torch import nn

from vitreous_core.fold import (
    batch_norm_affine,
    fold_conv_norm,
    fold_conv_norm_conv,
    fold_gain,
    fold_mean,
    fold_norm_conv,
    fold_norm_linear,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def trained(norm):
    """A batch norm whose four tensors are all different from their initial values."""
    generator = torch.Generator().manual_seed(0)
    for tensor, low in (
        (norm.weight, -2.0),
        (norm.bias, -1.0),
        (norm.running_mean, -1.0),
        (norm.running_var, 0.1),
    ):
        tensor.data.uniform_(low, 2.0, generator=generator)
    return norm.eval()


def test_affine_by_hand():
    norm = nn.BatchNorm1d(1, eps=1.0).double().eval()
    norm.weight.data.fill_(6.0)
    norm.bias.data.fill_(5.0)
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(3.0)
    scale, shift = batch_norm_affine(norm)
    # sqrt(3 + 1) = 2, so y = 6 (x - 2) / 2 + 5 = 3 x - 1
    assert scale.item() == 3.0
    assert shift.item() == -1.0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "stride", "padding"), [(1, 1, 0), (4, 2, 1), (8, 1, 1)])
def test_conv_then_norm(groups, stride, padding, bias):
    conv = nn.Conv2d(8, 16, 3, stride, padding, groups=groups, bias=bias).double()
    norm = trained(nn.BatchNorm2d(16).double())
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(fold_conv_norm(conv, norm)(x), norm(conv(x)), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_norm_then_pointwise_conv(groups, bias):
    conv = nn.Conv2d(8, 16, 1, groups=groups, bias=bias).double()
    norm = trained(nn.BatchNorm2d(8).double())
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(fold_norm_conv(norm, conv)(x), conv(norm(x)), **EXACT)


@pytest.mark.parametrize("affine", [True, False])
def test_norm_then_linear(affine):
    norm = nn.BatchNorm1d(6, affine=affine).double()
    norm = trained(norm) if affine else norm.eval()
    linear = nn.Linear(6, 3).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(fold_norm_linear(norm, linear)(x), linear(norm(x)), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept_and_rounded_once(dtype):
    conv = nn.Conv2d(4, 4, 1, bias=False).to(dtype)
    norm = trained(nn.BatchNorm2d(4)).to(dtype)
    folded = fold_conv_norm(conv, norm)
    assert folded.weight.dtype == folded.bias.dtype == dtype
    scale, shift = batch_norm_affine(norm)
    assert torch.equal(folded.weight, (conv.weight.double() * scale[:, None, None, None]).to(dtype))
    assert torch.equal(folded.bias, shift.to(dtype))


def test_padded_conv_after_norm_is_refused():
    with pytest.raises(ValueError, match="conv must be unpadded"):
        fold_norm_conv(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))


def test_norm_without_statistics_is_refused():
    with pytest.raises(ValueError, match="track running statistics"):
        batch_norm_affine(nn.BatchNorm2d(4, track_running_stats=False))


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), ((5, 3), (1, 2))])
def test_residual_and_gain(groups, kernel, dilation):
    padding = {1: 0, 3: 1}.get(kernel, (2, 2))
    conv = nn.Conv2d(8, 8, kernel, padding=padding, dilation=dilation, groups=groups).double()
    norm = trained(nn.BatchNorm2d(8).double())
    x = torch.randn(2, 8, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(fold_conv_norm(conv, norm, residual=True)(x), x + norm(conv(x)), **EXACT)
    torch.testing.assert_close(fold_conv_norm(conv, norm, gain=0.3)(x), 0.3 * norm(conv(x)), **EXACT)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 2, padding=1),
        nn.Conv2d(8, 4, 1),
        nn.Conv2d(8, 8, 3, padding=1, dilation=2),
    ],
)
def test_residual_around_another_shape_is_refused(conv):
    with pytest.raises(ValueError, match="conv must keep the shape"):
        fold_conv_norm(conv, nn.BatchNorm2d(conv.out_channels), residual=True)


@pytest.mark.parametrize("bias", [True, False])
def test_conv_norm_conv(bias):
    first = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=bias).double()
    second = nn.Conv2d(8, 16, 1, groups=2, bias=bias).double()
    norm = trained(nn.BatchNorm2d(8).double())
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    scaled, shifted = fold_conv_norm_conv(first, norm, second)
    assert scaled.bias is None
    torch.testing.assert_close(shifted(scaled(x)), second(norm(first(x))), **EXACT)
    with pytest.raises(ValueError, match="conv must be unpadded"):
        fold_conv_norm_conv(first, norm, first)


def test_gain_of_each_channel_and_mean_of_two():
    conv = nn.Conv2d(3, 4, 1).double()
    gain = torch.randn(4, 1, 1, dtype=torch.float64)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(fold_gain(conv, gain)(x), gain * conv(x), **EXACT)
    first, second = nn.Linear(3, 5).double(), nn.Linear(3, 5).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(fold_mean(first, second)(x), (first(x) + second(x)) / 2, **EXACT)
