"""Folding for inference is exact: for the maps, the logits, every dtype, and on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitreous_core.deploy import switch_to_deploy
from vitreous_core.testing.golden import golden_input
from vitreous_swiftformer import EfficientAdditiveAttention, SwiftFormer
from vitreous_swiftformer.halving import HalvingConv2d

Build = Callable[..., nn.Sequential]


@pytest.mark.parametrize("distillation", [False, True])
@pytest.mark.parametrize("arch", sorted(SwiftFormer.arch_settings))
@torch.no_grad()
def test_every_map_and_the_logits_stay_in_fp64(build: Build, arch: str, distillation: bool) -> None:
    model = build(arch, distillation, out_indices=(0, 1, 2, 3)).double()
    images = golden_input(2, 65, 34).double()
    maps, logits = model.backbone(images), model(images)
    parameters = sum(p.numel() for p in model.parameters())
    model.backbone.switch_to_deploy()
    model.head.switch_to_deploy()
    # Measured over all eight: 4e-14 for maps of size 15, 2e-14 for the logits.
    for before, after in zip(maps, model.backbone(images), strict=True):
        assert (after - before).abs().max() < 1e-9
    assert (model(images) - logits).abs().max() < 1e-9
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    assert norms == [f"backbone.norm{i}" for i in (0, 2, 4, 6)]
    assert not [name for name in model.state_dict() if "layer_scale" in name or "dist_head" in name]
    assert not [name for name in model.state_dict() if name.endswith("dwconv.bias")]
    assert not [module for module in model.modules() if isinstance(module, EfficientAdditiveAttention)]
    assert sum(p.numel() for p in model.parameters()) < parameters


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 65), (5, 7), (1, 1)])
@torch.no_grad()
def test_the_head_takes_over_the_last_norm(build: Build, height: int, width: int) -> None:
    model = build("xs").double()
    images = golden_input(2, height, width).double()
    logits = model(images)
    (expected,) = model.backbone(images)
    norm = copy.deepcopy(model.backbone.norm)
    assert switch_to_deploy(model)
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


@torch.no_grad()
def test_attention_alone() -> None:
    torch.manual_seed(0)
    attention = EfficientAdditiveAttention(6).double()
    scale = torch.randn(6, 1, 1, dtype=torch.float64)
    folded = attention.folded(scale)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    tokens = attention(x.flatten(2).mT).mT
    torch.testing.assert_close(folded(x), scale * tokens.reshape(x.shape), rtol=1e-12, atol=1e-12)
    assert folded(x[:0]).shape == (0, 6, 4, 5)
    # Lengths below the floor: the scale that is folded into w_g must meet the same floor.
    attention.w_g.mul_(1e-13)
    floored = attention(x.flatten(2).mT).mT
    assert not torch.allclose(floored, tokens, rtol=1e-3, atol=0)
    torch.testing.assert_close(attention.folded(scale)(x), scale * floored.reshape(x.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtype_and_accuracy_stay(build: Build, dtype: torch.dtype) -> None:
    model = build("xs")
    images = golden_input(2, 65, 97)
    exact = copy.deepcopy(model).double()(images.double())

    def error(model: nn.Module) -> float:
        return (model(images.to(dtype)).double() - exact).norm().item()

    first_folded = copy.deepcopy(model)
    switch_to_deploy(first_folded)
    plain = error(model.to(dtype))
    switch_to_deploy(model)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    # Measured over all architectures: 0.87 to 1.13 of the error before.
    assert error(model) < 1.6 * plain
    # Folding before rounding is better: 0.72 to 0.97 in 16 bits, 0.94 to 1.07 in fp32.
    assert error(first_folded.to(dtype)) < 1.25 * plain


@torch.no_grad()
def test_channels_last_stays(build: Build, tiny: dict[str, Any]) -> None:
    model = build(tiny, out_indices=(0, 1, 2))
    images = golden_input(2, 33, 48)
    model.backbone.switch_to_deploy()
    expected = model.backbone(images)
    model.to(memory_format=torch.channels_last)
    maps = model.backbone(images.to(memory_format=torch.channels_last))
    for one, other in zip(maps, expected, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    late = build(tiny).to(memory_format=torch.channels_last)
    late.backbone.switch_to_deploy()
    strided = [module.weight for module in late.modules() if isinstance(module, HalvingConv2d)]
    assert len(strided) == 4
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in strided)


@torch.no_grad()
def test_only_the_state_of_a_deployed_model_loads(build: Build, tiny: dict[str, Any]) -> None:
    images = golden_input(1, 32, 32)
    model, other = build(tiny), build(tiny)
    trained = copy.deepcopy(model.state_dict())
    for part in (model, other):
        switch_to_deploy(part)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images), other(images))
    with pytest.raises(RuntimeError, match="takes the state of a switched one only"):
        other.load_state_dict(trained, strict=False)


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
