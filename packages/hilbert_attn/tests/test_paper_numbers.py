"""Parameters and multiply-adds against the published tables, and the metafiles against both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import vitreous_hilbert_attn
from vitreous_core.indexing import layout_for
from vitreous_hilbert_attn import (
    HilbertNeighborhoodTransformer,
    HilbertWindowTransformer,
    NeighborhoodAttentionTransformer,
)
from vitreous_hilbert_attn.attention import CurveAttention

MIM = Path(vitreous_hilbert_attn.__file__).parent / ".mim"
HWT, HNT, NAT = HilbertWindowTransformer, HilbertNeighborhoodTransformer, NeighborhoodAttentionTransformer


def count(model: nn.Module, side: int, classes: int = 1000, as_swin_counts: bool = False) -> tuple[int, int]:
    """Parameters and multiply-adds of a backbone with a linear head on its last map.

    Multiply-adds are those of convolutions, linear layers and visible pairs of tokens. Swin's own count, which HWT's
    figures follow, adds one per normalised value and takes every window for whole.
    """
    macs = 0

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Linear):
            macs += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            macs += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.LayerNorm):
            normed = output[1] if isinstance(output, tuple) else output
            macs += normed.numel() * as_swin_counts
        elif isinstance(module, CurveAttention):
            tokens, (height, width) = args
            pattern = module.pattern(height, width)
            rule = layout_for(pattern, "row_major", height, width, "cpu").rule
            pairs = height * width * pattern.size if as_swin_counts else rule.pairs()
            macs += 2 * pairs * tokens.shape[2]

    for module in model.modules():
        module.register_forward_hook(hook)
    with torch.no_grad():
        (features,) = model.eval()(torch.zeros(1, 3, side, side))
    head = features.shape[1] * classes
    return sum(p.numel() for p in model.parameters()) + head + classes, macs + head


@pytest.mark.parametrize(
    ("build", "side", "parameters", "gigamacs"),
    [
        pytest.param(lambda: HWT("tiny"), 224, 28_435_858, 4.49, id="hwt-tiny-224"),
        pytest.param(lambda: HWT("tiny", img_size=256, window_size=8), 256, 28_489_426, 5.93, id="hwt-tiny-256"),
        pytest.param(lambda: HWT("tiny", depths=(3, 3, 6, 3)), 224, 36_139_603, 5.58, id="hwt-constructor-default"),
    ],
)
def test_hwt_has_the_published_counts(build: Any, side: int, parameters: int, gigamacs: float) -> None:
    model = build()
    found, macs = count(model, side, as_swin_counts=True)
    assert found == parameters
    assert round(macs / 1e9, 2) == gigamacs


def test_hwt_tables_have_the_published_sizes() -> None:
    for img_size, entries in ((224, 170_826), (256, 224_394)):
        with torch.device("meta"):
            model = HWT("tiny", img_size=img_size)
        tables = [p for name, p in model.named_parameters() if name.endswith("bias_table")]
        assert sum(table.numel() for table in tables) == entries


@pytest.mark.parametrize(
    ("arch", "gigamacs", "gigamacs_of_7", "parameters", "without_bias"),
    [
        ("mini", 2.69, 2.57, 19_973_374, 19_958_824),
        ("tiny", 4.30, 4.12, 27_883_870, 27_860_008),
        ("small", 7.77, 7.52, None, None),
        ("base", 13.68, 13.34, None, None),
    ],
)
def test_hnt_has_the_published_counts(
    arch: str, gigamacs: float, gigamacs_of_7: float, parameters: int | None, without_bias: int | None
) -> None:
    found, macs = count(HNT(arch), 224)
    assert round(macs / 1e9, 2) == gigamacs
    found_without, macs_of_7 = count(HNT(arch, kernel_size=7, relative_bias=False), 224)
    assert round(macs_of_7 / 1e9, 2) == gigamacs_of_7
    if parameters is not None:
        assert (found, found_without) == (parameters, without_bias)


@pytest.mark.parametrize(
    ("arch", "parameters_m", "gigamacs"), [("mini", 20, 2.7), ("tiny", 28, 4.3), ("small", 51, 7.8), ("base", 90, 13.7)]
)
def test_nat_has_the_published_counts(arch: str, parameters_m: int, gigamacs: float) -> None:
    parameters, macs = count(NAT(arch), 224)
    assert (round(parameters / 1e6), round(macs / 1e9, 1)) == (parameters_m, gigamacs)
    # HNT-mini's published 19_958_824 without a bias, plus one table of 13 x 13 for each of 150 heads.
    if arch == "mini":
        assert parameters == 19_958_824 + 150 * 13 * 13


def entries() -> list[dict[str, Any]]:
    files = [MIM / name for name in yaml.safe_load((MIM / "model-index.yml").read_text())["Import"]]
    return [entry for file in files for entry in yaml.safe_load(file.read_text())["Models"]]


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry["Name"])
def test_metafile_states_the_counts_of_the_config(entry: dict[str, Any]) -> None:
    from mmengine.config import Config

    config = Config.fromfile(MIM / entry["Config"])
    settings = config.model.backbone.to_dict()
    model = {build.__name__: build for build in (HWT, HNT, NAT)}[settings.pop("type")](**settings)
    side = config.test_dataloader.dataset.pipeline[-2].get("crop_size") or 32
    found = count(model, side, config.model.head.num_classes)
    assert found == (entry["Metadata"]["Parameters"], entry["Metadata"]["FLOPs"])
    assert (config.model.head.in_channels + 1) * config.model.head.num_classes == found[0] - sum(
        p.numel() for p in model.parameters()
    )
