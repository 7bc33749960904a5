"""Exported networks as providers of a benchmark."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

from vitreous_core.bench.case import Unavailable
from vitreous_core.bench.models import INFER, ModelProblem, model_provider
from vitreous_core.bench.runtimes import folded, runtime_provider

CPU = torch.device("cpu")


class Backbone(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.deploy = False

    def switch_to_deploy(self) -> None:
        self.deploy = True


def build() -> nn.Module:
    parts = {"backbone": Backbone(), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(4, 1000)}
    return nn.Sequential(OrderedDict(parts))


PROBLEM = ModelProblem("tiny", build, batch=3, size=8, dtype="float32", autocast=False)


def test_a_runtime_takes_part_and_is_judged() -> None:
    prepared = runtime_provider("pt2", build, "pt2").prepare(PROBLEM, CPU)
    assert prepared.steps[INFER]().shape == (3, 1000)
    assert prepared.gate is not None
    gate = prepared.gate([INFER])
    assert gate.passed
    assert prepared.facts["format"] == "pt2"
    assert prepared.facts["file_mb"] > 0

    def forget(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
        module.eval()

    wrong = runtime_provider("pt2", build, "pt2", adopt=forget).prepare(PROBLEM, CPU)
    assert wrong.gate is not None
    assert not wrong.gate([INFER]).passed


def test_pytorch_in_deploy_mode() -> None:
    made = []
    provider = model_provider("deploy", lambda: made.append(build()) or made[0], adopt=folded)
    prepared = provider.prepare(PROBLEM, CPU)
    assert prepared.gate is not None
    assert prepared.gate([INFER]).passed
    assert made[0].backbone.deploy


def test_one_image() -> None:
    problem = ModelProblem("tiny", build, batch=1, size=8, dtype="float32", autocast=False)
    prepared = model_provider("eager", build).prepare(problem, CPU)
    assert prepared.gate is not None
    assert prepared.gate([INFER]).passed


def test_a_missing_runtime_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"install vitreous-core\[onnx\]"):
        runtime_provider("onnxruntime", build, "onnx").prepare(PROBLEM, CPU)


def test_refusals_of_a_library_pass_through() -> None:
    def refuse() -> nn.Module:
        raise Unavailable("timm is not installed")

    with pytest.raises(Unavailable, match="timm"):
        runtime_provider("onnxruntime-timm", partial(refuse), "pt2").prepare(PROBLEM, CPU)
