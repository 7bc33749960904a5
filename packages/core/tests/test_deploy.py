"""The rules of deploy mode, on parts that are as small as can be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitreous_core.deploy import check_evaluating, check_trainable, seal, switch_to_deploy


def test_modes() -> None:
    module = nn.Identity()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        check_evaluating(module)
    check_evaluating(module.eval())
    check_trainable(deploy=False, mode=True)
    check_trainable(deploy=True, mode=False)
    with pytest.raises(RuntimeError, match="cannot train"):
        check_trainable(deploy=True, mode=True)


def test_a_sealed_part_takes_its_own_state_only() -> None:
    part = nn.Sequential(nn.Linear(2, 2))
    whole = nn.ModuleDict({"part": part, "other": nn.Linear(2, 2)})
    seal(part)
    assert not part.training
    assert not any(p.requires_grad for p in part.parameters())
    assert all(p.requires_grad for p in whole["other"].parameters())
    for module in (whole, copy.deepcopy(whole)):
        module.load_state_dict(module.state_dict())
        module.load_state_dict({"part.0.bias": torch.zeros(2)}, strict=False)
        with pytest.raises(RuntimeError, match=r"got 1\.running_mean, among 1 that it has no more"):
            module.load_state_dict({"part.1.running_mean": torch.zeros(2), "elsewhere": 0}, strict=False)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def switch_to_deploy(self, *arguments: object) -> None:
        self.calls.append(arguments)


def test_a_classifier_switches_its_backbone_through_its_head() -> None:
    model = nn.Module()
    assert not switch_to_deploy(model)
    model.backbone, model.head = Part(), nn.Identity()
    assert switch_to_deploy(model)
    assert model.backbone.calls == [()]
    model.head = Part()
    assert switch_to_deploy(model)
    assert model.backbone.calls == [()]
    assert model.head.calls == [(model.backbone,)]
    model.backbone = nn.Identity()
    assert not switch_to_deploy(model)
