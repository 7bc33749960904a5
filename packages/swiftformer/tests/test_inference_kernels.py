"""The kernels of deploy mode against fp64: GELU, MLPs, strided convolutions; their registration, and whole networks."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous_core.deploy import switch_to_deploy
from vitreous_core.errors import BackendUnsupported
from vitreous_core.testing.budget import assert_within_budget, relative_error
from vitreous_swiftformer import SwiftFormer
from vitreous_swiftformer.ops import (
    choose_halving_backend,
    choose_mlp_backend,
    contracts,
    halving_convolution,
    pointwise_mlp,
)
from vitreous_swiftformer.ops.triton.configs import plan_halving, plan_mlp, takes_mlp
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
    "220-local": (3, 220, 7, 7, 220, BRAIN, "last"),
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
    """Map, residual, parameters of the two convolutions."""
    batch, channels, height, width, hidden, dtype, layout = case
    generator = torch.Generator().manual_seed(0)
    image = (batch, channels, height, width)
    shapes = (image, image, (hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,))
    sizes = (1.0, 1.0, channels**-0.5, 1.0, hidden**-0.5, 1.0)
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


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_mlps_interpreted(name: str) -> None:
    check(pointwise_mlp, draw(SMALL[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_mlps_on_gpu(name: str) -> None:
    x, residual, *parameters = draw(LARGE[name])
    check(pointwise_mlp, [x, residual, *parameters])
    check(pointwise_mlp, [x, x, *parameters])


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL_HALVINGS)
def test_halvings_interpreted(name: str) -> None:
    check(halving_convolution, draw_halving(SMALL_HALVINGS[name]), relu=SMALL_HALVINGS[name][5])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE_HALVINGS)
def test_halvings_on_gpu(name: str) -> None:
    check(halving_convolution, draw_halving(LARGE_HALVINGS[name]), relu=LARGE_HALVINGS[name][5])


@both_devices
def test_what_is_remembered_of_one_call_is_not_taken_for_another(where: str) -> None:
    mlps: list[Case] = [(1, 8, 3, 4, 12, HALF, "last"), (1, 8, 4, 3, 24, HALF, "last"), (2, 8, 3, 4, 12, HALF, "last")]
    for mlp in (*mlps, mlps[0]):
        check(pointwise_mlp, draw(mlp))
    halvings: list[Halving] = [(1, 3, 6, 8, 8, True, HALF, "last"), (1, 3, 8, 6, 8, True, HALF, "last")]
    for halving in (*halvings, halvings[0]):
        for relu in (True, False):
            check(halving_convolution, draw_halving(halving), relu=relu)


@both_devices
def test_an_image_at_any_address(where: str) -> None:
    """Aligned to 16 bytes; to 4, as pairs of numbers need; to 2."""
    x, weight, bias = draw_halving(SMALL_HALVINGS["pairs"])
    batch, channels, height, width = x.shape
    memory = torch.empty(x.numel() + 2, device=DEVICE, dtype=HALF)
    results = []
    for start in (0, 2, 1, 0):
        moved = memory[start:][: x.numel()].view(batch, height, width, channels).permute(0, 3, 1, 2).copy_(x)
        results.append(halving_convolution(moved, weight, bias, relu=True, backend="triton"))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[3], results[0])
    torch.testing.assert_close(results[2], results[0], rtol=2e-3, atol=2e-3)


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
    x, residual, *parameters = draw(SMALL["tiny"])
    torch.library.opcheck(contracts._pointwise_mlp, (x, residual, *parameters))
    assert pointwise_mlp(x[:0], residual[:0], *parameters, backend="triton").shape == (0, 8, 3, 5)
    image, weight, bias = draw_halving(SMALL_HALVINGS["pairs"])
    torch.library.opcheck(contracts._halving_convolution, (image, weight, bias, True))
    assert halving_convolution(image[:0], weight, bias, relu=True, backend="triton").shape == (0, 24, 5, 6)


class Recorder(TorchDispatchMode):
    """Counts the package's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "vitreous_swiftformer":
            self.counts[function.name().removeprefix("vitreous_swiftformer::")] += 1
        return function(*arguments, **(options or {}))


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
        with Recorder() as recorder:
            results[backend] = model(images)
    # Two in the stem and two between stages; one MLP in each of five blocks, another in the three with attention.
    assert recorder.counts == {"halving_convolution": 4, "additive_attention_packed": 3, "pointwise_mlp": 5 + 3}
    own = relative_error(results["torch"], truth)
    assert relative_error(results["triton"], truth) <= 2 * (own + torch.finfo(HALF).eps / 2)


