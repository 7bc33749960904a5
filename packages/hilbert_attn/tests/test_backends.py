"""Modules and backbones on the Triton kernels and on FlexAttention, judged by plain PyTorch in fp64.

In Triton's interpreter small and in single and half precision; on a GPU with real sizes, whole training steps, one
graph under `torch.compile`, and reruns that agree bitwise.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

from vitreous_core.testing.budget import assert_within_budget, relative_error
from vitreous_hilbert_attn import (
    HilbertNeighborhoodAttention,
    HilbertNeighborhoodTransformer,
    HilbertSlideAttention,
    HilbertWindowAttention,
    HilbertWindowTransformer,
    NeighborhoodAttention2d,
    NeighborhoodAttentionTransformer,
    SlideAttention2d,
    WindowAttention2d,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

Case = tuple[Callable[[], nn.Module], tuple[int, int], torch.dtype]


def results(module: nn.Module, size: tuple[int, int], dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
    """Output and every gradient; the inputs and weights are those of `module`, whatever the dtype and backend."""
    module = copy.deepcopy(module).to(dtype)
    module.backend = backend
    channels = module.qkv.in_features
    generator = torch.Generator().manual_seed(1)
    tokens, cotangent = (
        torch.randn(2, size[0] * size[1], channels, generator=generator).to(module.qkv.weight.device, dtype)
        for _ in range(2)
    )
    tokens.requires_grad_()
    out = module(tokens, size)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(out, [tokens, *named.values()], cotangent)
    return dict(zip(("out", "tokens", *named), (out.detach(), *gradients), strict=True))


def check(case: Case, backend: str) -> None:
    build, size, dtype = case
    torch.manual_seed(0)
    module = build()
    for parameter in module.parameters():
        # Weights that the dtype under test holds exactly, biases that matter.
        nn.init.normal_(parameter, std=1.0 if parameter.ndim < 2 or len(parameter) == module.num_heads else 0.2)
    module = module.to(dtype).to(DEVICE)
    truth = results(module, size, torch.float64, "torch")
    baseline = results(module, size, dtype, "torch")
    assert_within_budget(results(module, size, dtype, backend), truth, baseline, precision=dtype)


SMALL: dict[str, Case] = {
    "hswa-ragged": (lambda: HilbertWindowAttention(16, 2, 3, 4, map_size=(7, 5)), (7, 5), SINGLE),
    "hwa-window-order-resized": (
        lambda: HilbertWindowAttention(16, 1, 4, order="window", map_size=(4, 4)), (6, 7), HALF,
    ),
    "hsa": (lambda: HilbertSlideAttention(16, 2, 9, relative_bias=True), (5, 6), SINGLE),
    "hna": (lambda: HilbertNeighborhoodAttention(16, 1, 9), (1, 17), HALF),
    "na2d": (lambda: NeighborhoodAttention2d(16, 2, 3), (7, 6), SINGLE),
    "na2d-even-dilated": (lambda: NeighborhoodAttention2d(16, 1, (2, 3), (2, 1), order="morton"), (6, 5), HALF),
    "sa2d": (lambda: SlideAttention2d(16, 2, 3, relative_bias=True, order="row_major"), (5, 7), SINGLE),
    "wsa2d-shifted": (lambda: WindowAttention2d(16, 2, 3, 1), (7, 8), SINGLE),
}  # fmt: skip

LARGE: dict[str, Case] = {
    "hswa-ragged": (lambda: HilbertWindowAttention(96, 3, 7, 24, map_size=(29, 31)), (29, 31), BRAIN),
    "hwa-resized": (lambda: HilbertWindowAttention(64, 2, 8, map_size=(32, 32)), (40, 24), HALF),
    "hna-49": (lambda: HilbertNeighborhoodAttention(64, 2, 49), (28, 28), BRAIN),
    "hna-longer-than-the-map": (lambda: HilbertNeighborhoodAttention(64, 2, 49), (6, 6), HALF),
    "na2d-7": (lambda: NeighborhoodAttention2d(64, 2, 7), (28, 30), BRAIN),
    "na2d-7-dilated": (lambda: NeighborhoodAttention2d(64, 2, 7, 4, order="row_major"), (28, 30), HALF),
    "na2d-even-D24-single": (lambda: NeighborhoodAttention2d(48, 2, (6, 9)), (23, 29), SINGLE),
    "wsa2d-shifted": (lambda: WindowAttention2d(96, 3, 7, 3), (31, 28), HALF),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name: str) -> None:
    check(SMALL[name], "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_on_gpu(name: str) -> None:
    check(LARGE[name], "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hswa-ragged", "hna-49", "na2d-7-dilated"])
def test_flex_on_gpu(name: str) -> None:
    check(LARGE[name], "flex")


ARCH = {"embed_dims": 32, "depths": (2, 2), "num_heads": (1, 2)}
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "hwt": lambda **settings: HilbertWindowTransformer(ARCH, img_size=88, window_size=7, **settings),
    "hnt": lambda **settings: HilbertNeighborhoodTransformer(ARCH, kernel_size=49, **settings),
    "nat": lambda **settings: NeighborhoodAttentionTransformer(ARCH, dilations=(2, 1), **settings),
}


def step(model: nn.Module, images: torch.Tensor, forward: Callable | None = None) -> dict[str, torch.Tensor]:
    """Output and gradients of one step under autocast, the same samples dropped each time."""
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        out = (forward or model)(images)[0]
    out.float().square().mean().backward()
    return {"out": out.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_on_gpu(name: str) -> None:
    """Triton against plain PyTorch, both under autocast, at two sizes; then again, bit by bit."""
    torch.manual_seed(0)
    model = BACKBONES[name](drop_path_rate=0.2, backend="triton").cuda().train()
    plain = BACKBONES[name](drop_path_rate=0.2, backend="torch").cuda().train()
    plain.load_state_dict(model.state_dict())
    for size in ((88, 88), (60, 76)):
        images = torch.randn(4, 3, *size, device="cuda")
        got, want = step(model, images), step(plain, images)
        # Both round to bf16 (4e-3) at every layer; measured up to 1.5e-2.
        wrong = {key: relative_error(got[key], want[key]) for key in got}
        assert max(wrong.values()) < 0.05, max(wrong.items(), key=lambda item: item[1])
        again = step(model, images)
        assert all(torch.equal(again[key], got[key]) for key in got)


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_compiles_on_gpu(name: str) -> None:
    torch.manual_seed(0)
    model = BACKBONES[name](backend="triton", drop_path_rate=0.0).cuda().train()
    compiled = torch.compile(model, fullgraph=True)
    images = torch.randn(4, 3, 88, 88, device="cuda")
    got, want = step(model, images, compiled), step(model, images)
    wrong = {key: relative_error(got[key], want[key]) for key in got}
    assert max(wrong.values()) < 0.05, max(wrong.items(), key=lambda item: item[1])
