"""Whole networks as a benchmark problem: a training step and inference on random images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cuda_graphs import GraphedModule
from .attention import relative_error
from .case import Gate, Prepared, Provider

TRAIN, INFER = "train", "infer"
_CLASSES = 1000
_CHECKED = 2
"""Images that the gate looks at."""
_MIB = 2**20

Build = Callable[[], nn.Module]
State = dict[str, Tensor]
Adopt = Callable[[nn.Module, State], object]


@dataclass(frozen=True)
class ModelProblem:
    """A classifier of 1,000 classes on a batch of images.

    Mode `"train"` is forward, cross-entropy, backward and AdamW; mode `"infer"` is the forward in evaluation mode
    without gradients. Images are on the device when the clock starts.

    Args:
        network: what is computed, e.g. `"swin-tiny"`.
        reference: builds that network; its weights are every provider's, and in float64 it is the truth. None where
            providers compute different functions, which are then not compared.
        batch, size: of the images, `[batch, 3, size, size]`.
        dtype: of the computation, by name.
        autocast: compute in it by autocast, with weights in float32; else the whole network is cast to it.
        series: family of cases that one curve in a plot shows.
    """

    network: str
    reference: Build | None = None
    batch: int = 128
    size: int = 224
    dtype: str = "bfloat16"
    autocast: bool = True
    series: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def work(self, mode: str) -> None:
        """No roof: too many operations to say what the least is."""

    def facts(self) -> Mapping[str, Any]:
        """For the row. No `dtype`, which would ask for a roof."""
        return {
            "series": self.series, "side": self.size, "network": self.network, "batch": self.batch,
            "size": self.size, "computes_in": self.dtype, "autocast": self.autocast,
        }  # fmt: skip


def load_weights(module: nn.Module, state: State) -> None:
    """How a provider takes the reference's weights when its names are the reference's."""
    module.load_state_dict(state)


def model_provider(
    name: str,
    build: Build,
    *,
    adopt: Adopt = load_weights,
    compiled: bool = False,
    compile_mode: str | None = None,
    graphed: bool = False,
    channels_last: bool = False,
    instead: ModelProblem | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Provider:
    """A provider of a network.

    Args:
        name: of the provider.
        build: builds the classifier; called with the device as the default device. Raises `Unavailable` where a
            library is missing.
        adopt: gives it the reference's weights.
        compiled: whether `torch.compile` compiles the whole network, without dynamic shapes.
        compile_mode: of `torch.compile`; `"reduce-overhead"` replays forward and backward as CUDA graphs.
        graphed: replay inference as a CUDA graph, with the images copied into its memory; there is no training then.
        channels_last: memory format of weights and images.
        instead: compute another problem, where a paper compares different networks; the gate judges by that one.
        facts: for the row.
    """
    settings = {
        "compiled": compiled, "compile_mode": compile_mode, "graphed": graphed, "channels_last": channels_last,
        **(facts or {}),
    }  # fmt: skip
    return Provider(name, partial(_prepare, build=build, adopt=adopt, instead=instead, settings=settings))


_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "-compiled": {"compiled": True},
    "-graph": {"graphed": True},
    "-compiled-graph": {"compiled": True, "graphed": True},
    "-reduce-overhead": {"compiled": True, "compile_mode": "reduce-overhead"},
}


def variants(names: Iterable[str], networks: Mapping[str, tuple[Build, Adopt]]) -> tuple[Provider, ...]:
    """Providers in channels-last by their names: that of a network, and how it is run.

    Args:
        names: a name of `networks`, and behind it nothing, `"-compiled"`, `"-graph"` or `"-compiled-graph"` (inference
            alone), or `"-reduce-overhead"`; see `model_provider`.
        networks: how each is built and takes the reference's weights, by name.
    """
    known = {
        network + suffix: model_provider(network + suffix, build, adopt=adopt, channels_last=True, **settings)
        for network, (build, adopt) in networks.items()
        for suffix, settings in _VARIANTS.items()
    }
    return tuple(known[name] for name in names)


def _prepare(
    problem: ModelProblem,
    device: torch.device,
    *,
    build: Build,
    adopt: Adopt,
    instead: ModelProblem | None,
    settings: Mapping[str, Any],
) -> Prepared:
    if instead is not None:
        problem, settings = instead, {**settings, "computes": dict(instead.facts())}
    torch.manual_seed(0)
    with device:
        module = build()
    if problem.reference is not None:
        adopt(module, reference_of(problem, device).state_dict())
    module, images = _place(problem, module, draw(problem, device))
    if settings["channels_last"]:
        module, images = module.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    runner = module
    if settings["compiled"]:
        # Not `module.compile()`, which takes a `Sequential` layer by layer.
        runner = cast(nn.Module, torch.compile(module, dynamic=False, mode=settings["compile_mode"]))
    network = GraphedModule(runner.eval()) if settings["graphed"] else runner
    labels = torch.arange(problem.batch, device=device) % _CLASSES
    # At a rate of zero AdamW does all its work and leaves the weights as the gate wants them.
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)

    def train() -> Tensor:
        if not module.training:  # walking all modules takes the host a while
            module.train()
        with _precision(problem, device):
            loss = F.cross_entropy(_scores(network(images)), labels)
        loss.backward()
        optimizer.step()
        # At the end, so that the gradients belong to the memory of this step.
        optimizer.zero_grad()
        return loss.detach()

    def infer() -> Tensor:
        if module.training:
            module.eval()
        with torch.no_grad(), _precision(problem, device):
            return _scores(network(images))

    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    state = {"standing_mib": weights / _MIB, "parameters": sum(p.numel() for p in module.parameters())}
    # Steps of training move the statistics of batch norms, by which the gate's evaluation mode normalises.
    first = [buffer.clone() for buffer in module.buffers()]
    gate = None if problem.reference is None else partial(_gate, problem, module, first, images, labels, infer)
    if settings["graphed"]:
        return Prepared({INFER: infer}, gate, {TRAIN: "a CUDA graph of inference"}, facts={**settings, **state})
    return Prepared({TRAIN: train, INFER: infer}, gate, facts={**settings, **state})


def draw(problem: ModelProblem, device: torch.device) -> Tensor:
    """Normal images in float32."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(problem.batch, 3, problem.size, problem.size, generator=generator, device=device)


