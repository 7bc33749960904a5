"""Folding for inference is exact: for the maps, the logits, every dtype, and on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitreous_core.testing.golden import golden_input

Build = Callable[..., nn.Sequential]


@torch.no_grad()
def test_every_map_and_the_logits_stay_in_fp64(build: Build) -> None:
    model = build("xs", out_indices=(0, 1, 2, 3)).double()
    images = golden_input(2, 64, 96).double()
    maps, logits = model.backbone(images), model(images)
    parameters = sum(p.numel() for p in model.parameters())
    model.backbone.switch_to_deploy()
    model.head.switch_to_deploy()
    # Measured: 1e-13 for maps of size 20 and 6e-15 for the logits.
    for before, after in zip(maps, model.backbone(images), strict=True):
        assert (after - before).abs().max() < 1e-9
    assert (model(images) - logits).abs().max() < 1e-9
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    assert norms == [f"backbone.norm{i}" for i in (0, 2, 4, 6)]
    assert not [name for name in model.state_dict() if "layer_scale" in name or "dist_head" in name]
    assert sum(p.numel() for p in model.parameters()) < parameters


@torch.no_grad()
def test_the_head_takes_over_the_last_norm(build: Build) -> None:
    model = build("xs").double()
    images = golden_input(2, 64, 96).double()
    logits = model(images)
    (expected,) = model.backbone(images)
    norm = copy.deepcopy(model.backbone.norm)
    model.head.switch_to_deploy(model.backbone)
    assert (model(images) - logits).abs().max() < 1e-9
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert (norm(model.backbone(images)[0]) - expected).abs().max() < 1e-9


@torch.no_grad()
def test_a_second_switch_changes_nothing(build: Build, tiny: dict[str, Any]) -> None:
    model = build(tiny)
    for switch in (
        model.backbone.switch_to_deploy,
        model.head.switch_to_deploy,
        lambda: model.head.switch_to_deploy(model.backbone),
    ):
        switch()
        before = copy.deepcopy(model.state_dict())
        switch()
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtype_and_accuracy_stay(build: Build, dtype: torch.dtype) -> None:
    model = build("xs")
    images = golden_input(2, 64, 64)
    exact = copy.deepcopy(model).double()(images.double())
    model.to(dtype)
    before = (model(images.to(dtype)) - exact).abs().max()
    model.head.switch_to_deploy(model.backbone)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    after = (model(images.to(dtype)) - exact).abs().max()
    # Measured: 0.8 to 1.02 of the error before.
    assert after < 2 * before


def test_deployed_models_are_for_inference(build: Build, tiny: dict[str, Any]) -> None:
    model = build(tiny)
    model.train()
    for switch in (
        model.backbone.switch_to_deploy,
        model.head.switch_to_deploy,
        lambda: model.head.switch_to_deploy(model.backbone),
    ):
        with pytest.raises(RuntimeError, match="needs evaluation mode"):
            switch()
    model.eval()
    with pytest.raises(ValueError, match="head's 16 channels; its last output has 12"):
        model.head.switch_to_deploy(build(tiny, out_indices=1).backbone)
    model.head.switch_to_deploy(model.backbone)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    for part in (model.backbone, model.head):
        with pytest.raises(RuntimeError, match="cannot train"):
            part.train()
    assert model.eval()(golden_input(1, 16, 16)).shape == (1, 1000)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu(build: Build, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions round to it by default
    model = build("xs")
    images = golden_input(2, 224, 224)
    exact = copy.deepcopy(model).double()(images.double())
    model.to("cuda", dtype, memory_format=torch.channels_last)
    images = images.to("cuda", dtype, memory_format=torch.channels_last)
    before = (model(images).cpu() - exact).abs().max()
    model.head.switch_to_deploy(model.backbone)
    assert {(tensor.dtype, tensor.device.type) for tensor in model.state_dict().values()} == {(dtype, "cuda")}
    after = (model(images).cpu() - exact).abs().max()
    limit = {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype, 2 * before)
    assert after < limit
