"""The benchmark's cases are whole, and its providers compute the same network."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Literal

import pytest
import torch

from vitreous_core.bench.attention import FORWARD
from vitreous_core.bench.case import Work
from vitreous_core.bench.models import INFER
from vitreous_efficientvit import bench
from vitreous_efficientvit.bench_layers import Layer


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


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("provider", ["folded", pytest.param("triton", marks=pytest.mark.interpret)])
def test_layers_agree(kind: Literal["attention", "ffn"], provider: str) -> None:
    case = next(case for case in bench.cases() if case.name == f"E1-layers/{kind}-m0-stage3/batch1")
    (one,) = (one for one in case.providers if one.name == provider)
    prepared = one.prepare(Layer(kind, "m0", 2, batch=3, side=4, dtype="float32"), torch.device("cpu"))
    assert prepared.gate is not None
    gate = prepared.gate([FORWARD])
    assert gate.passed, gate


def test_work_of_layers() -> None:
    # One image of 4 x 4 cells and 192 channels in 2 bytes.
    ffn, attention = (Layer(kind, "m0", 2, batch=1, side=4).work(FORWARD) for kind in ("ffn", "attention"))
    assert ffn == Work(2 * (2 * 16 * 192 + 4 * 192**2), 8 * 16 * 192**2)
    weights = 4 * 48 * (16 + 16 + 48) + 192**2
    assert attention == Work(2 * (2 * 16 * 192 + weights), 2 * (16 * weights + 4 * 16 * 16 * (16 + 48)))


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
