"""The layers that the fused operators replace, as a benchmark problem with a roof."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitreous_core.bench.attention import FORWARD, relative_error
from vitreous_core.bench.case import Case, Gate, Goal, Prepared, Provider, Work

from .attention import CascadedGroupAttention, ConvBN, LocalWindowAttention
from .fused import fuse
from .model import FFN, EfficientViTMSRA, Residual, fold

_CHECKED = 2
"""Images that the gate looks at."""


@dataclass(frozen=True)
class Layer:
    """One residual layer of a stage on channels-last maps: attention, or an FFN and the convolution before it.

    Args:
        kind: which.
        arch, stage: whose sizes it has; stages count from 0.
        batch, side: of the maps.
        dtype: by name.
    """

    kind: Literal["attention", "ffn"]
    arch: str
    stage: int
    batch: int
    side: int
    dtype: str = "float16"

    @property
    def channels(self) -> int:
        """C."""
        channels: int = EfficientViTMSRA.arch_settings[self.arch]["channels"][self.stage]
        return channels

    @property
    def heads(self) -> int:
        """H."""
        heads: int = EfficientViTMSRA.arch_settings[self.arch]["num_heads"][self.stage]
        return heads

    @property
    def window(self) -> int:
        """Side of the windows."""
        return min(7, self.side)

    def work(self, mode: str) -> Work:
        """The map read and written once, the folded weights read once; the products, of padded windows too."""
        cells, channels, itemsize = self.batch * self.side**2, self.channels, getattr(torch, self.dtype).itemsize
        if self.kind == "ffn":
            return Work(itemsize * (2 * cells * channels + 4 * channels**2), 8 * cells * channels**2)
        windows = self.batch * (-(-self.side // self.window)) ** 2
        tokens, dim = self.window**2, channels // self.heads
        weights = channels * (32 + dim) + channels**2
        products = windows * self.heads * tokens**2 * (16 + dim)
        return Work(itemsize * (2 * cells * channels + weights), 2 * (windows * tokens * weights + products))

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {
            "series": f"{self.kind} {self.arch} stage {self.stage + 1}", "axis": "batch", "batch": self.batch,
            "side": self.side, "channels": self.channels, "heads": self.heads, "dtype": self.dtype,
        }  # fmt: skip

    def build(self) -> nn.Sequential:
        """The layer before anything is folded, its weights away from zeros and ones."""
        channels, kernels = self.channels, EfficientViTMSRA.arch_settings[self.arch]["kernel_sizes"]
        if self.kind == "attention":
            layers = [Residual(LocalWindowAttention(channels, self.heads, self.window, kernels))]
        else:
            layers = [Residual(ConvBN(channels, channels, 3, padding=1, groups=channels)), Residual(FFN(channels))]
        network = nn.Sequential(*layers)
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias)
            elif isinstance(module, CascadedGroupAttention):
                nn.init.normal_(module.attention_biases)
        return network.eval()


def layer_cases() -> Iterator[Case]:
    """E1, layer by layer: the kernels against folded layers, eager and compiled."""
    providers = tuple(Provider(name, partial(_prepare, how=name)) for name in ("triton", "folded", "folded-compiled"))
    goal = Goal(FORWARD, "speed-up", 1.0, over="folded-compiled")
    for arch in ("m0", "m4"):
        for stage, side in enumerate((14, 7, 4)):
            for kind in ("attention", "ffn"):
                for batch in (1, 256, 2048):
                    problem = Layer(kind, arch, stage, batch, side)
                    name = f"E1-layers/{kind}-{arch}-stage{stage + 1}/batch{batch}"
                    yield Case(name, "E1-layers", problem, providers, (FORWARD,), goals=(goal,))


def _prepare(problem: Layer, device: torch.device, *, how: str) -> Prepared:
    network = copy.deepcopy(_unfolded(problem))
    fold(network)
    if how == "triton":
        fuse(network)
    dtype = getattr(torch, problem.dtype)
    network = network.to(device, dtype).to(memory_format=torch.channels_last)
    if how == "folded-compiled":
        network.compile(dynamic=False)
    x = _draw(problem).to(device, dtype).contiguous(memory_format=torch.channels_last)

    def forward() -> Tensor:
        with torch.no_grad():
            result: Tensor = network(x)
        return result

    return Prepared({FORWARD: forward}, partial(_gate, problem, forward, device), facts={"channels_last": True})


def _gate(problem: Layer, forward: Any, device: torch.device, modes: Collection[str]) -> Gate:
    """Against the unfolded layer in fp64, with twice the error of the folded one."""
    dtype = getattr(torch, problem.dtype)
    x = _draw(problem)[:_CHECKED].to(device, dtype)
    with torch.no_grad():
        truth = copy.deepcopy(_unfolded(problem)).to(device).double()(x.double())
        folded = copy.deepcopy(_unfolded(problem))
        fold(folded)
        own = relative_error(folded.to(device, dtype)(x), truth)
    rounding = torch.finfo(dtype).eps / 2
    error = relative_error(forward()[:_CHECKED], truth)
    return Gate({"out": error}, {"out": 2 * (own + rounding)}, f"the unfolded layer in float64, {_CHECKED} images")


@lru_cache(1)
def _unfolded(problem: Layer) -> nn.Sequential:
    torch.manual_seed(0)
    return problem.build()


def _draw(problem: Layer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(problem.batch, problem.channels, problem.side, problem.side, generator=generator)