def _place(problem: ModelProblem, module: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    if problem.autocast:
        return module, images
    return module.to(problem.torch_dtype), images.to(problem.torch_dtype)


def _precision(problem: ModelProblem, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, problem.torch_dtype) if problem.autocast else nullcontext()


def _scores(output: Any) -> Tensor:
    """Class scores; a network with several heads returns its own first."""
    scores = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(scores, Tensor)
    return scores.float()


# The gate.


def _gate(
    problem: ModelProblem,
    module: nn.Module,
    buffers: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    infer: Callable[[], Tensor],
    modes: Collection[str],
) -> Gate:
    """Compare scores, and the gradient of the images, with the reference in float64; `buffers` are those to begin with.

    The gradient passes through everything that the backward computes but the weights'. It is taken in evaluation mode,
    as dropped paths cannot be compared, and not through `torch.compile`, which would compile for that mode too; the
    compiled scores are compared as they are.
    """
    truth, limits = truth_of(problem, images.device)
    with torch.no_grad():
        for buffer, first in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(first)
    got = {}
    if INFER in modes:
        got["scores"] = infer()[:_CHECKED]
    if TRAIN in modes:
        got["scores_trained"], got["dimages"] = _step_of(problem, module, images[:_CHECKED], labels[:_CHECKED])
    errors = {name: relative_error(tensor, truth[name.removesuffix("_trained")]) for name, tensor in got.items()}
    allowed = {name: limits[name.removesuffix("_trained")] for name in errors}
    return Gate(errors, allowed, f"the reference network in float64, {_CHECKED} images")


def _step_of(problem: ModelProblem, module: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and the gradient of the images, in evaluation mode and uncompiled."""
    training = module.training
    module.eval()
    images = images.detach().clone().requires_grad_()
    with _precision(problem, images.device):
        scores = _scores(module.forward(images))
    (gradient,) = torch.autograd.grad(F.cross_entropy(scores, labels), images)
    module.train(training)
    return scores.detach(), gradient


@lru_cache(1)
def reference_of(problem: ModelProblem, device: torch.device) -> nn.Module:
    """The network whose weights every provider takes."""
    assert problem.reference is not None
    torch.manual_seed(0)
    with device:
        module = problem.reference()
        # Away from zeros and ones, at which some layers would not show.
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return module


@lru_cache(1)
def truth_of(problem: ModelProblem, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The reference's results in float64, and twice its own error in the problem's precision."""
    images = draw(problem, device)[:_CHECKED]
    labels = torch.arange(len(images), device=device) % _CLASSES
    module = reference_of(problem, device)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    low = _step_of(problem, *_place(problem, module, images), labels)
    exact = ModelProblem(problem.network, dtype="float64", autocast=False)
    module.float().load_state_dict(state)
    wide = _step_of(exact, module.double(), images.double(), labels)
    module.float()
    rounding = torch.finfo(problem.torch_dtype).eps / 2
    truth = dict(zip(("scores", "dimages"), wide, strict=True))
    limits = {
        name: 2 * (relative_error(tensor, truth[name]) + rounding) for name, tensor in zip(truth, low, strict=True)
    }
    return truth, limits