@pytest.mark.gpu
@pytest.mark.compile
@torch.no_grad()
def test_deploy_mode_as_it_comes_is_one_graph(build: Any) -> None:
    """On a GPU in half precision `auto` runs the kernels, compiled too; where a gradient is asked for, it does not."""
    images = torch.randn(128, 3, 96, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, HALF)
    images = images.to(memory_format=torch.channels_last)
    model = build("xs").to(DEVICE, HALF, memory_format=torch.channels_last)
    switch_to_deploy(model)
    with Recorder() as many:
        eager = model(images)
    # One of each block, two of each attention block; the last stage has 9 positions an image, too few.
    assert many.counts == {"halving_convolution": 5, "additive_attention_packed": 4, "pointwise_mlp": 15}
    compiled = torch.compile(model, fullgraph=True)(images)
    assert relative_error(compiled, eager.double()) < 1e-2
    with torch.enable_grad(), Recorder() as differentiated:
        model(images[:2].requires_grad_()).sum().backward()
    assert "pointwise_mlp" not in differentiated.counts
    assert "halving_convolution" not in differentiated.counts


@pytest.mark.parametrize("shared_memory", [227 * 1024, 99 * 1024])
@pytest.mark.parametrize("arch", sorted(SwiftFormer.arch_settings))
def test_plans_fit(arch: str, shared_memory: int) -> None:
    """They hold the channels and little more, in the shared memory of a program on Hopper and on Ada GPUs."""
    for channels in SwiftFormer.arch_settings[arch]["channels"]:
        assert takes_mlp(channels) == (channels <= 256)
        for hidden in (channels, 4 * channels) if takes_mlp(channels) else ():
            plan = plan_mlp(channels, hidden, shared_memory)
            assert channels <= plan.first + plan.second < 1.5 * channels
            assert plan.second < plan.first
            chunks = plan.stages if plan.programs == 0 else -(-hidden // plan.block_h)
            maps = plan.stages if plan.programs else 1
            elements = (plan.first + plan.second) * (maps * plan.block_p + 2 * chunks * plan.block_h)
            assert 2 * elements <= shared_memory
        for source in (3, channels // 2):
            halving = plan_halving(source, channels, shared_memory)
            assert 2 * halving.stages * halving.block_k * (halving.block_p + halving.block_o) <= shared_memory


def test_choices() -> None:
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.float64):
            assert choose_mlp_backend(device, dtype, 48, 192, 10**6) == "torch"
            assert choose_halving_backend(device, dtype, 3, 24) == "torch"
        assert choose_mlp_backend(device, HALF, 50, 192, 10**6) == "torch"
    assert choose_mlp_backend("cpu", HALF, 48, 192, 10**6) == "torch"
    assert choose_halving_backend("cpu", HALF, 3, 24) == "torch"
    assert choose_mlp_backend("cuda", HALF, 48, 192, 49) == "triton"
    assert choose_mlp_backend("cuda", HALF, 220, 880, 6272) == "triton"
    assert choose_mlp_backend("cuda", HALF, 220, 880, 49) == "torch"
    assert choose_mlp_backend("cuda", HALF, 384, 1536, 6272) == "torch"
    assert choose_halving_backend("cuda", BRAIN, 3, 24) == "triton"


def test_refusals_name_every_reason() -> None:
    x, *parameters = (torch.randn(shape) for shape in ((1, 390, 2, 2), (8, 390, 1, 1), (8,), (390, 8, 1, 1)))
    parameters += [torch.randn(390, requires_grad=True)]
    assert pointwise_mlp(x, x, *parameters, backend="auto").shape == x.shape
    with pytest.raises(BackendUnsupported) as refusal:
        pointwise_mlp(x, x, *parameters, backend="triton")
    for reason in (
        "all float16 or all bfloat16",
        "channels must be a multiple of 4 from 4 to 256; got 390",
        "for inference",
    ):
        assert reason in str(refusal.value)
    with pytest.raises(ValueError, match=r"weight1 must have shape \(8, 390, 1, 1\)"):
        pointwise_mlp(x, x, parameters[0][:, 1:], *parameters[1:], backend="torch")
    with pytest.raises(ValueError, match=r"x must be \[B, C, height, width\]"):
        pointwise_mlp(x[0], x, *parameters, backend="torch")
    with pytest.raises(ValueError, match=r"residual must have shape \(1, 390, 2, 2\)"):
        pointwise_mlp(x, x[:, :, 1:], *parameters, backend="torch")
    weight, bias = torch.randn(8, 390, 3, 3), torch.randn(8)
    with pytest.raises(BackendUnsupported, match="all float16 or all bfloat16"):
        halving_convolution(x, weight, bias, relu=True, backend="triton")
    with pytest.raises(ValueError, match=r"weight must have shape \(8, 390, 3, 3\)"):
        halving_convolution(x, weight[:, 1:], bias, relu=True, backend="torch")
    with pytest.raises(ValueError, match="none but B zero"):
        halving_convolution(x[:, :, :0], weight, bias, relu=True, backend="torch")
