"""The kernels for long windows, both fronts, against the torch truth in fp64 by the two-times rule.

On a GPU, and small in the interpreter. Long are windows of more than 256 tokens, and shorter ones whose keys and
values do not fit on chip.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from vitreous_core.bench.measure import matmul_precision
from vitreous_core.testing.budget import TF32Products, assert_within_budget, relative_error
from vitreous_flash_window import shifted_window_attention, window_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SEED = 0x1234_5678_9ABC


@dataclass(frozen=True)
class Cut:
    """A call of `window_attention`: `units` windows, of which `mask_windows` follow each other in an image."""

    units: int
    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    bias: torch.dtype | None = SINGLE
    mask: Literal["none", "flags", "numbers"] = "none"
    mask_windows: int = 1
    strides: Literal["contiguous", "packed", "columns"] = "contiguous"
    dropout_p: float = 0.0
    scale: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        draw = drawer()
        shape = (3, self.units, self.heads, self.tokens, self.head_dim)
        qkv = draw(*shape).to(self.dtype)
        if self.strides == "packed":
            qkv = qkv.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
        elif self.strides == "columns":
            qkv = qkv.mT.contiguous().mT
        made = dict(zip(("query", "key", "value"), qkv, strict=True))
        made["cotangent"] = draw(*shape[1:]).to(self.dtype)
        if self.bias is not None:
            made["bias"] = draw(self.heads, self.tokens, self.tokens).to(self.bias)
        if self.mask != "none":
            mask = draw(self.mask_windows, self.tokens, self.tokens)
            made["mask"] = mask > -1 if self.mask == "flags" else torch.where(mask > 1.5, -math.inf, 2 * mask)
            made["mask"][0, 3] = False if self.mask == "flags" else -math.inf
        return {name: tensor.to(DEVICE) for name, tensor in made.items()}

    def call(self, leaves: dict[str, Tensor], mask: Tensor | None, backend: str) -> Tensor:
        return window_attention(
            leaves["query"], leaves["key"], leaves["value"], leaves.get("bias"), mask,
            scale=self.scale, dropout_p=self.dropout_p, dropout_seed=SEED, backend=backend,
        )  # fmt: skip


@dataclass(frozen=True)
class Image:
    """A call of `shifted_window_attention`."""

    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    window: int
    shift: int
    dtype: torch.dtype
    table: torch.dtype | None = SINGLE
    pad: bool = False
    cosine: bool = False
    dropout_p: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        draw = drawer()
        channels = self.heads * self.head_dim
        made = {
            "qkv": draw(self.batch, self.height, self.width, 3 * channels).to(self.dtype),
            "cotangent": draw(self.batch, self.height, self.width, channels).to(self.dtype),
        }
        if self.table is not None:
            made["table"] = draw((2 * self.window - 1) ** 2, self.heads).to(self.table)
        if self.pad:
            made["pad"] = draw(3 * channels).to(self.dtype)
        if self.cosine:
            # The last head is above the clamp.
            made["logit"] = torch.linspace(1.0, 5.0, self.heads).view(-1, 1, 1)
        return {name: tensor.to(DEVICE) for name, tensor in made.items()}

    def call(self, leaves: dict[str, Tensor], mask: Tensor | None, backend: str) -> Tensor:
        return shifted_window_attention(
            leaves["qkv"], leaves.get("table"), num_heads=self.heads, window_size=self.window, shift_size=self.shift,
            pad_qkv=leaves.get("pad"), logit_scale=leaves.get("logit"), dropout_p=self.dropout_p, dropout_seed=SEED,
            backend=backend,
        )  # fmt: skip


def drawer():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def run(problem: Cut | Image, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype | None = None):
    """Output and every gradient, by name; `dtype` promotes all inputs first."""
    promoted = {name: t if dtype is None or t.dtype == torch.bool else t.to(dtype) for name, t in tensors.items()}
    cotangent, mask = promoted.pop("cotangent"), promoted.pop("mask", None)
    leaves = {name: t.detach().requires_grad_() for name, t in promoted.items()}
    out = problem.call(leaves, mask, backend)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def check(problem: Cut | Image) -> dict[str, Tensor]:
    """Output and every gradient within budget."""
    tensors = problem.tensors()
    truth = run(problem, tensors, "torch", torch.float64)
    baseline = run(problem, tensors, "torch")
    actual = run(problem, tensors, "triton")
    # Gradients of bias, table and logit scale are wider than what they are made from.
    assert_within_budget(actual, truth, baseline, precision=problem.dtype)
    return actual


# Every feature with both fronts somewhere: pairs, not the product.
SMALL = {
    "cut-72-D64-mask": Cut(3, 1, 72, 64, SINGLE, mask="numbers", strides="packed"),
    # Scores of about 5, up to 20. Larger ones show that the interpreter's products are summed in another order in each
    # pass, which those of a GPU are not.
    "cut-72-D64-no-bias": Cut(2, 1, 72, 64, SINGLE, None, strides="columns", scale=-0.3),
    "cut-289-flags-dropout-half": Cut(2, 1, 289, 24, HALF, HALF, "flags", 2, dropout_p=0.3),
    "image-17-cosine-half": Image(1, 30, 16, 1, 8, 17, 5, HALF, HALF, pad=True, cosine=True),
    "image-6-D256-padded-shifted": Image(2, 6, 10, 1, 256, 6, 2, SINGLE, pad=True),
    "image-6-D256-plain-dropout": Image(1, 6, 7, 1, 256, 6, 0, SINGLE, None, dropout_p=0.2),
}

LARGE = {
    "cut-289-D32-half": Cut(6, 2, 289, 32, HALF, SINGLE, "flags", 3, strides="packed", dropout_p=0.2),
    "cut-400-D24-brain": Cut(4, 2, 400, 24, BRAIN, None, "numbers", 2),
    "cut-576-D32-half": Cut(5, 3, 576, 32, HALF, HALF, strides="packed"),
    "cut-576-D96-half": Cut(2, 2, 576, 96, HALF),
    "cut-1024-D64-brain": Cut(3, 2, 1024, 64, BRAIN, BRAIN),
    "cut-1024-D128-no-bias": Cut(2, 1, 1024, 128, HALF, None),
    "cut-300-D256-half": Cut(2, 1, 300, 256, HALF, strides="packed"),
    "cut-324-D32-single": Cut(3, 2, 324, 32, SINGLE, mask="numbers"),
    "cut-100-D256-single": Cut(3, 2, 100, 256, SINGLE),
    "cut-289-D4-single": Cut(5, 2, 289, 4, SINGLE),
    "image-24-shifted-half": Image(2, 40, 72, 2, 32, 24, 12, HALF, pad=True),
    "image-20-cosine-brain": Image(2, 33, 45, 3, 32, 20, 10, BRAIN, BRAIN, pad=True, cosine=True),
    "image-32-single": Image(1, 32, 64, 2, 32, 32, 16, SINGLE, cosine=True),
    "image-17-no-table-D40": Image(3, 20, 31, 2, 40, 17, 3, HALF, None, dropout_p=0.1),
    "image-7-D256-single": Image(2, 15, 17, 1, 256, 7, 3, SINGLE, pad=True, cosine=True),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name):
    check(SMALL[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_on_gpu(name):
    check((SMALL | LARGE)[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cut-324-D32-single", "image-32-single"])
def test_tf32_follows_the_switch(name):
    problem = LARGE[name]
    tensors = problem.tensors()
    truth = run(problem, tensors, "torch", torch.float64)
    with TF32Products():
        baseline = run(problem, tensors, "torch")
    with matmul_precision("high"):
        actual = run(problem, tensors, "triton")
    assert_within_budget(actual, truth, baseline)
    assert relative_error(actual["out"], truth["out"]) > 1e-5, "TF32 was not used"


both_devices = pytest.mark.parametrize(
    "where", [pytest.param("interpreter", marks=pytest.mark.interpret), pytest.param("gpu", marks=pytest.mark.gpu)]
)


@both_devices
def test_a_row_that_sees_nothing_is_zero(where):
    problem = Cut(2, 1, 72, 64, SINGLE, mask="flags")
    actual = run(problem, problem.tensors(), "triton")
    assert not actual["out"][:, 0, 3].any()
    assert not actual["dquery"][:, 0, 3].any()
    assert not actual["dbias"][0, 3].any()
    assert all(tensor.isfinite().all() for tensor in actual.values())


@both_devices
def test_empty_batch(where):
    problem = Cut(0, 2, 289, 16, HALF)
    actual = run(problem, problem.tensors(), "triton")
    assert actual["out"].shape == actual["dkey"].shape == (0, 2, 289, 16)
    assert not actual["dbias"].any()
    problem = Image(0, 17, 17, 2, 16, 17, 0, HALF, pad=True, cosine=True)
    actual = run(problem, problem.tensors(), "triton")
    assert actual["dqkv"].shape == (0, 17, 17, 96)
    assert not any(actual[name].any() for name in ("dtable", "dpad", "dlogit"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cut-289-D32-half", "cut-576-D32-half", "image-20-cosine-brain"])
def test_reruns_agree_bitwise(name):
    problem = LARGE[name]
    tensors = problem.tensors()
    first = run(problem, tensors, "triton")
    for _ in range(50):
        again = run(problem, tensors, "triton")
        assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.gpu
def test_one_compilation_serves_any_number_of_windows():
    # The paper's release compiles anew for each (defect 7).
    from vitreous_flash_window.ops.triton import long_backward, long_bias_gradient, long_forward

    kernels = (
        long_forward._long_fwd_kernel,
        long_backward._long_bwd_dq_kernel,
        long_backward._long_bwd_dkv_kernel,
        long_bias_gradient._long_bwd_bias_kernel,
    )

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    problem = LARGE["cut-576-D32-half"]
    run(problem, problem.tensors(), "triton")
    before = compiled()
    for units in (2, 3, 8, 16, 48):
        other = replace(problem, units=units)
        run(other, other.tensors(), "triton")
    assert compiled() == before


@pytest.mark.gpu
def test_offsets_beyond_31_bits(large_memory):
    """More than 2^31 elements between two windows, between two tokens of one, and in the results."""
    large_memory(18)
    tokens, head_dim = 289, 16
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (2, 1, tokens, head_dim)
    near = [torch.randn(shape, generator=generator, device=DEVICE, dtype=HALF) for _ in range(4)]

    def run_on(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = window_attention(*leaves, backend="triton")
        return out.detach(), *torch.autograd.grad(out, leaves, cotangent)

    expected = run_on(*near)
    size = tokens * head_dim
    buffer = torch.empty(2**31 + 8 * size, device=DEVICE, dtype=HALF)
    for window, token in ((2**31, head_dim), (head_dim, 2**31 // (tokens - 1) // 8 * 8)):
        far = [
            buffer.as_strided(shape, (window, 0, token, 1), i * (size if window > token else 2 * head_dim)).copy_(
                tensor
            )
            for i, tensor in enumerate(near)
        ]
        assert all(torch.equal(got, want) for got, want in zip(run_on(*far), expected, strict=True))
    del buffer, far

    # Windows that are all the same one: only the results take memory.
    units = 2**31 // size + 2
    results = run_on(*(tensor[:1].expand(units, -1, -1, -1) for tensor in near))
    assert results[0].numel() > 2**31
    assert all(torch.equal(many[-1], want[0]) for many, want in zip(results, expected, strict=True))
