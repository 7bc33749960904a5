"""What `vitreous bench efficientvit` measures: exported networks on the CPU, one image at a time, in processor time.

Ours in deploy mode and timm's, whose graph is that of the official code, go through the same exporters with the same
weights and run in the same runtimes, beside PyTorch itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial

from torch import nn

from vitreous_core.bench.case import Case, Goal, Unavailable
from vitreous_core.bench.models import INFER, ModelProblem, State, model_provider
from vitreous_core.bench.runtimes import folded, runtime_provider
from vitreous_core.testing.golden import golden_state

from .convert import from_official, to_official, to_timm
from .model import EfficientViTMSRA, EfficientViTMSRAHead

NETWORKS = ("m0", "m4")


def cases() -> Sequence[Case]:
    """All of them."""
    return list(runtime_cases())


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


def classifier(arch: str) -> nn.Module:
    """Our network with one head, with weights away from zeros and ones, in evaluation mode."""
    backbone = EfficientViTMSRA(arch)
    head = EfficientViTMSRAHead(1000, backbone.channels[-1])
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
    network: nn.Module = timm.create_model(f"efficientvit_{arch}").eval()
    return network


def adopt_in_timm(module: nn.Module, state: State) -> None:
    """Give timm's network the weights of ours."""
    module.load_state_dict(to_timm(state))
