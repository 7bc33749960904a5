"""The recipe of docs/downstream.md: another project's registry builds our backbones from a classifier's checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vitreous_core.zoo import models

ROOT = Path(__file__).parents[1]
DIGITS = [card for card in models() if card.is_digits]


@pytest.fixture(params=DIGITS, ids=lambda card: card.name)
def card(request: pytest.FixtureRequest) -> Any:
    request.param.paper.module("mm")
    return request.param


def test_backbone_is_built_from_the_root_scope_with_a_classifiers_weights(card: Any, tmp_path: Path) -> None:
    from mmengine.config import Config
    from mmengine.registry import MODELS
    from mmpretrain.registry import MODELS as CLASSIFIERS

    config = Config.fromfile(card.config).model
    classifier = CLASSIFIERS.build(config)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "classifier.pth")

    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "classifier.pth"), "prefix": "backbone."}
    named = config.backbone | {"type": f"mmpretrain.{config.backbone.type}", "init_cfg": pretrained}
    backbone = MODELS.build(named)
    backbone.init_weights()
    loaded = backbone.state_dict()
    for name, tensor in classifier.backbone.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_page_names_each_registered_backbone() -> None:
    from mmengine.config import Config

    page = (ROOT / "docs" / "downstream.md").read_text()
    used = {Config.fromfile(card.config).model.backbone.type for card in models()}
    assert used <= set(re.findall(r"`(\w+)`", page))
