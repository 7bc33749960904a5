"""The kernels of deploy mode against fp64: GELU, MLPs, strided convolutions; their registration, and whole networks."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.deploy import switch_to_deploy
from vitreous_core.errors import BackendUnsupported
from vitreous_core.testing.budget import assert_within_budget, relative_error
from vitreous_swiftformer import SwiftFormer
from vitreous_swiftformer.ops import (
    choose_halving_backend,
    choose_mlp_backend,
    contracts,
    conv_encoder,
    halving_convolution,
    pointwise_mlp,
)
from vitreous_swiftformer.ops.triton.configs import plan_mlp, takes_mlp
from vitreous_swiftformer.ops.triton.tile_math import gelu

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HALF, BRAIN = torch.float16, torch.bfloat16

both_devices = pytest.mark.parametrize(
    "where", [pytest.param("interpreter", marks=pytest.mark.interpret), pytest.param("gpu", marks=pytest.mark.gpu)]
)

# Batch, channels, height, width, hidden channels, dtype, layout.
Case = tuple[int, int, int, int, int, torch.dtype, str]
SMALL: dict[str, Case] = {
    "tiny": (2, 8, 3, 5, 12, HALF, "last"),
    "one-position": (1, 16, 1, 1, 80, HALF, "last"),
    "first": (1, 24, 9, 11, 24, HALF, "first"),
    "strided": (2, 40, 7, 7, 44, HALF, "strided"),
    "two-parts": (1, 92, 5, 7, 100, HALF, "last"),
}
# Every width of every SwiftFormer that the kernel takes.
LARGE: dict[str, Case] = {
    "48": (128, 48, 56, 56, 192, HALF, "last"),
    "48-local": (16, 48, 56, 56, 48, BRAIN, "last"),
    "56": (7, 56, 28, 28, 224, HALF, "last"),
    "64-first": (2, 64, 13, 57, 256, BRAIN, "first"),
    "96": (16, 96, 28, 28, 384, HALF, "last"),
    "112": (16, 112, 14, 14, 448, BRAIN, "last"),
    "128": (3, 128, 14, 15, 512, HALF, "last"),
    "168-strided": (3, 168, 14, 14, 672, HALF, "strided"),
    "192": (128, 192, 14, 14, 768, HALF, "last"),
    "220": (128, 220, 7, 7, 880, HALF, "last"),
    "224-local": (3, 224, 7, 7, 224, HALF, "last"),
    "320": (3, 320, 7, 7, 1280, HALF, "last"),
    "384": (3, 384, 7, 7, 1536, BRAIN, "last"),
}
# Batch, channels, height, width, outputs, ReLU, dtype, layout.
Halving = tuple[int, int, int, int, int, bool, torch.dtype, str]
SMALL_HALVINGS: dict[str, Halving] = {
    "pairs": (2, 3, 10, 12, 24, True, HALF, "last"),
    "odd-width": (1, 3, 9, 7, 24, True, HALF, "last"),
    "one-pixel": (1, 3, 1, 1, 24, True, HALF, "last"),
    "two-pixels": (3, 3, 1, 2, 5, True, HALF, "first"),
    "stem": (2, 24, 9, 7, 48, True, HALF, "last"),
    "strided": (1, 20, 4, 6, 12, False, HALF, "strided"),
}
LARGE_HALVINGS: dict[str, Halving] = {
    "pairs": (128, 3, 224, 224, 24, True, HALF, "last"),
    "image": (3, 3, 97, 33, 32, True, BRAIN, "last"),
    "pairs-bf16": (3, 3, 97, 34, 32, True, BRAIN, "first"),
    "24": (128, 24, 112, 112, 48, True, HALF, "last"),
    "48": (16, 48, 56, 56, 56, False, HALF, "last"),
    "56": (16, 56, 27, 29, 112, False, BRAIN, "last"),
    "112": (16, 112, 14, 14, 220, False, HALF, "last"),
    "320": (3, 320, 14, 14, 512, False, HALF, "last"),
}


@triton.jit
def _gelu_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(out_ptr + offsets, gelu(tl.load(x_ptr + offsets, mask=mask)), mask=mask)


@both_devices
def test_gelu_of_every_half_and_of_a_dense_grid(where: str) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(HALF)
    dense = torch.linspace(-9, 9, 2**20, dtype=torch.float64)
    x = torch.cat([halves[halves.isfinite()].double(), dense]).float().to(DEVICE)
    actual = torch.empty_like(x)
    _gelu_kernel[(triton.cdiv(len(x), 2**16),)](x, actual, len(x), BLOCK=2**16, num_warps=8)
    exact = x.double() * torch.special.ndtr(x.double())
    # Measured: 1.9e-6. Half precision rounds 0.1 by 3e-5 and 1 by 2.4e-4 or 4.9e-4.
    assert ((actual - exact).abs() <= 2.5e-6 + 2**-23 * exact.abs()).all()
    _gelu_kernel[(1,)](torch.tensor([torch.nan], device=DEVICE), actual, 1, BLOCK=16)
    assert actual[0].isnan()


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        batch, channels, height, width = x.shape
        wide = torch.full((2 * batch, height, channels, 3 * width), torch.nan, dtype=x.dtype, device=DEVICE)
        return wide[::2, :, :, ::3].transpose(1, 2).copy_(x)
    return x


def draw(case: Case) -> list[Tensor]:
    """Map, another one, taps of the depthwise convolution, parameters of the two 1x1 convolutions."""
    batch, channels, height, width, hidden, dtype, layout = case
    generator = torch.Generator().manual_seed(0)
    image = (batch, channels, height, width)
    shapes = (
        image,
        image,
        (channels, 1, 3, 3),
        (hidden, channels, 1, 1),
        (hidden,),
        (channels, hidden, 1, 1),
        (channels,),
    )
    sizes = (1.0, 1.0, 0.5, channels**-0.5, 1.0, hidden**-0.5, 1.0)
    x, residual, *parameters = (
        (torch.randn(shape, generator=generator) * size).to(dtype).to(DEVICE)
        for shape, size in zip(shapes, sizes, strict=True)
    )
    return [lay_out(x, layout), residual, *parameters]


def draw_halving(case: Halving) -> list[Tensor]:
    batch, channels, height, width, outputs, _, dtype, layout = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, channels, height, width), generator=generator).to(DEVICE, dtype)
    weight = torch.randn((outputs, channels, 3, 3), generator=generator) * (9 * channels) ** -0.5
    return [lay_out(x, layout), weight.to(DEVICE, dtype), torch.randn(outputs, generator=generator).to(DEVICE, dtype)]


def check(operation: Any, tensors: list[Tensor], **options: Any) -> None:
    dtype = tensors[0].dtype
    truth, plain, actual = (
        operation(*(tensor.to(to) for tensor in tensors), backend=backend, **options)
        for backend, to in (("torch", torch.float64), ("torch", dtype), ("triton", dtype))
    )
    assert actual.dtype == dtype
    assert_within_budget({"out": actual}, {"out": truth}, {"out": plain})
    assert actual.is_contiguous(memory_format=torch.channels_last)


def check_mlp(case: Case) -> None:
    x, residual, taps, *parameters = draw(case)
    check(pointwise_mlp, [x, residual, *parameters])
    check(pointwise_mlp, [x, x, *parameters])
    check(conv_encoder, [x, taps, *parameters])


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_mlps_interpreted(name: str) -> None:
    check_mlp(SMALL[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_mlps_on_gpu(name: str) -> None:
    check_mlp(LARGE[name])


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL_HALVINGS)
def test_halvings_interpreted(name: str) -> None:
    check(halving_convolution, draw_halving(SMALL_HALVINGS[name]), relu=SMALL_HALVINGS[name][5])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE_HALVINGS)
def test_halvings_on_gpu(name: str) -> None:
    check(halving_convolution, draw_halving(LARGE_HALVINGS[name]), relu=LARGE_HALVINGS[name][5])


@both_devices
def test_numbers_that_are_no_neighbours_stay_out(where: str) -> None:
    """Pairs hold one number that belongs to the column or row in front, or lies outside of the image."""
    x, weight, bias = draw_halving(SMALL_HALVINGS["pairs"])
    framed = torch.full((4, 10, 12, 3), torch.nan, dtype=HALF, device=DEVICE)
    image = framed[1:3].permute(0, 3, 1, 2).copy_(x)
    image[:, :, 4], image[:, :, :, 4] = torch.nan, torch.nan  # in reach of the third row and column of results
    expected, actual = (halving_convolution(y, weight, bias, relu=False, backend="triton") for y in (x, image))
    known = ~actual.isnan()
    assert not known[:, :, 2].any()
    assert not known[:, :, :, 2].any()
    assert known.sum() == 2 * 24 * 4 * 5
    assert torch.equal(actual[known], expected[known])


@both_devices
def test_opcheck_and_nothing_to_do(where: str) -> None:
    x, residual, taps, *parameters = draw(SMALL["tiny"])
    torch.library.opcheck(contracts._conv_encoder, (x, taps, *parameters))
    torch.library.opcheck(contracts._pointwise_mlp, (x, residual, *parameters))
    assert conv_encoder(x[:0], taps, *parameters, backend="triton").shape == (0, 8, 3, 5)
    assert pointwise_mlp(x[:0], residual[:0], *parameters, backend="triton").shape == (0, 8, 3, 5)
    image, weight, bias = draw_halving(SMALL_HALVINGS["pairs"])
    torch.library.opcheck(contracts._halving_convolution, (image, weight, bias, True))
    assert halving_convolution(image[:0], weight, bias, relu=True, backend="triton").shape == (0, 24, 5, 6)


@both_devices
@torch.no_grad()
def test_a_network_in_deploy_mode(where: str, build: Any, tiny: dict[str, Any]) -> None:
    images = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    images = images.to(DEVICE, HALF, memory_format=torch.channels_last)
    truth = build(tiny, num_classes=10).to(DEVICE).double()(images.double())
    results = {}
    for backend in ("torch", "triton"):
        model = build(tiny, num_classes=10, backend=backend).to(DEVICE, HALF, memory_format=torch.channels_last)
        switch_to_deploy(model)
        results[backend] = model(images)
    own = relative_error(results["torch"], truth)
    assert relative_error(results["triton"], truth) <= 2 * (own + torch.finfo(HALF).eps / 2)


@pytest.mark.gpu
@pytest.mark.compile
@torch.no_grad()
def test_deploy_mode_as_it_comes_is_one_graph(build: Any) -> None:
    """On a GPU in half precision `auto` runs the kernels, compiled too; where a gradient is asked for, it does not."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, HALF)
    images = images.to(memory_format=torch.channels_last)
    model = build("xs").to(DEVICE, HALF, memory_format=torch.channels_last)
    switch_to_deploy(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        eager = model(images)
    launched = {event.key for event in profile.key_averages()}
    assert {"_mlp_kernel", "_image_kernel", "_halving_kernel"} <= launched
    compiled = torch.compile(model, fullgraph=True)(images)
    assert relative_error(compiled, eager.double()) < 1e-2
    with torch.enable_grad():
        model(images.requires_grad_()).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("arch", sorted(SwiftFormer.arch_settings))
def test_plans_hold_the_channels(arch: str) -> None:
    for channels in SwiftFormer.arch_settings[arch]["channels"]:
        assert takes_mlp(channels) == (channels <= 384)
        for hidden in (channels, 4 * channels):
            plan = plan_mlp(channels, hidden)
            assert channels <= plan.first + plan.second < 1.5 * channels
            assert plan.second < plan.first


def test_choices_name_a_backend() -> None:
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.float64):
            assert choose_mlp_backend(device, dtype, 48, 192) == "torch"
            assert choose_halving_backend(device, dtype, 3, 24) == "torch"
        assert choose_mlp_backend(device, HALF, 50, 192) == "torch"
    assert choose_mlp_backend("cpu", HALF, 48, 192) == "torch"
    assert choose_halving_backend("cpu", HALF, 3, 24) == "torch"
    assert choose_mlp_backend("cuda", HALF, 48, 192) == "triton"
    assert choose_halving_backend("cuda", BRAIN, 3, 24) == "triton"


