"""Cascaded group attention and its windows against hand-worked numbers and slow loops."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from vitreous_core.testing.golden import golden_state
from vitreous_efficientvit import CascadedGroupAttention
from vitreous_efficientvit.attention import (
    LocalWindowAttention,
    bias_index,
    resize_bias_table,
    window_partition,
    window_reverse,
)


def random_attention(channels=12, num_heads=3, window_size=4, kernel_sizes=(5, 3, 3), key_dim=4, head_input="cascade"):
    attention = CascadedGroupAttention(channels, num_heads, window_size, kernel_sizes, key_dim, head_input)
    attention.load_state_dict(golden_state(attention.state_dict()))
    torch.nn.init.normal_(attention.attention_biases)
    return attention.double().eval()


def plain_attention(channels, num_heads, window_size):
    """All norms the identity, all convolutions zero, to be filled in by hand."""
    attention = CascadedGroupAttention(channels, num_heads, window_size, [1] * num_heads, key_dim=1)
    attention.double().eval()
    with torch.no_grad():
        for module in attention.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.zero_()
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1.0)
                module.running_var.fill_(1.0 - module.eps)
        attention.proj[1].c.weight.copy_(torch.eye(channels)[:, :, None, None])
    return attention


def official_index(side):
    """The index as the official table is filled: first come, first numbered."""
    points = list(itertools.product(range(side), range(side)))
    numbers, rows = {}, []
    for y, x in points:
        offsets = [(abs(y - v), abs(x - u)) for v, u in points]
        rows.append([numbers.setdefault(offset, len(numbers)) for offset in offsets])
    return np.array(rows)


def affine(norm, x):
    """Evaluation-mode batch norm of `[C, ...]`, written out."""
    gamma, beta, mean, var = (t.detach().numpy() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    shape = (-1,) + (1,) * (x.ndim - 1)
    return (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + norm.eps) * gamma.reshape(shape) + beta.reshape(
        shape
    )


def slow_attention(module, window):
    """One window `[C, r, r]`, one query, one key at a time, in numpy."""
    side, key_dim = module.window_size, module.key_dim
    tables, index = module.attention_biases.detach().numpy(), official_index(side)
    previous, outputs = None, []
    for head, piece in enumerate(np.split(window, module.num_heads)):
        if module.head_input == "full":
            source = window
        elif module.head_input == "slice" or previous is None:
            source = piece
        else:
            source = piece + previous
        qkv = affine(
            module.qkvs[head].bn, np.tensordot(module.qkvs[head].c.weight.detach().numpy()[:, :, 0, 0], source, 1)
        )
        query, key, value = qkv[:key_dim], qkv[key_dim : 2 * key_dim], qkv[2 * key_dim :]
        query = affine(module.dws[head].bn, slow_depthwise(module.dws[head].c.weight.detach().numpy()[:, 0], query))
        query, key, value = (part.reshape(part.shape[0], -1) for part in (query, key, value))
        output = np.zeros_like(value)
        for n in range(side**2):
            scores = [query[:, n] @ key[:, m] / math.sqrt(key_dim) + tables[head, index[n, m]] for m in range(side**2)]
            weights = np.exp(scores) / np.exp(scores).sum()
            output[:, n] = value @ weights
        previous = output.reshape(-1, side, side)
        outputs.append(previous)
    merged = np.maximum(np.concatenate(outputs), 0)
    return affine(module.proj[1].bn, np.tensordot(module.proj[1].c.weight.detach().numpy()[:, :, 0, 0], merged, 1))


def slow_depthwise(kernels, x):
    size, (_, height, width) = kernels.shape[-1], x.shape
    padded = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    out = np.zeros_like(x)
    for y, u in itertools.product(range(height), range(width)):
        out[:, y, u] = (kernels * padded[:, y : y + size, u : u + size]).sum((1, 2))
    return out


def test_cascade_by_hand():
    # Windows of one token attend to themselves, so o_i = v_i. o_0 = -2; o_1 = 3 (5 + o_0) = 9: the next head
    # sees the raw output, the ReLU comes after the concatenation.
    attention = plain_attention(channels=2, num_heads=2, window_size=1)
    with torch.no_grad():
        attention.qkvs[0].c.weight[2] = 1.0
        attention.qkvs[1].c.weight[2] = 3.0
        out = attention(torch.tensor([-2.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1))
    torch.testing.assert_close(out.flatten().tolist(), [0.0, 9.0])


def test_relative_bias_by_hand():
    # Queries are zero, so the weights are the table's: 1 same place, 2 beside, 3 below, 4 diagonal, over 10.
    attention = plain_attention(channels=1, num_heads=1, window_size=2)
    with torch.no_grad():
        attention.qkvs[0].c.weight[2] = 1.0
        attention.attention_biases.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log())
        out = attention(torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64).view(1, 1, 2, 2))
    # e.g. second token: (2*10 + 1*20 + 4*30 + 3*40) / 10
    torch.testing.assert_close(out.flatten().tolist(), [30.0, 28.0, 22.0, 20.0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", [1, 2, 4, 7])
def test_bias_index_is_the_official_table(side):
    assert np.array_equal(bias_index(side).numpy(), official_index(side))


@pytest.mark.parametrize(
    ("channels", "heads", "side", "kernels", "head_input"),
    [
        (12, 3, 4, (5, 3, 3), "cascade"),
        (6, 2, 7, (7, 5, 3), "cascade"),
        (5, 1, 1, (3,), "cascade"),
        (12, 3, 4, (5, 3, 3), "slice"),
        (12, 3, 4, (5, 3, 3), "full"),
    ],
)
def test_equals_loops(channels, heads, side, kernels, head_input):
    attention = random_attention(channels, heads, side, kernels, head_input=head_input)
    windows = torch.randn(2, channels, side, side, dtype=torch.float64)
    with torch.no_grad():
        out = attention(windows).numpy()
    slow = np.stack([slow_attention(attention, window) for window in windows.numpy()])
    assert np.abs(out - slow).max() < 1e-13  # measured 2e-15


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    attention = random_attention(channels=4, num_heads=2, window_size=2, kernel_sizes=(3, 3), key_dim=2)
    attention.train(training)
    names, values = zip(*attention.named_parameters(), strict=True)
    assert "attention_biases" in names
    windows = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    buffers = dict(attention.named_buffers())

    def function(windows, *values):
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(attention, (dict(zip(names, values, strict=True)), fresh), (windows,))

    assert torch.autograd.gradcheck(function, (windows, *values))


def test_padding_is_bottom_right_zero_and_unmasked():
    channels, window, height, width = 12, 4, 6, 9
    module = LocalWindowAttention(channels, 3, window, (5, 3, 3), key_dim=4).double().eval()
    module.attn = random_attention(channels, 3, window)
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    padded = np.zeros((2, channels, 8, 12))
    padded[:, :, :height, :width] = x.numpy()
    expected = np.zeros_like(padded)
    for image, top, left in itertools.product(range(2), range(0, 8, window), range(0, 12, window)):
        region = np.s_[image, :, top : top + window, left : left + window]
        expected[region] = slow_attention(module.attn, padded[region])
    with torch.no_grad():
        out = module(x).numpy()
    assert out.shape == x.shape
    assert np.abs(out - expected[:, :, :height, :width]).max() < 1e-12  # measured 1.4e-13, for values of size 12


def test_partition_and_reverse_cancel():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    windows = window_partition(x, 2)
    assert torch.equal(windows[1], x[0, :, 0:2, 2:4])
    assert torch.equal(windows[6], x[1, :, 0:2, 0:2])
    assert torch.equal(window_reverse(windows, 4, 6), x)


def test_partition_and_reverse_keep_the_memory_format():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    windows = window_partition(x.contiguous(memory_format=torch.channels_last), 2)
    assert torch.equal(windows, window_partition(x, 2))
    assert windows.is_contiguous(memory_format=torch.channels_last)
    back = window_reverse(windows, 4, 6)
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch():
    module = LocalWindowAttention(12, 3, 4, (5, 3, 3), key_dim=4).eval()
    assert module(torch.zeros(0, 12, 6, 9)).shape == (0, 12, 6, 9)


class TestBiasIsNeverStale:
    """The official module keeps a gathered copy from the last switch to evaluation mode."""

    @pytest.fixture
    def windows(self):
        return torch.randn(2, 12, 4, 4, dtype=torch.float64)

    def test_loading_after_eval(self, windows):
        source, target = random_attention(), random_attention()
        with torch.no_grad():
            before = target(windows)
            target.load_state_dict(source.state_dict())
            torch.testing.assert_close(target(windows), source(windows), rtol=0, atol=0)
            assert (before - source(windows)).abs().max() > 1e-3

    def test_averaged_copy_follows(self, windows):
        model = random_attention()
        averaged = copy.deepcopy(model)
        with torch.no_grad():
            averaged.attention_biases.mul_(0.5)
            model.attention_biases.mul_(0.5)
            assert torch.equal(averaged(windows), model(windows))

    def test_dtype_move_after_eval(self, windows):
        model = random_attention()
        model(windows)
        assert model.float()(windows.float()).dtype == torch.float32

    def test_gradient_in_evaluation_mode(self, windows):
        model = random_attention()
        model(windows).square().sum().backward()
        assert model.attention_biases.grad.abs().min() > 0

    def test_no_index_in_the_state_and_modes_chain(self):
        model = random_attention()
        assert "attention_bias_idxs" not in model.state_dict()
        assert model.eval() is model
        assert model.train() is model


class TestTableResize:
    def test_identity_and_constant(self):
        table = torch.randn(3, 16, dtype=torch.float64)
        torch.testing.assert_close(resize_bias_table(table, 4), table)
        torch.testing.assert_close(resize_bias_table(torch.full((3, 16), 2.5), 7), torch.full((3, 49), 2.5))

    def test_is_bicubic_over_the_grid(self):
        table = torch.randn(2, 16)
        expected = F.interpolate(table.view(2, 1, 4, 4), size=(7, 7), mode="bicubic", align_corners=False)
        torch.testing.assert_close(resize_bias_table(table, 7), expected.view(2, 49))

    def test_half_keeps_its_dtype(self):
        assert resize_bias_table(torch.randn(2, 16).half(), 7).dtype == torch.half

    def test_no_square(self):
        with pytest.raises(ValueError, match=r"square number.*\(2, 12\)"):
            resize_bias_table(torch.randn(2, 12), 7)

    def test_on_loading_another_window(self):
        source, target = random_attention(window_size=4), random_attention(window_size=7)
        with pytest.warns(UserWarning, match="4x4 windows are resized to 7x7"):
            target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target.attention_biases, resize_bias_table(source.attention_biases, 7))

    def test_other_heads_are_an_error_that_names_the_table(self):
        source = random_attention(num_heads=2, window_size=4)
        state = random_attention().state_dict()
        state["attention_biases"] = source.state_dict()["attention_biases"]
        with pytest.raises(RuntimeError, match="attention_biases"):
            random_attention().load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 3, 4, (3, 3, 3)), "num_heads must divide channels; got 3 heads for 10 channels"),
        ((12, 3, 4, (3, 3)), "kernel_sizes needs an entry for each of the 3 heads"),
        ((12, 3, 4, (3, 4, 3)), "kernel_sizes must be odd"),
        ((12, 0, 4, (3,)), "num_heads must be positive"),
        ((12, 3, 0, (3, 3, 3)), "window_size must be positive"),
        ((12, 3, 4, (3, 3, 3), 0), "key_dim must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CascadedGroupAttention(*arguments)


@pytest.mark.parametrize("shape", [(2, 12, 4, 5), (2, 11, 4, 4), (12, 4, 4)])
def test_bad_windows(shape):
    with pytest.raises(ValueError, match=r"windows must be \[B\*W, 12, 4, 4\]"):
        random_attention()(torch.zeros(shape, dtype=torch.float64))
