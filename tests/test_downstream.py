"""The recipe of docs/downstream.md: another project's registry builds our backbones from a classifier's checkpoint."""

from __future__ import annotations

import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from vitreous_core.papers import papers
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


# What the packaged configs inherit from the projects they are for, as far as they change or rely on it.
INHERITED = {
    "mmdet/_base_/models/retinanet_r50_fpn.py": """
        model = dict(type='RetinaNet', backbone=dict(type='ResNet', depth=50, frozen_stages=1),
                     neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, start_level=1,
                               add_extra_convs='on_input', num_outs=5),
                     bbox_head=dict(type='RetinaHead', in_channels=256,
                                    anchor_generator=dict(type='AnchorGenerator', strides=[8, 16, 32, 64, 128])))""",
    "mmdet/_base_/models/mask-rcnn_r50_fpn.py": """
        model = dict(type='MaskRCNN', backbone=dict(type='ResNet', depth=50, frozen_stages=1),
                     neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
                     rpn_head=dict(anchor_generator=dict(type='AnchorGenerator', strides=[4, 8, 16, 32, 64])))""",
    "mmdet/_base_/datasets/coco_detection.py": "train_dataloader = dict(batch_size=2, num_workers=2)",
    "mmdet/_base_/datasets/coco_instance.py": "train_dataloader = dict(batch_size=2, num_workers=2)",
    "mmdet/_base_/schedules/schedule_1x.py": """
        train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
        optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02, momentum=0.9))""",
    "mmdet/_base_/default_runtime.py": "default_scope = 'mmdet'",
    "mmseg/_base_/models/fpn_r50.py": """
        model = dict(type='EncoderDecoder', pretrained='open-mmlab://resnet50_v1c',
                     data_preprocessor=dict(type='SegDataPreProcessor', pad_val=0, seg_pad_val=255),
                     backbone=dict(type='ResNetV1c', depth=50),
                     neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=4),
                     decode_head=dict(type='FPNHead', feature_strides=[4, 8, 16, 32], num_classes=19))""",
    "mmseg/_base_/datasets/ade20k.py": "train_dataloader = dict(batch_size=4, num_workers=4)",
    "mmseg/_base_/schedules/schedule_40k.py": """
        train_cfg = dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=4000)
        param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False)]
        optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01), clip_grad=None)""",
    "mmseg/_base_/default_runtime.py": "default_scope = 'mmseg'",
}
PACKAGED = [
    pytest.param(paper, config, id=config.stem)
    for paper in papers()
    for config in sorted((paper.configs / "downstream").glob("*.py"))
]


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages `mmdet` and `mmseg` that consist of the inherited configs: the real ones need a compiler for mmcv."""
    for name, text in INHERITED.items():
        package, _, rest = name.partition("/")
        file = tmp_path / package / ".mim" / "configs" / rest
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / ".mim" / "model-index.yml").write_text("Import: []\n")
    # MMEngine looks for the distribution, which for `mmseg` has another name.
    metadata = tmp_path / "mmsegmentation-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mmsegmentation\nVersion: 1.0\n")
    (metadata / "top_level.txt").write_text("mmseg\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(("paper", "file"), PACKAGED)
@pytest.mark.usefixtures("stand_ins")
def test_packaged_config_builds_a_backbone_and_what_follows_fits_its_maps(
    paper: Any, file: Path, tmp_path: Path
) -> None:
    paper.module("mm")
    from mmengine.config import Config
    from mmengine.registry import MODELS
    from mmpretrain import get_model

    config = Config.fromfile(file)
    assert config.custom_imports["imports"] == [f"vitreous_{paper.name}.mm"]
    assert config.model.type in ("RetinaNet", "MaskRCNN", "EncoderDecoder"), "the project's own model is kept"
    assert config.optim_wrapper.optimizer.type == "AdamW"
    assert "momentum" not in config.optim_wrapper.optimizer

    # The checkpoint that the config names: any classifier's of that architecture.
    settings = config.model.backbone
    name = next(card.name for card in models() if card.name.split("_")[0].endswith(f"-{settings.arch}"))
    classifier = get_model(name)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / settings.init_cfg.checkpoint)
    settings.init_cfg.checkpoint = str(tmp_path / settings.init_cfg.checkpoint)
    backbone = MODELS.build(settings)
    with warnings.catch_warnings(record=True):  # tables of another window size are resized, and say so
        warnings.simplefilter("always")
        backbone.init_weights()
    loaded = backbone.state_dict()
    same = [torch.equal(loaded[key], value) for key, value in classifier.backbone.state_dict().items() if key in loaded
            and loaded[key].shape == value.shape]  # fmt: skip
    assert all(same)
    # But the norms of the outputs that a classifier has not, and tables of other windows.
    assert len(same) >= 0.9 * len(loaded)

    necks = config.model.neck if isinstance(config.model.neck, list) else [config.model.neck]
    maps = backbone.eval()(torch.zeros(1, 3, 128, 192))
    for neck in necks[:-1]:
        maps = MODELS.build(neck)(maps)
    assert [one.shape[1] for one in maps] == necks[-1].in_channels
    anchors = config.model.get("bbox_head", config.model.get("rpn_head", {})).get("anchor_generator")
    strides = anchors.strides if anchors else config.model.decode_head.feature_strides
    assert [128 // one.shape[2] for one in maps] == strides[: len(maps)]


def test_page_names_each_packaged_config() -> None:
    page = (ROOT / "docs" / "downstream.md").read_text()
    for param in PACKAGED:
        assert param.values[1].name in page
