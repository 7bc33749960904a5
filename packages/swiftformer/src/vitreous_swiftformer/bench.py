"""What `vitreous bench swiftformer` measures: networks on a GPU, attention alone, and exported networks on the CPU.

On the CPU it is one image at a time, in processor time: ours in deploy mode and timm's, whose graph is that of the
official code, go through the same exporters with the same weights and run in the same runtimes, beside PyTorch itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial

from torch import nn

from vitreous_core.bench.attention import BOTH, FORWARD
from vitreous_core.bench.case import Case, Goal, Unavailable
from vitreous_core.bench.models import (
    INFER,
    TRAIN,
    Adopt,
    Build,
    ModelProblem,
    State,
    load_weights,
    model_provider,
    variants,
)
from vitreous_core.bench.runtimes import folded, runtime_provider
from vitreous_core.testing.golden import golden_state

from .bench_attention import TokensProblem, tokens_provider
from .convert import from_official, to_official, to_timm
from .model import SwiftFormer, SwiftFormerHead
from .ops import Backend

NETWORKS = ("xs", "l1")
STAGE_TOKENS = (56**2, 28**2, 14**2, 7**2)
"""Of an image of 224 pixels."""


def cases() -> Sequence[Case]:
    """All of them."""
    return [*inference_cases(), *training_cases(), *attention_cases(), *runtime_cases()]


def inference_cases() -> Iterator[Case]:
    """S1: inference in half precision, channels-last.

    `deploy-triton` is deploy mode as it comes, whose attention is Triton's; `deploy` keeps to plain PyTorch, and
    `deploy-encoder` has the kernel of the convolutional blocks too.
    """
    for arch in NETWORKS:
        ours, theirs = partial(classifier, arch, "torch"), partial(timm_classifier, arch)
        networks: dict[str, tuple[Build, Adopt]] = {
            "deploy-triton": (partial(classifier, arch), folded),
            "deploy": (ours, folded),
            "deploy-encoder": (partial(classifier, arch, "triton"), folded),
            "eager": (ours, load_weights),
            "timm": (theirs, adopt_in_timm),
        }
        for batch in (1, 128, 1024):
            problem = ModelProblem(
                f"swiftformer-{arch}", ours, batch, dtype="float16", autocast=False, series=f"{arch} {batch}"
            )
            names = [
                "deploy-triton", "deploy-triton-graph", "deploy-triton-compiled", "deploy-triton-compiled-graph",
                "deploy-compiled-graph", "deploy-encoder-graph", "eager",
                "timm", "timm-compiled", "timm-compiled-graph", *(["timm-graph"] if batch == 1 else []),
            ]  # fmt: skip
            goals = (
                Goal(INFER, "speed-up", 2.8, over="timm"),
                Goal(INFER, "speed-up", 1.4, over="timm-compiled"),
            )
            # Many images hide the launches, and a graph would have to copy them.
            fastest = "deploy-triton-compiled-graph" if batch <= 128 else "deploy-triton-compiled"
            yield Case(
                f"S1/{arch}-batch{batch}", "S1", problem, variants(names, networks), (INFER,), ours=fastest,
                goals=goals, clock="wall",
            )  # fmt: skip


def training_cases() -> Iterator[Case]:
    """S2: a training step under autocast. `triton` is training as it comes, `eager` keeps to plain PyTorch."""
    for arch in NETWORKS:
        ours = partial(classifier, arch, "torch")
        networks: dict[str, tuple[Build, Adopt]] = {
            "triton": (partial(classifier, arch), load_weights),
            "eager": (ours, load_weights),
            "timm": (partial(timm_classifier, arch), adopt_in_timm),
        }
        problem = ModelProblem(f"swiftformer-{arch}", ours, 128, series=arch)
        names = (
            "triton", "triton-compiled", "triton-reduce-overhead", "eager", "eager-reduce-overhead",
            "timm", "timm-compiled", "timm-reduce-overhead",
        )  # fmt: skip
        goal = Goal(TRAIN, "speed-up", 1.5, over="timm")
        yield Case(
            f"S2/{arch}", "S2", problem, variants(names, networks), (TRAIN,), ours="triton-reduce-overhead",
            goals=(goal,), clock="wall",
        )  # fmt: skip


def attention_cases() -> Iterator[Case]:
    """The attention between its linear maps, at every stage: what `ops.choose_backend` is to be decided by."""
    providers = (
        tokens_provider("triton", "triton"),
        tokens_provider("eager", "torch"),
        tokens_provider("compiled", "torch", compiled=True),
    )
    for arch in NETWORKS:
        channels = SwiftFormer.arch_settings[arch]["channels"]
        for stage, (tokens, width) in enumerate(zip(STAGE_TOKENS, channels, strict=True), start=1):
            for batch in (1, 128, 256):
                problem = TokensProblem(batch, tokens, width, series=f"{arch} stage {stage}")
                yield Case(
                    f"attention/{arch}-stage{stage}-batch{batch}", "attention", problem, providers, (FORWARD, BOTH)
                )  # fmt: skip


def runtime_cases() -> Iterator[Case]:
    """S1: one image on the CPU, in runtimes for deployment."""
    for arch in NETWORKS:
        ours, theirs = partial(classifier, arch), partial(timm_classifier, arch)
        problem = ModelProblem(f"swiftformer-{arch}", ours, batch=1, dtype="float32", autocast=False, series=arch)
        providers = (
            runtime_provider("onnxruntime", ours, "onnx"),
            runtime_provider("onnxruntime-timm", theirs, "onnx", adopt=adopt_in_timm),
            runtime_provider("executorch", ours, "executorch"),
            runtime_provider("executorch-timm", theirs, "executorch", adopt=adopt_in_timm),
            model_provider("deploy", ours, adopt=folded),
            model_provider("eager", ours),
            model_provider("timm", theirs, adopt=adopt_in_timm),
        )
        goal = Goal(INFER, "speed-up", 1.0, over="onnxruntime-timm")
        yield Case(
            f"S1/cpu-{arch}", "S1", problem, providers, (INFER,), "cpu", ours="onnxruntime", goals=(goal,),
            clock="processor",
        )  # fmt: skip


def classifier(arch: str, backend: Backend = "auto") -> nn.Module:
    """Our network with two heads, with weights away from zeros and ones, in evaluation mode."""
    backbone = SwiftFormer(arch, backend=backend)
    head = SwiftFormerHead(1000, backbone.channels[-1], distillation=True)
    model = nn.Sequential(OrderedDict(backbone=backbone, head=head))
    model.load_state_dict(from_official(golden_state(to_official(model.state_dict()))))
    return model.eval()


def timm_classifier(arch: str) -> nn.Module:
    """timm's network of that name.

    Raises:
        Unavailable: where timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise Unavailable("timm is not installed") from None
    network: nn.Module = timm.create_model(f"swiftformer_{arch}").eval()
    return network


def adopt_in_timm(module: nn.Module, state: State) -> None:
    """Give timm's network the weights of ours."""
    module.load_state_dict(to_timm(state))