def test_refusals_name_every_reason() -> None:
    x, *parameters = (torch.randn(shape) for shape in ((1, 390, 2, 2), (390, 1, 3, 3), (8, 390, 1, 1), (8,)))
    parameters += [torch.randn(390, 8, 1, 1), torch.randn(390, requires_grad=True)]
    assert conv_encoder(x, *parameters, backend="auto").shape == x.shape
    with pytest.raises(BackendUnsupported) as refusal:
        conv_encoder(x, *parameters, backend="triton")
    for reason in (
        "all float16 or all bfloat16",
        "channels must be a multiple of 4 from 4 to 384; got 390",
        "for inference",
    ):
        assert reason in str(refusal.value)
    with pytest.raises(ValueError, match=r"taps must have shape \(390, 1, 3, 3\)"):
        conv_encoder(x, parameters[0][:, :, 1:], *parameters[1:], backend="torch")
    with pytest.raises(ValueError, match=r"x must be \[B, C, height, width\]"):
        conv_encoder(x[0], *parameters, backend="torch")
    with pytest.raises(ValueError, match=r"residual must have shape \(1, 390, 2, 2\)"):
        pointwise_mlp(x, x[:, :, 1:], *parameters[1:], backend="torch")
    weight, bias = torch.randn(8, 390, 3, 3), torch.randn(8)
    with pytest.raises(BackendUnsupported, match="all float16 or all bfloat16"):
        halving_convolution(x, weight, bias, relu=True, backend="triton")
    with pytest.raises(ValueError, match=r"weight must have shape \(8, 390, 3, 3\)"):
        halving_convolution(x, weight[:, 1:], bias, relu=True, backend="torch")
    with pytest.raises(ValueError, match="none but B zero"):
        halving_convolution(x[:, :, :0], weight, bias, relu=True, backend="torch")
