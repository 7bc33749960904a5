"""Convolutions of the stem and by depth, as they train, as benchmark problems with a roof."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vitreous_core.bench.attention import BOTH, FORWARD, relative_error
from vitreous_core.bench.case import Case, Gate, Goal, Prepared, Provider, Work

from .bench_layers import STAGE_SIDES
from .model import EfficientViTMSRA
from .ops import Backend, convolution
from .ops.convolution import shape_reasons

IMAGES = 1024
_CHECKED = 2
"""Images that the gate looks at."""


@dataclass(frozen=True)
class ConvolutionProblem:
    """One convolution without bias of channels-last maps in bf16, with its weight in fp32.

    Args:
        place: in the network.
        batch, channels, size: of the maps; `size` is their side.
        outputs: channels that come out.
        side, stride: of the kernel.
        groups: 1, or `channels` where depthwise.
        is_image: whether nobody asks for the input's gradient.
    """

    place: str
    batch: int
    channels: int
    size: int
    outputs: int
    side: int
    stride: int
    groups: int
    is_image: bool = False

    def work(self, mode: str) -> Work:
        """The map read, the result written; backward the map and the result's gradient read, the map's written."""
        inside = self.batch * self.channels * self.size**2
        cells = self.batch * (-(-self.size // self.stride)) ** 2
        outside = cells * self.outputs
        products = 2 * cells * self.side**2 * self.outputs * (self.channels // self.groups)
        # Depthwise products fill no matrix unit.
        flops = products if self.groups == 1 else 0
        if mode == FORWARD:
            return Work(2 * (inside + outside), flops)
        passes = 2 if self.is_image else 3
        return Work(2 * (passes * inside + 2 * outside), passes * flops)

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {
            "series": self.place, "axis": "side", "batch": self.batch, "side": self.size, "channels": self.channels,
            "outputs": self.outputs, "kernel": self.side, "stride": self.stride, "dtype": "bfloat16",
        }  # fmt: skip

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The map, the weight and a gradient of the result."""
        generator = torch.Generator(device).manual_seed(0)
        out_size = -(-self.size // self.stride)
        x, dout = (
            torch.randn(
                (self.batch, size, size, channels), generator=generator, device=device, dtype=torch.bfloat16
            ).permute(0, 3, 1, 2)
            for size, channels in ((self.size, self.channels), (out_size, self.outputs))
        )  # fmt: skip
        shape = self.outputs, self.channels // self.groups, self.side, self.side
        weight = torch.randn(shape, generator=generator, device=device).to(memory_format=torch.channels_last)
        return x, weight, dout

    def gradients(self, x: Tensor, weight: Tensor, dout: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        """Those of the map, unless it is an image, and of the weight."""
        leaves = (weight,) if self.is_image else (x, weight)
        return torch.autograd.grad(convolution(x, weight, self.stride, backend=backend), leaves, dout)


def convolution_cases() -> Iterator[Case]:
    """E2, convolution by convolution: the kernels, and cuDNN."""
    backends: dict[str, Backend] = {"triton": "triton", "eager": "torch"}
    providers = tuple(Provider(name, partial(_prepare, backend=backend)) for name, backend in backends.items())
    goal = Goal(BOTH, "speed-up", 1.0, over="eager")
    for arch in ("m0", "m4"):
        for problem in _problems(arch):
            name = f"E2-convolutions/{problem.place.replace(' ', '-')}"
            yield Case(name, "E2-convolutions", problem, providers, (FORWARD, BOTH), goals=(goal,))


def _problems(arch: str) -> Iterator[ConvolutionProblem]:
    settings = EfficientViTMSRA.arch_settings[arch]
    channels = settings["channels"]
    widths = 3, channels[0] // 8, channels[0] // 4, channels[0] // 2, channels[0]
    for index, (width, outputs) in enumerate(pairwise(widths)):
        problem = ConvolutionProblem(f"{arch} stem{index + 1}", IMAGES, width, 224 >> index, outputs, 3, 2, 1)
        if not shape_reasons((outputs, width, 3, 3), 2, 1):
            yield replace(problem, is_image=index == 0)
    for stage, (width, size) in enumerate(zip(channels, STAGE_SIDES, strict=True), start=1):
        yield ConvolutionProblem(f"{arch} stage{stage}", IMAGES, width, size, width, 3, 1, width)
        windows, window = (IMAGES * 4, 7) if size == 14 else (IMAGES, size)
        for side in sorted(set(settings["kernel_sizes"])):
            yield ConvolutionProblem(f"{arch} stage{stage} query{side}", windows, 16, window, 16, side, 1, 16)
        if stage < 3:
            hidden = 4 * width
            yield ConvolutionProblem(f"{arch} merging{stage + 1}", IMAGES, hidden, size, hidden, 3, 2, hidden)


def _prepare(problem: ConvolutionProblem, device: torch.device, *, backend: Backend) -> Prepared:
    x, weight, dout = problem.draw(device)
    x.requires_grad_(not problem.is_image)
    weight.requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return convolution(x, weight, problem.stride, backend=backend)

    def both() -> tuple[Tensor, ...]:
        return problem.gradients(x, weight, dout, backend)

    standing = sum(tensor.numel() * tensor.element_size() for tensor in (x, weight, dout)) / 2**20
    gate = partial(_gate, problem, x.detach(), weight.detach(), dout, forward, backend)
    return Prepared({FORWARD: forward, BOTH: both}, gate, facts={"standing_mib": standing, "channels_last": True})


def _gate(
    problem: ConvolutionProblem,
    x: Tensor,
    weight: Tensor,
    dout: Tensor,
    forward: Callable[[], Tensor],
    backend: Backend,
    modes: Collection[str],
) -> Gate:
    """The results of all images by those of the first; gradients, which sum over images, of the first alone."""

    def results(backend: Backend, dtype: torch.dtype) -> dict[str, Tensor]:
        few = x[:_CHECKED].to(dtype).requires_grad_(not problem.is_image)
        own = weight.to(torch.promote_types(dtype, weight.dtype)).requires_grad_()
        gradients = problem.gradients(few, own, dout[:_CHECKED].to(dtype), backend)
        out = convolution(few, own, problem.stride, backend=backend).detach()
        return {"out": out, **dict(zip(("dweight", "dx"), reversed(gradients), strict=False))}

    truth, plain, got = results("torch", torch.float64), results("torch", x.dtype), results(backend, x.dtype)
    got["out"] = forward()[:_CHECKED]
    rounding = torch.finfo(x.dtype).eps / 2
    errors = {name: relative_error(tensor, truth[name]) for name, tensor in got.items()}
    limits = {name: 2 * (relative_error(plain[name], truth[name]) + rounding) for name in got}
    return Gate(errors, limits, f"PyTorch in float64, {_CHECKED} images")
