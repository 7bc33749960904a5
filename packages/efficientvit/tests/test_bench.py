"""The benchmark's cases are whole, and its providers compute the same network."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from vitreous_core.bench.attention import BOTH, FORWARD
from vitreous_core.bench.case import Work
from vitreous_core.bench.models import INFER, ModelProblem
from vitreous_efficientvit import EfficientViTMSRA, bench
from vitreous_efficientvit.bench_convolutions import ConvolutionProblem, convolution_cases
from vitreous_efficientvit.bench_layers import Attention, Convolution, FeedForward, Merging, MergingDepthwise
from vitreous_efficientvit.ops import Convolution as TrainedConvolution


def test_cases() -> None:
    cases = bench.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) > 0
    for case in cases:
        assert case.name.startswith(f"{case.mark}/")
        providers = {provider.name for provider in case.providers}
        assert case.ours in providers
        assert {goal.over for goal in case.goals} <= providers


@pytest.mark.parametrize("name", ["deploy", "eager", "timm"])
def test_providers_agree(name: str) -> None:
    if name == "timm":
        pytest.importorskip("timm", reason="timm is not installed: nothing of it is compared")
    case = next(case for case in bench.cases() if case.name == "E1/cpu-m0")
    (provider,) = (provider for provider in case.providers if provider.name == name)
    prepared = provider.prepare(case.problem, torch.device("cpu"))
    assert prepared.gate is not None
    gate = prepared.gate([INFER])
    assert gate.passed, gate


@pytest.mark.parametrize("name", ["m1-batch1", "m0-384px"])
def test_every_provider_of_a_variant_and_of_a_size_is_built_and_agrees(name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed: nothing of it is compared")
    (case,) = (case for case in bench.cases() if case.mark != "E1" and case.name.endswith(f"/{name}"))
    for provider in case.providers:
        # The fused network is built in half precision, as it is lowered to it after the switch.
        dtype = case.problem.dtype if "triton" in provider.name else "float32"
        prepared = provider.prepare(replace(case.problem, batch=2, dtype=dtype), torch.device("cpu"))
        assert prepared.gate is not None
        if not any(suffix in provider.name for suffix in ("graph", "compiled")):
            assert prepared.gate([INFER]).passed, provider.name


def test_all_variants_and_sizes_are_measured() -> None:
    measured: dict[str, set[tuple[str, int, int]]] = {}
    for case in bench.cases():
        if isinstance(case.problem, ModelProblem):
            problem = case.problem
            measured.setdefault(case.mark, set()).add((problem.network.split("-")[-1], problem.size, problem.batch))
            if case.device == "cuda" and not problem.autocast:
                assert (problem.dtype == "float32") == (case.mark == "E1-float32")
    assert measured["E1-variants"] == {(f"m{n}", 224, batch) for n in range(6) for batch in (1, 256)}
    assert measured["E1-sizes"] == {(f"m{n}", size, 128) for n in range(6) for size in (384, 512)}
    assert measured["E1-float32"] == {(f"m{n}", 224, 256) for n in range(6)}


LAYERS = {
    "attention-m0-stage3": Attention("m0", 2, batch=3, side=4, dtype="float32"),
    "ffn-m0-stage3": FeedForward("m0", 2, batch=3, side=4, dtype="float32"),
    "merging-m0-stage2": Merging("m0", 1, batch=3, side=5, dtype="float32"),
    "depthwise-m0-stage2": MergingDepthwise("m0", 1, batch=3, side=5, dtype="float32"),
    "convolution-m0-stem1": Convolution("m0", 0, batch=3, side=6, dtype="float32"),
    "convolution-m0-stem4": Convolution("m0", 3, batch=3, side=6, dtype="float32"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("provider", ["folded", pytest.param("triton", marks=pytest.mark.interpret)])
def test_layers_agree(name: str, provider: str) -> None:
    case = next(case for case in bench.cases() if case.name == f"E1-layers/{name}/batch1")
    assert replace(case.problem, batch=3, side=LAYERS[name].side, dtype="float32") == LAYERS[name]
    (one,) = (one for one in case.providers if one.name == provider)
    prepared = one.prepare(LAYERS[name], torch.device("cpu"))
    assert prepared.gate is not None
    gate = prepared.gate([FORWARD])
    assert set(gate.errors) == ({"out", "mean"} if name.startswith("depthwise") else {"out"})
    assert gate.passed, gate


@pytest.mark.parametrize("provider", ["eager", pytest.param("triton", marks=pytest.mark.interpret)])
def test_steps_of_layers_agree(provider: str) -> None:
    case = next(case for case in bench.cases() if case.name == "E2-layers/attention-training-m0-stage3/batch128")
    (one,) = (one for one in case.providers if one.name == provider)
    prepared = one.prepare(replace(case.problem, batch=3, dtype="float32"), torch.device("cpu"))
    assert prepared.gate is not None
    gate = prepared.gate([BOTH])
    assert set(gate.errors) == {"out", "dx", "dparameters"}
    assert gate.passed, gate
    assert len(prepared.steps[BOTH]()) == 2 + len(list(case.problem.build().parameters()))


def test_work_of_layers() -> None:
    # One image of 4 x 4 cells and 192 channels in 2 bytes.
    ffn, attention = (kind("m0", 2, batch=1, side=4).work(FORWARD) for kind in (FeedForward, Attention))
    assert ffn == Work(2 * (2 * 16 * 192 + 4 * 192**2), 8 * 16 * 192**2)
    weights = 4 * 48 * (16 + 16 + 48) + 192**2
    assert attention == Work(2 * (2 * 16 * 192 + weights), 2 * (16 * weights + 4 * 16 * 16 * (16 + 48)))
    # From 64 channels at 5 x 5 cells to 128 at 3 x 3, by way of 256.
    merging, depthwise = (kind("m0", 1, batch=1, side=5).work(FORWARD) for kind in (Merging, MergingDepthwise))
    maps, gate = 25 * 64 + 9 * 128, 2 * 64 * 256
    assert merging == Work(
        2 * (maps + 64 * 256 + 9 * 256 + gate + 256 * 128), 2 * (25 * 64 * 256 + gate + 9 * 256 * 128)
    )  # fmt: skip
    assert depthwise == Work(2 * 256 * (25 + 9 + 1 + 9), 0)
    # An image of 6 x 6 pixels to 8 channels.
    weights = 9 * 3 * 8
    assert Convolution("m0", 0, batch=1, side=6).work(FORWARD) == Work(
        2 * (36 * 3 + 9 * 8 + weights), 2 * 9 * weights
    )  # fmt: skip


def test_deployed_networks_agree() -> None:
    case = next(case for case in bench.cases() if case.name == "E1/m0-batch1")
    problem = replace(case.problem, dtype="float32")
    (provider,) = (provider for provider in case.providers if provider.name == "deploy")
    prepared = provider.prepare(problem, torch.device("cpu"))
    assert prepared.gate is not None
    assert prepared.gate([INFER]).passed
    (graphed,) = (provider for provider in case.providers if provider.name == "deploy-compiled-graph")
    step = graphed.prepare(problem, torch.device("cpu")).steps[INFER]
    with pytest.raises(RuntimeError, match="CUDA device"):
        step()


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(bench.Unavailable, match="timm is not installed"):
        bench.timm_classifier("m0")


def test_the_work_of_a_convolution() -> None:
    """By hand: a map of 2 x 3 x 3 x 4 numbers of two bytes, and what comes out of it."""
    dense = ConvolutionProblem("stem", 2, 4, 3, 8, 3, 2, 1)
    assert dense.work(FORWARD) == Work(2 * (72 + 64), 2 * 8 * 9 * 8 * 4)
    assert dense.work(BOTH) == Work(2 * (3 * 72 + 2 * 64), 3 * 2 * 8 * 9 * 8 * 4)
    depthwise = ConvolutionProblem("stage", 2, 4, 3, 4, 3, 1, 4)
    assert depthwise.work(BOTH) == Work(2 * (3 * 72 + 2 * 72), 0)
    image = replace(dense, is_image=True)
    assert image.work(BOTH) == Work(2 * (2 * 72 + 2 * 64), 2 * 2 * 8 * 9 * 8 * 4)


def test_convolutions_are_those_of_the_networks() -> None:
    """Each case has the weight and the map of a convolution that its network has."""
    for arch in bench.NETWORKS:
        network = EfficientViTMSRA(arch)
        layers = [layer for layer in network.modules() if isinstance(layer, TrainedConvolution) and layer.has_kernel]
        there = {(tuple(layer.weight.shape), layer.stride[0]) for layer in layers}
        problems = [case.problem for case in convolution_cases() if case.problem.place.startswith(arch)]
        measured = {((p.outputs, p.channels // p.groups, p.side, p.side), p.stride) for p in problems}
        assert measured == there


def test_a_convolution_agrees() -> None:
    case = next(case for case in convolution_cases() if case.name == "E2-convolutions/m4-stage3-query7")
    problem = replace(case.problem, batch=3)
    prepared = next(p for p in case.providers if p.name == "eager").prepare(problem, torch.device("cpu"))
    assert prepared.gate is not None
    assert prepared.gate([FORWARD, BOTH]).passed
