"""The kernel of the convolutional block against fp64, its registration, and whole networks in deploy mode."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from vitreous_core.deploy import switch_to_deploy
from vitreous_core.errors import BackendUnsupported
from vitreous_core.testing.budget import assert_within_budget, relative_error
from vitreous_swiftformer.ops import contracts, conv_encoder

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
}
# Every width of every SwiftFormer that the kernel takes.
LARGE: dict[str, Case] = {
    "48": (16, 48, 56, 56, 192, HALF, "last"),
    "48-local": (16, 48, 56, 56, 48, BRAIN, "last"),
    "56": (7, 56, 28, 28, 224, HALF, "last"),
    "64-first": (2, 64, 13, 57, 256, BRAIN, "first"),
    "96": (16, 96, 28, 28, 384, HALF, "last"),
    "112": (16, 112, 14, 14, 448, BRAIN, "last"),
    "168-strided": (3, 168, 14, 14, 672, HALF, "strided"),
    "192": (128, 192, 14, 14, 768, HALF, "last"),
    "224": (3, 224, 7, 7, 224, HALF, "last"),
}


def draw(case: Case) -> list[Tensor]:
    batch, channels, height, width, hidden, dtype, layout = case
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, channels, height, width), (channels, 1, 3, 3), (hidden, channels, 1, 1), (hidden,),
        (channels, hidden, 1, 1), (channels,),
    )  # fmt: skip
    sizes = (1.0, 0.5, channels**-0.5, 1.0, hidden**-0.5, 1.0)
    x, *parameters = (
        (torch.randn(shape, generator=generator) * size).to(dtype).to(DEVICE)
        for shape, size in zip(shapes, sizes, strict=True)
    )
    if layout == "last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        wide = torch.full((2 * batch, height, channels, 3 * width), torch.nan, dtype=dtype, device=DEVICE)
        x = wide[::2, :, :, ::3].transpose(1, 2).copy_(x)
    return [x, *parameters]


def check(case: Case) -> None:
    tensors = draw(case)
    truth, plain, actual = (
        conv_encoder(*(tensor.to(dtype) for tensor in tensors), backend=backend)  # type: ignore[misc]
        for backend, dtype in (("torch", torch.float64), ("torch", case[5]), ("triton", case[5]))
    )
    assert actual.dtype == case[5]
    assert_within_budget({"out": actual}, {"out": truth}, {"out": plain})
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name: str) -> None:
    check(SMALL[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_on_gpu(name: str) -> None:
    check(LARGE[name])


@both_devices
def test_opcheck_and_nothing_to_do(where: str) -> None:
    tensors = draw(SMALL["tiny"])
    torch.library.opcheck(contracts._conv_encoder, tuple(tensors))
    assert conv_encoder(tensors[0][:0], *tensors[1:], backend="triton").shape == (0, 8, 3, 5)


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
