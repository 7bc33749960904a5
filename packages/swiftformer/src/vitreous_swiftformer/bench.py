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
SUFFIXES = ("", "-graph", "-compiled", "-compiled-graph")
NEVER_SLOWER = (Goal(INFER, "speed-up", 1.0, over="timm"), Goal(INFER, "speed-up", 1.0, over="timm-compiled"))


def cases() -> Sequence[Case]:
    """All of them."""
    return [
        *inference_cases(), *variant_cases(), *size_cases(), *float32_cases(), *training_cases(), *attention_cases(),
        *runtime_cases(),
    ]  # fmt: skip


def inference_cases() -> Iterator[Case]:
    """S1: half precision, channels-last, from one image to many."""
    goals = (Goal(INFER, "speed-up", 2.8, over="timm"), Goal(INFER, "speed-up", 1.4, over="timm-compiled"))
    for arch in NETWORKS:
        for batch in (1, 128, 1024, 2048):
            names = [
                *(network + suffix for network in ("deploy-triton", "deploy") for suffix in SUFFIXES), "eager", "timm",
                "timm-compiled", "timm-compiled-graph", *(["timm-graph"] if batch == 1 else []),
            ]  # fmt: skip
            # Many images hide the launches, and a graph would have to copy them.
            fastest = "deploy-triton-graph" if batch <= 128 else "deploy-triton"
            yield _inference_case("S1", f"{arch}-batch{batch}", arch, batch, names, ours=fastest, goals=goals)


def variant_cases() -> Iterator[Case]:
    """S1-variants: the latency of one image and the throughput of many, all networks in half precision."""
    for arch in SwiftFormer.arch_settings:
        for batch in (1, 128):
            names = [
                "deploy-triton-graph", "deploy-triton", "deploy-compiled-graph", "eager", "timm", "timm-compiled",
                *(["timm-graph"] if batch == 1 else []),
            ]  # fmt: skip
            yield _inference_case("S1-variants", f"{arch}-batch{batch}", arch, batch, names)


def size_cases() -> Iterator[Case]:
    """S1-sizes: larger images in half precision."""
    names = ["deploy-triton-graph", "deploy-triton", "eager", "timm", "timm-compiled"]
    for arch in SwiftFormer.arch_settings:
        for size in (384, 512):
            yield _inference_case("S1-sizes", f"{arch}-{size}px", arch, 128, names, size=size)


def float32_cases() -> Iterator[Case]:
    """S1-float32: the whole network in fp32, by PyTorch's own switches: its convolutions may use TF32 products.

    `deploy-auto` is deploy mode as it comes on a GPU.
    """
    names = [
        "deploy-auto-graph", "deploy-auto", "deploy-auto-compiled-graph", "deploy-graph", "deploy-compiled-graph",
        "eager", "timm", "timm-compiled",
    ]  # fmt: skip
    for arch in SwiftFormer.arch_settings:
        yield _inference_case(
            "S1-float32", f"{arch}-batch128", arch, 128, names, dtype="float32", ours="deploy-auto-graph"
        )  # fmt: skip


def _inference_case(
    mark: str,
    name: str,
    arch: str,
    batch: int,
    providers: Sequence[str],
    *,
    size: int = 224,
    dtype: str = "float16",
    ours: str = "deploy-triton-graph",
    goals: tuple[Goal, ...] = NEVER_SLOWER,
) -> Case:
    """A network on a GPU.

    `deploy-triton` is deploy mode as it comes for half precision on a GPU; `deploy` keeps to plain PyTorch.
    """
    plain = partial(classifier, arch, "torch")
    networks: dict[str, tuple[Build, Adopt]] = {
        "deploy-triton": (partial(classifier, arch), folded),
        "deploy-auto": (partial(classifier, arch), folded),
        "deploy": (plain, folded),
        "eager": (plain, load_weights),
        "timm": (partial(timm_classifier, arch), adopt_in_timm),
    }
    problem = ModelProblem(f"swiftformer-{arch}", plain, batch, size, dtype, autocast=False, series=f"{arch} {batch}")
    return Case(
        f"{mark}/{name}", mark, problem, variants(providers, networks), (INFER,), ours=ours, goals=goals, clock="wall"
    )


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
            for batch, dtype in ((1, "float16"), (128, "float16"), (256, "float16"), (1, "float32"), (128, "float32")):
                name = f"{arch}-stage{stage}-batch{batch}" + ("-float32" if dtype == "float32" else "")
                problem = TokensProblem(batch, tokens, width, dtype, series=f"{arch} stage {stage}")
                yield Case(f"attention/{name}", "attention", problem, providers, (FORWARD, BOTH))


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
