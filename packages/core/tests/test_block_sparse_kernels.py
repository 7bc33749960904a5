"""The Triton kernels against the torch truth in fp64, by the two-times rule: on a GPU, and small in the interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from vitreous_core.bench.measure import matmul_precision
from vitreous_core.curves import hilbert_order, morton_order
from vitreous_core.errors import BackendUnsupported
from vitreous_core.ops.block_sparse_attention import block_sparse_attention, packed_attention
from vitreous_core.patterns import (
    Neighborhood1d,
    Neighborhood2d,
    Slide1d,
    Slide2d,
    Window1d,
    Window2d,
    from_mask,
)
from vitreous_core.testing.attention import Problem
from vitreous_core.testing.budget import TF32Products, assert_within_budget, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def check(problem: Problem, *, is_packed: bool = False) -> dict[str, torch.Tensor]:
    """One problem: output and every gradient within budget."""
    layout, tensors = problem.layout().to(DEVICE), problem.tensors(DEVICE)
    run = problem.run_packed if is_packed else problem.run
    truth = run(tensors, layout, "torch", torch.float64)
    baseline = run(tensors, layout, "torch")
    actual = run(tensors, layout, "triton")
    # A bias gradient is wider than what it is made from: its budget is that of the inputs' precision.
    assert_within_budget(actual, truth, baseline, precision=problem.dtype)
    return actual


def scattered(length: int):
    return from_mask(lambda q, k: (((q * 7 + k * 3) % 5 == 0) & (q % 9 != 4)) | ((q < 32) & (k < 32)), length)


# Every pattern, with each order, bias, dtype, head dimension, stride and grouping somewhere: pairs, not the product.
SMALL = {
    "window1d": Problem(Window1d(16), 5, 7, hilbert_order(5, 7), strides="transposed"),
    "window1d-shift-cells-gqa": Problem(Window1d(12, 5), 6, 6, hilbert_order(6, 6), 1, 4, 2, 16, SINGLE, "cells"),
    "window1d-wide-half": Problem(Window1d(90), 9, 11, None, 1, 1, 1, 24, HALF, strides="packed"),
    "window1d-over-a-tile": Problem(Window1d(150, 20), 12, 17, None, 1, 1, 1, 16, HALF, dropout_p=0.2),
    "window2d-over-a-tile": Problem(Window2d((9, 20), 3), 17, 23, hilbert_order(17, 23), 1, 1, 1, 8, SINGLE),
    "slide1d-dropout": Problem(Slide1d(21), 8, 9, morton_order(8, 9), 1, dropout_p=0.3, strides="strided"),
    "neighborhood1d-distance": Problem(Neighborhood1d(11), 4, 9, hilbert_order(4, 9), 2, 1, 1, 8, HALF, "distance"),
    "window2d-shift-cells": Problem(Window2d(4, 1), 6, 9, hilbert_order(6, 9), 2, 1, 1, 16, SINGLE, "cells"),
    "window2d-dense-half": Problem(Window2d(3), 6, 6, None, 2, 1, 1, 16, HALF, "dense", dropout_p=0.2),
    "slide2d-large-scores": Problem(Slide2d(5), 7, 11, None, 1, 1, 1, 16, HALF, magnitude=5.0),
    "neighborhood2d-cells": Problem(Neighborhood2d(3), 7, 13, hilbert_order(7, 13), 2, 1, 1, 8, SINGLE, "cells"),
    "neighborhood2d-dilated": Problem(Neighborhood2d(3, 2), 9, 8, None, 1, 2, 1, 16, HALF, "cells", "expanded"),
    "neighborhood2d-steps": Problem(
        Neighborhood2d((3, 2), (2, 3)), 7, 8, hilbert_order(7, 8), 2, 1, 1, 8, SINGLE, "steps"
    ),
    "bits-dense": Problem(scattered(70), 7, 10, None, 1, 1, 1, 16, SINGLE, "dense"),
    "negative-scale": Problem(Slide2d(3), 5, 5, None, 1, 1, 1, 8, SINGLE, scale=-0.4),
    "zero-scale": Problem(Slide2d(3), 5, 5, None, 1, 1, 1, 8, SINGLE, "dense", scale=0.0),
    "one-token": Problem(Neighborhood2d(7), 1, 1, None, 1, 1, 1, 16, SINGLE, "cells"),
}

LARGE = {
    "window1d-D64-half": Problem(Window1d(64), 24, 24, hilbert_order(24, 24), 3, 2, 2, 64, HALF, strides="packed"),
    "window1d-256-brain-cells": Problem(Window1d(256), 32, 32, hilbert_order(32, 32), 3, 2, 2, 64, BRAIN, "cells"),
    "window1d-49-shift-D32": Problem(Window1d(49, 24), 27, 29, hilbert_order(27, 29), 3, 3, 3, 32, HALF, "cells"),
    "slide1d-289-D128": Problem(Slide1d(289), 32, 31, morton_order(32, 31), 2, 4, 2, 128, BRAIN),
    "slide1d-81-single-distance": Problem(Slide1d(81), 23, 29, None, 2, 2, 2, 64, SINGLE, "distance"),
    "neighborhood1d-D256": Problem(Neighborhood1d(49), 20, 21, None, 2, 2, 1, 256, HALF, "distance"),
    "neighborhood1d-D256-single": Problem(Neighborhood1d(65), 20, 21, None, 1, 2, 1, 256, SINGLE),
    "window2d-14-single-dropout": Problem(Window2d(14), 30, 41, None, 2, 2, 2, 64, SINGLE, "dense", dropout_p=0.3),
    "window2d-16-exact": Problem(Window2d(16), 32, 48, hilbert_order(32, 48), 2, 2, 2, 64, HALF, strides="packed"),
    "window2d-16-D40": Problem(Window2d(16), 37, 50, None, 2, 2, 2, 40, HALF, "cells", "transposed"),
    "window2d-7-shift": Problem(Window2d(7, 3), 31, 29, None, 3, 3, 3, 32, BRAIN, "cells", dropout_p=0.1),
    "window2d-4-packed-tiles": Problem(Window2d(4), 30, 30, hilbert_order(30, 30), 2, 2, 2, 64, HALF, "dense"),
    "slide2d-9": Problem(Slide2d(9), 40, 41, hilbert_order(40, 41), 2, 2, 2, 64, HALF, strides="strided"),
    "slide2d-single": Problem(Slide2d(7), 29, 31, None, 2, 2, 1, 128, SINGLE, "cells"),
    "neighborhood2d-17": Problem(Neighborhood2d(17), 48, 40, hilbert_order(48, 40), 2, 2, 2, 64, HALF, "cells"),
    "neighborhood2d-17-dropout": Problem(Neighborhood2d(17), 33, 35, None, 2, 2, 2, 64, BRAIN, dropout_p=0.4),
    "neighborhood2d-even-dilated": Problem(Neighborhood2d((6, 9), (2, 1)), 33, 35, None, 2, 4, 1, 24, HALF, "cells"),
    "neighborhood2d-steps-D32": Problem(
        Neighborhood2d(7, 4), 37, 41, hilbert_order(37, 41), 2, 2, 2, 32, HALF, "steps", strides="packed"
    ),
    "neighborhood2d-large-scores": Problem(
        Neighborhood2d(7), 35, 36, None, 2, 2, 2, 64, HALF, magnitude=3.0, strides="expanded"
    ),
    "bits-D64": Problem(scattered(31 * 33), 31, 33, None, 2, 2, 1, 64, HALF, "dense"),
    "bits-cells": Problem(scattered(31 * 33), 31, 33, None, 2, 2, 1, 64, SINGLE, "cells", dropout_p=0.2),
}


SMALL_PACKED = {
    "one-pass-transposed": Problem(Window1d(16), 5, 7, hilbert_order(5, 7), 2, 2, 2, 8, SINGLE, "cells", "transposed"),
    "distance-half": Problem(Neighborhood1d(11), 4, 9, None, 2, 2, 2, 8, HALF, "distance", dropout_p=0.2),
    "bits-dense-strided": Problem(scattered(70), 7, 10, None, 1, 2, 2, 16, SINGLE, "dense", "strided", scale=-0.4),
}
LARGE_PACKED = [
    "window1d-D64-half", "window1d-256-brain-cells", "window2d-7-shift", "slide1d-81-single-distance", "slide2d-9",
]  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name):
    check(SMALL[name])


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL_PACKED)
def test_packed_interpreted(name):
    check(SMALL_PACKED[name], is_packed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL_PACKED, *LARGE_PACKED])
def test_packed_on_gpu(name):
    check((SMALL_PACKED | LARGE)[name], is_packed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_on_gpu(name):
    check((SMALL | LARGE)[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["slide1d-81-single-distance", "slide2d-single", "bits-cells"])
def test_tf32_follows_the_switch(name):
    problem = LARGE[name]
    layout, tensors = problem.layout().to(DEVICE), problem.tensors(DEVICE)
    truth = problem.run(tensors, layout, "torch", torch.float64)
    with TF32Products():
        baseline = problem.run(tensors, layout, "torch")
    with matmul_precision("high"):
        actual = problem.run(tensors, layout, "triton")
    assert_within_budget(actual, truth, baseline)
    assert relative_error(actual["out"], truth["out"]) > 1e-5, "TF32 was not used"


both_devices = pytest.mark.parametrize(
    "where",
    [
        pytest.param("interpreter", marks=pytest.mark.interpret),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ],
)


@both_devices
def test_a_row_that_sees_nothing_is_zero(where):
    length = 80
    pattern = from_mask(lambda q, k: (q != 3) & (q // 64 != 1) & (k != 5), length)
    problem = Problem(pattern, 8, 10, batch=1, heads=1, groups=1, dtype=HALF)
    actual = check(problem)
    assert not actual["out"][0, 0, [3, *range(64, 80)]].any()
    assert not actual["dquery"][0, 0, [3, *range(64, 80)]].any()
    assert not actual["dkey"][0, 0, 5].any()


@both_devices
def test_unseen_tokens_change_nothing(where):
    problem = Problem(Neighborhood2d(3), 6, 7, hilbert_order(6, 7), 1, 1, 1, 16, HALF)
    layout, tensors = problem.layout().to(DEVICE), problem.tensors(DEVICE)
    before = problem.run(tensors, layout, "triton")["out"]
    unseen = ~torch.from_numpy(problem.pattern.dense(6, 7, problem.order))[20].to(DEVICE)
    for name in ("key", "value"):
        tensors[name] = torch.where(unseen[:, None], torch.inf if name == "value" else 1e4, tensors[name])
        tensors[name] = tensors[name].nan_to_num(posinf=6e4).to(HALF)
    assert torch.equal(problem.run(tensors, layout, "triton")["out"][0, 0, 20], before[0, 0, 20])


@both_devices
def test_empty_batch(where):
    problem = Problem(Neighborhood2d(3), 4, 5, None, 0, 2, 1, 16, HALF, "cells")
    actual = problem.run(problem.tensors(DEVICE), problem.layout().to(DEVICE), "triton")
    assert actual["out"].shape == actual["dquery"].shape == (0, 2, 20, 16)
    assert actual["dkey"].shape == (0, 1, 20, 16)
    assert not actual["dbias"].any()


@both_devices
def test_output_keeps_the_strides_of_the_query(where):
    problem = Problem(Window1d(8), 4, 4, strides="transposed", dtype=HALF)
    tensors = problem.tensors(DEVICE)
    actual = problem.run(tensors, problem.layout().to(DEVICE), "triton")
    assert actual["out"].stride() == tensors["query"].stride()
    assert actual["out"].transpose(1, 2).is_contiguous()


@both_devices
def test_packed_tensors_of_any_kind(where):
    """Two uses of one, no batch, a gradient of one input only, none at all, another address, an output's own form."""
    problem = Problem(Window1d(8), 4, 4, None, 2, 2, 2, 8, HALF, "distance")
    layout, tensors = problem.layout().to(DEVICE), problem.tensors(DEVICE)
    wide = torch.randn(2, 16, 50, device=DEVICE, dtype=HALF)
    bias = tensors["bias"].requires_grad_()

    def run(qkv, is_trained=True):
        table = bias if is_trained else bias.detach()
        return packed_attention(qkv, layout, num_heads=2, bias=problem.bias_of(table), backend="triton")

    qkv = wide[..., 1:49].contiguous().requires_grad_()
    out = run(qkv)
    assert out.shape == (2, 16, 16)
    assert out.is_contiguous()
    once = torch.autograd.grad(out.sum(), [qkv, bias])
    twice = torch.autograd.grad(run(qkv).sum() + run(qkv).sum(), [qkv, bias])
    for one, two in zip(once, twice, strict=True):
        assert torch.equal(one + one, two)
    assert torch.equal(torch.autograd.grad(run(qkv, is_trained=False).sum(), qkv)[0], once[0])
    assert torch.equal(torch.autograd.grad(run(qkv.detach()).sum(), bias)[0], once[1])
    with torch.no_grad():
        assert torch.equal(run(qkv), out)
    odd = wide[..., 1:49].requires_grad_()  # two bytes from where matrices begin
    assert torch.equal(run(odd), out)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(run(odd).sum(), [odd, bias]), once, strict=True))
    none = torch.zeros(0, 16, 48, device=DEVICE, dtype=HALF, requires_grad=True)
    gradients = torch.autograd.grad(run(none).sum(), [none, bias])
    assert gradients[0].shape == (0, 16, 48)
    assert not gradients[1].any()


