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
    # Triton's interpreter sums the products of each pass in another order, which a GPU does not: in fp32 the weights
    # are then not those that the log-sum-exp is of, and once scores pass 10 it shows. With biases of 1 some draws
    # (PyTorch versions draw differently) had gradients of 3 times the plain path's error there, with 0.5 of at most 2.0
    # times.
    spread = 0.5 if INTERPRETED and dtype == SINGLE else 1.0
    for parameter in module.parameters():
        # Weights that the dtype under test holds exactly, biases that matter.
        nn.init.normal_(parameter, std=spread if parameter.ndim < 2 or len(parameter) == module.num_heads else 0.2)
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


def step(
    model: nn.Module, size: tuple[int, int], dtype: torch.dtype, forward: Callable | None = None
) -> dict[str, torch.Tensor]:
    """Output and gradients of one step, under autocast to `dtype` (fp64: all of it in fp64); the same samples are left
    out each time."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    images = torch.randn(2, 3, *size, generator=generator).to(DEVICE, wide)
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float64):
        out = (model if forward is None else forward)(images)[0]
    cotangent = torch.randn(out.shape, generator=generator).to(DEVICE, wide)
    (out.to(wide) * cotangent).sum().backward()
    return {"out": out.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def errors(got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the output, and root mean square over the parameters: a small table's own error is a matter of luck."""
    wrong = torch.tensor([relative_error(got[name], truth[name]) for name in truth if name != "out"])
    return {"out": relative_error(got["out"], truth["out"]), "gradients": float(wrong.square().mean().sqrt())}


def models(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """On the kernels, in plain PyTorch, and that in fp64."""
    torch.manual_seed(0)
    built = [BACKBONES[name](drop_path_rate=0.2, backend=backend) for backend in ("triton", "torch", "torch")]
    for model in built:
        model.load_state_dict(built[0].state_dict())
    fast, plain, wide = (model.to(DEVICE).train() for model in built)
    return fast, plain, wide.double()


def check_step(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    fast, plain, wide = models(name)
    truth = step(wide, size, torch.float64)
    allowed, found = errors(step(plain, size, dtype), truth), errors(step(fast, size, dtype), truth)
    for key, error in found.items():
        # The two-times rule; the rounding of the truth is far below the plain path's own error.
        assert error <= 2 * allowed[key], (key, error, allowed[key])


@pytest.mark.interpret
@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_interpreted(name: str) -> None:
    check_step(name, (36, 28), HALF)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_on_gpu(name: str) -> None:
    for size in ((88, 88), (60, 76)):
        check_step(name, size, BRAIN)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKBONES)
def test_training_steps_agree_bitwise(name: str) -> None:
    model, *_ = models(name)
    first, again = (step(model, (88, 88), BRAIN) for _ in range(2))
    assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_compiles_on_gpu(name: str) -> None:
    fast, plain, wide = models(name)
    for model in (fast, plain, wide):  # compiled code draws other random numbers
        for stage in model.stages:
            stage.drop_path_rates = (0.0,) * len(stage.blocks)
    truth = step(wide, (88, 88), torch.float64)
    allowed = errors(step(plain, (88, 88), BRAIN), truth)
    found = errors(step(fast, (88, 88), BRAIN, torch.compile(fast, fullgraph=True)), truth)
    assert all(error <= 2 * allowed[key] for key, error in found.items()), (found, allowed)


@pytest.mark.interpret
def test_kernels_are_part_of_one_graph() -> None:
    """Traced with the kernels' operators in it, forward and backward."""
    fast, *_ = models("nat")
    want = step(fast, (36, 28), HALF)
    got = step(fast, (36, 28), HALF, torch.compile(fast, backend="aot_eager", fullgraph=True))
    wrong = errors(got, want)
    assert max(wrong.values()) < 0.02, wrong
