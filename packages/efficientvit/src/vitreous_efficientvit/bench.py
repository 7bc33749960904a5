"""What `vitreous bench efficientvit` measures: networks and their layers on a GPU, and exported networks on the CPU.

On the CPU it is one image at a time, in processor time: ours in deploy mode and timm's, whose graph is that of the
official code, go through the same exporters with the same weights and run in the same runtimes, beside PyTorch itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

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
from vitreous_core.deploy import switch_to_deploy
from vitreous_core.testing.golden import golden_state

from .bench_convolutions import convolution_cases
from .bench_layers import layer_cases, training_layer_cases
from .convert import from_official, to_official, to_timm
from .model import EfficientViTMSRA, EfficientViTMSRAHead
from .ops import Backend

NETWORKS = ("m0", "m4")
SUFFIXES = ("", "-graph", "-compiled", "-compiled-graph")
NEVER_SLOWER = (Goal(INFER, "speed-up", 1.0, over="timm"), Goal(INFER, "speed-up", 1.0, over="timm-compiled"))


def cases() -> Sequence[Case]:
    """All of them."""
    return [
        *inference_cases(), *variant_cases(), *size_cases(), *float32_cases(), *training_cases(), *layer_cases(),
        *training_layer_cases(), *convolution_cases(), *runtime_cases(),
    ]  # fmt: skip


def inference_cases() -> Iterator[Case]:
    """E1: half precision, channels-last, from one image to many."""
    goals = (Goal(INFER, "speed-up", 2.5, over="timm"), Goal(INFER, "speed-up", 1.5, over="timm-compiled"))
    for arch in NETWORKS:
        for batch in (1, 256, 2048):
            names = [
                *(network + suffix for network in ("deploy-triton", "deploy") for suffix in SUFFIXES), "eager", "timm",
                "timm-compiled", "timm-compiled-graph", *(["timm-graph"] if batch == 1 else []),
            ]  # fmt: skip
            # Many images hide the launches, and a graph would have to copy them.
            fastest = "deploy-triton-graph" if batch <= 256 else "deploy-triton"
            yield _inference_case("E1", f"{arch}-batch{batch}", arch, batch, names, ours=fastest, goals=goals)


def variant_cases() -> Iterator[Case]:
    """E1-variants: the latency of one image and the throughput of many, all networks in half precision."""
    for arch in EfficientViTMSRA.arch_settings:
        for batch in (1, 256):
            names = [
                "deploy-triton-graph", "deploy-triton", "deploy-compiled-graph", "eager", "timm", "timm-compiled",
                *(["timm-graph"] if batch == 1 else []),
            ]  # fmt: skip
            yield _inference_case("E1-variants", f"{arch}-batch{batch}", arch, batch, names)


def size_cases() -> Iterator[Case]:
    """E1-sizes: larger images in half precision, networks built for them on both sides."""
    names = ["deploy-triton-graph", "deploy-triton", "eager", "timm", "timm-compiled"]
    for arch in EfficientViTMSRA.arch_settings:
        for size in (384, 512):
            yield _inference_case("E1-sizes", f"{arch}-{size}px", arch, 128, names, size=size)


def float32_cases() -> Iterator[Case]:
    """E1-float32: the whole network in fp32, by PyTorch's own switches: its convolutions may use TF32 products.

    `deploy-auto` is deploy mode as it comes on a GPU.
    """
    names = [
        "deploy-auto-graph", "deploy-auto", "deploy-graph", "deploy-compiled-graph", "eager", "timm", "timm-compiled",
    ]  # fmt: skip
    for arch in EfficientViTMSRA.arch_settings:
        yield _inference_case(
            "E1-float32", f"{arch}-batch256", arch, 256, names, dtype="float32", ours="deploy-auto-graph"
        )


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

    `deploy-triton` is deploy mode as it comes for a half-precision network on a GPU; `deploy` keeps to plain PyTorch.
    """
    network, theirs = partial(classifier, arch, img_size=size, backend="torch"), partial(timm_classifier, arch, size)
    networks: dict[str, tuple[Build, Adopt]] = {
        "deploy-triton": (partial(network, dtype=torch.float16), partial(deployed, backend="auto")),
        "deploy-auto": (network, partial(deployed, backend="auto")),
        "deploy": (network, partial(deployed, backend="torch")),
        "eager": (network, load_weights),
        "timm": (theirs, adopt_in_timm),
    }
    problem = ModelProblem(
        f"efficientvit-msra-{arch}", network, batch, size, dtype, autocast=False, series=f"{arch} {batch}"
    )
    return Case(
        f"{mark}/{name}", mark, problem, variants(providers, networks), (INFER,), ours=ours, goals=goals, clock="wall"
    )


def training_cases() -> Iterator[Case]:
    """E2: a training step under autocast.

    `triton` is our network as it comes, with a kernel for each head's attention; `eager` keeps to plain PyTorch.
    """
    for arch in NETWORKS:
        networks: dict[str, tuple[Build, Adopt]] = {
            "triton": (partial(classifier, arch), load_weights),
            "eager": (partial(classifier, arch, backend="torch"), load_weights),
            "timm": (partial(timm_classifier, arch), adopt_in_timm),
        }
        for batch in (128, 1024):
            problem = ModelProblem(f"efficientvit-msra-{arch}", networks["eager"][0], batch, series=f"{arch} {batch}")
            names = [name + suffix for name in networks for suffix in ("", "-compiled", "-reduce-overhead")]
            goal = Goal(TRAIN, "speed-up", 2.0, over="timm")
            yield Case(
                f"E2/{arch}-batch{batch}", "E2", problem, variants(names, networks), (TRAIN,),
                ours="triton-reduce-overhead", goals=(goal,), clock="wall",
            )  # fmt: skip


def runtime_cases() -> Iterator[Case]:
    """E1: one image on the CPU, in runtimes for deployment."""
    for arch in NETWORKS:
        ours, theirs = partial(classifier, arch), partial(timm_classifier, arch)
        problem = ModelProblem(
            f"efficientvit-msra-{arch}",
            ours,
            batch=1,
            dtype="float32",
            autocast=False,
            series=arch,
        )
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
            f"E1/cpu-{arch}", "E1", problem, providers, (INFER,), "cpu", ours="onnxruntime", goals=(goal,),
            clock="processor",
        )  # fmt: skip


def classifier(
    arch: str, dtype: torch.dtype = torch.float32, img_size: int = 224, backend: Backend = "auto"
) -> nn.Module:
    """Our network with one head, with weights away from zeros and ones, in evaluation mode."""
    backbone = EfficientViTMSRA(arch, img_size, backend=backend)
    head = EfficientViTMSRAHead(1000, backbone.channels[-1])
    model = nn.Sequential(OrderedDict(backbone=backbone, head=head))
    model.load_state_dict(from_official(golden_state(to_official(model.state_dict()))))
    return model.to(dtype).eval()


def timm_classifier(arch: str, img_size: int = 224) -> nn.Module:
    """timm's network of that name for images of that size.

    Raises:
        Unavailable: where timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise Unavailable("timm is not installed") from None
    network: nn.Module = timm.create_model(f"efficientvit_{arch}", img_size=img_size).eval()
    return network


def deployed(module: nn.Module, state: State, backend: Backend) -> None:
    """Give our network the weights and switch it to deploy mode."""
    load_weights(module, state)
    switch_to_deploy(module.eval(), backend=backend)


def adopt_in_timm(module: nn.Module, state: State) -> None:
    """Give timm's network the weights of ours."""
    module.load_state_dict(to_timm(state))