@pytest.mark.interpret
def test_the_interpreter_refuses_what_it_computes_wrongly():
    query = torch.zeros(1, 1, 16, 16, dtype=BRAIN)
    with pytest.raises(BackendUnsupported, match="bfloat16"):
        block_sparse_attention(query, query, query, Window1d(4).layout(4, 4), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["window1d-49-shift-D32", "neighborhood2d-17", "slide1d-289-D128"])
def test_reruns_agree_bitwise(name):
    problem = LARGE[name].with_(batch=8)
    layout, tensors = problem.layout().to(DEVICE), problem.tensors(DEVICE)
    first = problem.run(tensors, layout, "triton")
    for _ in range(100):
        again = problem.run(tensors, layout, "triton")
        assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.gpu
def test_offsets_beyond_31_bits(large_memory):
    """More than 2^31 elements between two images, between two tokens of one, and in the results."""
    large_memory(18)
    heads, side, head_dim = 4, 64, 64
    tokens = side**2
    layout = Window1d(64).layout(side, side).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (2, heads, tokens, head_dim)
    near = [torch.randn(shape, generator=generator, device=DEVICE, dtype=HALF) for _ in range(4)]

    def run(query, key, value, cotangent):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = block_sparse_attention(*leaves, layout, backend="triton")
        return out.detach(), *torch.autograd.grad(out, leaves, cotangent)

    expected = run(*near)
    row = heads * head_dim
    buffer = torch.empty(2**31 + 8 * tokens * row, device=DEVICE, dtype=HALF)
    for image, token in ((2**31, row), (row, 2**31 // (tokens - 1) // 8 * 8)):
        far = [
            buffer.as_strided(shape, (image, head_dim, token, 1), i * (tokens if image > token else 2) * row).copy_(
                tensor
            )
            for i, tensor in enumerate(near)
        ]
        assert all(torch.equal(got, want) for got, want in zip(run(*far), expected, strict=True))
    del buffer, far

    # Images that are all the same one: only the results take memory.
    batch = 2**31 // (tokens * row) + 2
    results = run(*(tensor[:1].expand(batch, -1, -1, -1) for tensor in near))
    assert results[0].numel() > 2**31
    assert all(torch.equal(many[-1], want[0]) for many, want in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_no_bias_plan_outlives_its_tables():
    """New tables at a reused address must not meet the plan of the old ones."""
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(144).astype(np.int32)
        check(Problem(Window1d(36), 12, 12, order, 2, 1, 1, 16, HALF, "cells"))
        torch.cuda.empty_cache()
