"""The layers that the fused operators replace, as benchmark problems with a roof."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitreous_core.bench.attention import BOTH, FORWARD, relative_error
from vitreous_core.bench.case import Case, Gate, Goal, Prepared, Provider, Work

from .attention import CascadedGroupAttention, ConvBN, LocalWindowAttention
from .fused import FusedConvolution, fuse
from .model import FFN, EfficientViTMSRA, PatchMerging, Residual, fold
from .ops import Backend, DepthwiseWeights, halving_depthwise
from .ops.weights import bias_of, pack_depthwise

_CHECKED = 2
"""Images that the gate looks at."""


@dataclass(frozen=True)
class Layer(ABC):
    """One layer on channels-last maps.

    Args:
        arch: whose sizes it has.
        index: its stage, from 0; of a convolution its place in the stem.
        batch, side: of the maps that come in.
        dtype: by name.
    """

    arch: str
    index: int
    batch: int
    side: int
    dtype: str = "float16"

    kind: ClassVar[str]
    part: ClassVar[str] = "stage"

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of the maps that come in."""

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """The modules before anything is folded."""

    @abstractmethod
    def work(self, mode: str) -> Work | None:
        """The maps read and written once, the folded weights read once; the matrix products."""

    def fuse(self, network: nn.Sequential) -> None:
        """Put the kernels in the place of the folded modules."""
        fuse(network)

    @property
    def place(self) -> str:
        """As people count."""
        return f"{self.part}{self.index + 1}"

    @property
    def cells(self) -> int:
        """Of all maps that come in."""
        return self.batch * self.side**2

    @property
    def halved_cells(self) -> int:
        """Of all maps of half the side."""
        return self.batch * ((self.side + 1) // 2) ** 2

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {
            "series": f"{self.kind} {self.arch} {self.place}", "axis": "batch", "batch": self.batch, "side": self.side,
            "channels": self.channels, "dtype": self.dtype,
        }  # fmt: skip

    def build(self) -> nn.Sequential:
        """The modules with weights away from zeros and ones."""
        network = nn.Sequential(*self.layers())
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias)
            elif isinstance(module, CascadedGroupAttention):
                nn.init.normal_(module.attention_biases)
        return network.eval()

    def _setting(self, name: str) -> Any:
        return EfficientViTMSRA.arch_settings[self.arch][name]

    def _work(self, numbers: int, products: int) -> Work:
        return Work(getattr(torch, self.dtype).itemsize * numbers, 2 * products)


