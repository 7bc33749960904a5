"""Folding for inference is exact for every architecture, size, dtype and memory format, and cannot be misused."""

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
from vitreous_efficientvit import CascadedGroupAttention, EfficientViTMSRA, EfficientViTMSRAHead
from vitreous_efficientvit.attention import FoldedCascadedGroupAttention
from vitreous_efficientvit.model import Residual

Build = Callable[..., nn.Sequential]


def randomize(norms: nn.Module) -> None:
    for norm in norms.modules():
        if isinstance(norm, _BatchNorm):
            for tensor in (norm.running_var, norm.weight):
                nn.init.uniform_(tensor, 0.5, 2.0)
            for tensor in (norm.running_mean, norm.bias):
                nn.init.normal_(tensor)


@pytest.mark.parametrize("distillation", [False, True])
@pytest.mark.parametrize("arch", sorted(EfficientViTMSRA.arch_settings))
@torch.no_grad()
def test_every_map_and_the_logits_stay_in_fp64(build: Build, arch: str, distillation: bool) -> None:
    model = build(arch, distillation, out_indices=(0, 1, 2)).double()
    parameters = sum(p.numel() for p in model.parameters())
    # Maps of 7 x 11, 4 x 6 and 2 x 3: odd sides, padded windows and maps below the window.
    images = golden_input(2, 112, 176).double()
    maps, logits = model.backbone(images), model(images)
    assert switch_to_deploy(model)
    # Measured over all twelve: 2e-14 for maps of size 5, 6e-15 for the logits.
    for before, after in zip(maps, model.backbone(images), strict=True):
        assert (after - before).abs().max() < 1e-9
    assert (model(images) - logits).abs().max() < 1e-9
    assert sum(p.numel() for p in model.parameters()) < parameters
    assert not [module for module in model.modules() if isinstance(module, _BatchNorm | CascadedGroupAttention)]
    residuals = [module for module in model.modules() if isinstance(module, Residual)]
    assert not [residual for residual in residuals if isinstance(residual.m, nn.Conv2d)]
    assert {type(module) for module in model.head.children()} == {nn.Linear}


@pytest.mark.parametrize(
    ("img_size", "size"), [(96, (16, 16)), (96, (48, 16)), (96, (80, 112)), ((64, 192), (64, 192))]
)
@torch.no_grad()
def test_any_size(build: Build, tiny: dict[str, Any], img_size: Any, size: tuple[int, int]) -> None:
    model = build(tiny, True, num_classes=10, img_size=img_size).double()
    images = golden_input(3, *size).double()
    before = model(images)
    switch_to_deploy(model)
    assert (model(images) - before).abs().max() < 1e-9


@pytest.mark.parametrize("key_dim", [1, 5, 16])
@torch.no_grad()
def test_attention_alone(key_dim: int) -> None:
    attention = CascadedGroupAttention(12, 3, 4, (5, 3, 1), key_dim)
    randomize(attention)
    nn.init.normal_(attention.attention_biases)
    attention.double().eval()
    windows = torch.randn(5, 12, 4, 4, dtype=torch.float64)
    folded = attention.folded()
    torch.testing.assert_close(folded(windows), attention(windows), rtol=1e-12, atol=1e-12)
    assert folded(windows[:0]).shape == (0, 12, 4, 4)
    with pytest.raises(ValueError, match=r"windows must be \[B\*W, 12, 4, 4\]; got \(5, 12, 4, 3\)"):
        folded(windows[..., :3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_dtype_and_accuracy_stay(build: Build, dtype: torch.dtype) -> None:
    model, images = build("m0", True), golden_input(2, 112, 176)
    exact = copy.deepcopy(model).double()(images.double())

    def error(model: nn.Module) -> float:
        return (model(images.to(dtype)).double() - exact).norm().item()

    first_folded = copy.deepcopy(model)
    switch_to_deploy(first_folded)
    plain = error(model.to(dtype))
    switch_to_deploy(model)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    # Measured over all architectures: 0.95 to 1.26 of the error before.
    assert error(model) < 1.6 * plain
    # Folding before rounding is better: 0.77 to 0.95 in 16 bits, 0.96 to 1.16 in fp32.
    assert error(first_folded.to(dtype)) < 1.25 * plain


@torch.no_grad()
def test_channels_last_stays(build: Build, tiny: dict[str, Any]) -> None:
    model = build(tiny, num_classes=10, img_size=96, out_indices=(0, 1, 2))
    images = golden_input(2, 96, 112)
    switch_to_deploy(model)
    expected = model.backbone(images)
    model.to(memory_format=torch.channels_last)
    maps = model.backbone(images.to(memory_format=torch.channels_last))
    for one, other in zip(maps, expected, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_two_heads_become_their_mean() -> None:
    head = EfficientViTMSRAHead(5, 8, distillation=True).double().eval()
    randomize(head)
    feats = (torch.randn(4, 8, 3, 3, dtype=torch.float64),)
    before = head(feats)
    head.switch_to_deploy()
    torch.testing.assert_close(head(feats), before, rtol=0, atol=1e-14)
    assert sum(p.numel() for p in head.parameters()) == 8 * 5 + 5


def test_twice_is_once(build: Build, tiny: dict[str, Any]) -> None:
    model = build(tiny, num_classes=10)
    switch_to_deploy(model)
    modules = list(model.modules())
    model.backbone.switch_to_deploy()
    model.head.switch_to_deploy()
    switch_to_deploy(model)
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))


def test_has_no_training_mode_and_no_gradients(tiny: dict[str, Any]) -> None:
    for module in (EfficientViTMSRA(tiny), EfficientViTMSRAHead(10, 8)):
        with pytest.raises(RuntimeError, match="call eval"):
            module.switch_to_deploy()
        module.eval().switch_to_deploy()
        with pytest.raises(RuntimeError, match="cannot train"):
            module.train()
        assert module.eval() is module
        assert not any(p.requires_grad for p in module.parameters())
        assert not any(part.training for part in module.modules())


@torch.no_grad()
def test_only_the_state_of_a_deployed_model_loads(build: Build, tiny: dict[str, Any]) -> None:
    images = golden_input(1, 96, 96)
    model = build(tiny, num_classes=10, img_size=96)
    trained = copy.deepcopy(model.state_dict())
    switch_to_deploy(model)
    other = build(tiny, num_classes=10, img_size=96, golden=False)
    switch_to_deploy(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images), other(images))
    assert type(other.backbone.blocks1[0].mixer.m.attn) is FoldedCascadedGroupAttention
    with pytest.raises(RuntimeError, match="takes the state of a switched one only"):
        other.load_state_dict(trained, strict=False)