class Attention(Layer):
    """Cascaded group attention and its residual; padded windows cost products too."""

    kind = "attention"

    @property
    def channels(self) -> int:
        channels: int = self._setting("channels")[self.index]
        return channels

    @property
    def heads(self) -> int:
        """H."""
        heads: int = self._setting("num_heads")[self.index]
        return heads

    @property
    def window(self) -> int:
        """Side of the windows."""
        return min(7, self.side)

    def layers(self) -> list[nn.Module]:
        kernels = self._setting("kernel_sizes")
        return [Residual(LocalWindowAttention(self.channels, self.heads, self.window, kernels))]

    def work(self, mode: str) -> Work | None:
        channels, tokens, dim = self.channels, self.window**2, self.channels // self.heads
        windows = self.batch * (-(-self.side // self.window)) ** 2
        weights = channels * (32 + dim) + channels**2
        products = windows * self.heads * tokens**2 * (16 + dim)
        return self._work(2 * self.cells * channels + weights, windows * tokens * weights + products)

    def facts(self) -> Mapping[str, Any]:
        return {**super().facts(), "heads": self.heads, "window": self.window}


class FeedForward(Layer):
    """An FFN and the depthwise convolution before it, with their residuals."""

    kind = "ffn"

    @property
    def channels(self) -> int:
        channels: int = self._setting("channels")[self.index]
        return channels

    def layers(self) -> list[nn.Module]:
        channels = self.channels
        return [Residual(ConvBN(channels, channels, 3, padding=1, groups=channels)), Residual(FFN(channels))]

    def work(self, mode: str) -> Work:
        cells, channels = self.cells, self.channels
        return self._work(2 * cells * channels + 4 * channels**2, 4 * cells * channels**2)


class Convolution(Layer):
    """A convolution of the stem with the ReLU after it; the last has none."""

    kind = "convolution"
    part = "stem"

    @property
    def channels(self) -> int:
        return self._widths[self.index]

    @property
    def outputs(self) -> int:
        """Channels of the maps that go out."""
        return self._widths[self.index + 1]

    @property
    def _widths(self) -> tuple[int, ...]:
        widest = self._setting("channels")[0]
        return 3, widest // 8, widest // 4, widest // 2, widest

    def layers(self) -> list[nn.Module]:
        conv = ConvBN(self.channels, self.outputs, 3, stride=2, padding=1)
        return [conv] if self.index == 3 else [conv, nn.ReLU()]

    def fuse(self, network: nn.Sequential) -> None:
        conv = network[0]
        assert isinstance(conv, nn.Conv2d)
        network[0] = FusedConvolution(conv, relu=len(network) == 2)
        del network[1:]

    def work(self, mode: str) -> Work:
        weights = 9 * self.channels * self.outputs
        numbers = self.cells * self.channels + self.halved_cells * self.outputs + weights
        return self._work(numbers, self.halved_cells * weights)


class Merging(Layer):
    """The patch merging in front of a stage. Its gate needs the whole map, but no hidden map need leave the chip."""

    kind = "merging"

    @property
    def channels(self) -> int:
        channels: int = self._setting("channels")[self.index - 1]
        return channels

    @property
    def outputs(self) -> int:
        """Channels of the maps that go out."""
        outputs: int = self._setting("channels")[self.index]
        return outputs

    def layers(self) -> list[nn.Module]:
        return [PatchMerging(self.channels, self.outputs)]

    def work(self, mode: str) -> Work:
        hidden = 4 * self.channels
        # The gate narrows to a quarter of the hidden channels.
        expand, gate, reduce = hidden * self.channels, 2 * hidden * self.channels, hidden * self.outputs
        maps = self.cells * self.channels + self.halved_cells * self.outputs
        products = self.cells * expand + self.batch * gate + self.halved_cells * reduce
        return self._work(maps + expand + 9 * hidden + gate + reduce, products)


class MergingDepthwise(Layer):
    """What the one kernel of a merging computes, between the matrix products."""

    kind = "depthwise"

    @property
    def channels(self) -> int:
        channels: int = 4 * self._setting("channels")[self.index - 1]
        return channels

    def layers(self) -> list[nn.Module]:
        return [_Halving(self.channels)]

    def fuse(self, network: nn.Sequential) -> None:
        (halving,) = network
        assert isinstance(halving, _Halving)
        assert isinstance(halving.conv, nn.Conv2d)
        network[0] = _FusedHalving(halving.conv)

    def work(self, mode: str) -> Work:
        """No matrix products."""
        return self._work((self.cells + self.halved_cells + self.batch + 9) * self.channels, 0)


class _Halving(nn.Module):
    """ReLU, depthwise convolution of stride 2, ReLU, and the means over the cells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv: nn.Module = ConvBN(channels, channels, 3, stride=2, padding=1, groups=channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.conv(F.relu(x)))
        return hidden, hidden.mean(dim=(2, 3))


class _FusedHalving(nn.Module):
    """The same by the kernel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(pack_depthwise(conv).contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias_of(conv), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return halving_depthwise(x, DepthwiseWeights(self.weight, self.bias), backend="triton")


STAGE_SIDES = (14, 7, 4)
"""Of an image of 224 pixels."""


class AttentionTraining(Attention):
    """The same with batch norms on the statistics of the batch: forward and backward under autocast."""

    kind = "attention-training"

    def work(self, mode: str) -> None:
        """No roof: what between convolutions and norms must pass through memory depends on who computes it."""

    def facts(self) -> Mapping[str, Any]:
        facts = dict(super().facts())
        return {**facts, "computes_in": facts.pop("dtype")}


def layer_cases() -> Iterator[Case]:
    """E1, layer by layer: the kernels against folded layers, eager and compiled."""
    providers = tuple(Provider(name, partial(_prepare, how=name)) for name in ("triton", "folded", "folded-compiled"))
    goal = Goal(FORWARD, "speed-up", 1.0, over="folded-compiled")
    for arch in ("m0", "m4"):
        places: list[tuple[type[Layer], int, int]] = [
            *((kind, stage, side) for stage, side in enumerate(STAGE_SIDES) for kind in (Attention, FeedForward)),
            *((kind, stage, STAGE_SIDES[stage - 1]) for stage in (1, 2) for kind in (Merging, MergingDepthwise)),
            *((Convolution, index, 224 >> index) for index in range(4)),
        ]
        for kind, index, side in places:
            for batch in (1, 256, 2048):
                problem = kind(arch, index, batch, side)
                name = f"E1-layers/{problem.kind}-{arch}-{problem.place}/batch{batch}"
                yield Case(name, "E1-layers", problem, providers, (FORWARD,), goals=(goal,))


def training_layer_cases() -> Iterator[Case]:
    """E2, layer by layer: cascaded group attention with the kernel of its heads and in plain PyTorch."""
    backends: dict[str, Backend] = {"triton": "triton", "eager": "torch"}
    providers = tuple(
        Provider(name + suffix, partial(_prepare_training, backend=backend, compiled=bool(suffix)))
        for name, backend in backends.items()
        for suffix in ("", "-compiled")
    )
    goal = Goal(BOTH, "speed-up", 1.0, over="eager")
    for arch in ("m0", "m4"):
        for stage, side in enumerate(STAGE_SIDES):
            for batch in (128, 1024):
                problem = AttentionTraining(arch, stage, batch, side, "bfloat16")
                name = f"E2-layers/{problem.kind}-{arch}-{problem.place}/batch{batch}"
                yield Case(name, "E2-layers", problem, providers, (BOTH,), goals=(goal,), clock="wall")


def _prepare_training(
    problem: AttentionTraining, device: torch.device, *, backend: Backend, compiled: bool
) -> Prepared:
    network = _trained(problem, device, backend)
    run = torch.compile(network, dynamic=False) if compiled else network
    x = _map(problem, device)

    def both() -> tuple[Tensor, ...]:
        return _step(problem, network, run, x)

    gate = partial(_gate_training, problem, network, x[:_CHECKED])
    return Prepared({BOTH: both}, gate, facts={"channels_last": True, "compiled": compiled})


def _trained(problem: AttentionTraining, device: torch.device, backend: Backend) -> nn.Sequential:
    network = copy.deepcopy(_unfolded(problem)).to(device).to(memory_format=torch.channels_last).train()
    for module in network.modules():
        if isinstance(module, CascadedGroupAttention):
            module.backend = backend
    return network


def _step(
    problem: AttentionTraining, network: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, ...]:
    """The output, and the gradients of `x` and all parameters for that of a fixed gradient."""
    x = x.detach().requires_grad_()
    dtype = getattr(torch, problem.dtype)
    with torch.autocast(x.device.type, dtype, enabled=x.dtype == dtype != torch.float32):
        out = run(x)
    return out.detach(), *torch.autograd.grad(out, (x, *network.parameters()), x.detach().to(out.dtype))


def _gate_training(problem: AttentionTraining, network: nn.Module, x: Tensor, modes: Collection[str]) -> Gate:
    """Uncompiled, as a compiler would compile for the number of images too; all parameters together."""
    plain = _trained(problem, x.device, "torch")
    exact = copy.deepcopy(plain).double()
    results = []
    for one, images in ((network, x), (plain, x), (exact, x.double())):
        out, dx, *gradients = _step(problem, one, one, images)
        results.append((out, dx, torch.cat([gradient.flatten() for gradient in gradients])))
    rounding = torch.finfo(x.dtype).eps / 2
    errors, limits = {}, {}
    for name, got, own, truth in zip(("out", "dx", "dparameters"), *results, strict=True):
        errors[name] = relative_error(got, truth)
        limits[name] = 2 * (relative_error(own, truth) + rounding)
    return Gate(errors, limits, f"the layer in float64, {_CHECKED} images")


def _prepare(problem: Layer, device: torch.device, *, how: str) -> Prepared:
    network = copy.deepcopy(_unfolded(problem))
    fold(network)
    if how == "triton":
        problem.fuse(network)
    dtype = getattr(torch, problem.dtype)
    network = network.to(device, dtype).to(memory_format=torch.channels_last)
    if how == "folded-compiled":
        network.compile(dynamic=False)
    x = _map(problem, device)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _results(network(x))

    gate = partial(_gate, problem, forward, x[:_CHECKED])
    return Prepared({FORWARD: forward}, gate, facts={"channels_last": True})


def _map(problem: Layer, device: torch.device) -> Tensor:
    """Normal and channels-last."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (problem.batch, problem.side, problem.side, problem.channels)
    dtype = getattr(torch, problem.dtype)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).permute(0, 3, 1, 2)


def _gate(problem: Layer, forward: Callable[[], tuple[Tensor, ...]], x: Tensor, modes: Collection[str]) -> Gate:
    """Against the unfolded layer in fp64, with twice the error of the folded one."""
    with torch.no_grad():
        truth = _results(copy.deepcopy(_unfolded(problem)).to(x.device).double()(x.double()))
        folded = copy.deepcopy(_unfolded(problem))
        fold(folded)
        plain = _results(folded.to(x.device, x.dtype)(x))
    rounding = torch.finfo(x.dtype).eps / 2
    errors, limits = {}, {}
    for name, got, own, exact in zip(("out", "mean"), forward(), plain, truth, strict=False):
        errors[name] = relative_error(got[:_CHECKED], exact)
        limits[name] = 2 * (relative_error(own, exact) + rounding)
    return Gate(errors, limits, f"the unfolded layer in float64, {_CHECKED} images")


def _results(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@lru_cache(1)
def _unfolded(problem: Layer) -> nn.Sequential:
    torch.manual_seed(0)
    return problem.build()
