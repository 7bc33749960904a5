"""MMPretrain's side: registration, models by name, pretrained loading, recipes, one training step, inference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmpretrain import ImageClassificationInferencer, get_model, inference_model, list_models
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn

import vitreous_hilbert_attn.mm
from vitreous_core.mm import register_paper
from vitreous_hilbert_attn import HilbertWindowTransformer
from vitreous_hilbert_attn.convert import from_official, to_official

CONFIGS = Path(vitreous_hilbert_attn.__file__).parent / ".mim" / "configs"
DIGITS = ["hwt-tiny_1xb64_digits", "hnt-mini_1xb64_digits", "nat2d-mini_1xb64_digits"]
IMAGENET = [
    "hwt-tiny_8xb128_in1k", "hwt-tiny-w8_8xb128_in1k-256px", "hnt-mini_8xb128_in1k", "hnt-tiny_8xb128_in1k",
    "hnt-small_8xb128_in1k", "hnt-base_8xb128_in1k", "nat2d-mini_8xb128_in1k", "nat2d-tiny_8xb128_in1k",
    "nat2d-small_8xb128_in1k", "nat2d-base_8xb128_in1k",
]  # fmt: skip


def config_of(name: str) -> Config:
    return Config.fromfile(CONFIGS / name.split("-")[0] / f"{name}.py")


@pytest.fixture(scope="module")
def digits_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: get_model(name) for name in DIGITS}


def test_models_are_listed_by_name_and_registering_again_is_harmless() -> None:
    register_paper("hilbert_attn")
    listed = {name for family in ("hwt", "hnt", "nat2d") for name in list_models(f"{family}-*")}
    assert listed == {*DIGITS, *IMAGENET}


def test_backbones_are_base_backbones_with_the_plain_arguments(digits_models: dict[str, nn.Module]) -> None:
    for model in digits_models.values():
        assert isinstance(model.backbone, BaseBackbone)
        assert type(model.backbone) is MODELS.get(type(model.backbone).__name__.removeprefix("MM"))
    settings = {"arch": {"embed_dims": 8, "depths": [1], "num_heads": [2]}, "img_size": (32, 16), "out_indices": [0]}
    adapted = MODELS.build({"type": "HilbertWindowTransformer"} | settings)
    plain = HilbertWindowTransformer(**settings)
    assert list(adapted.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(adapted.state_dict())
    images = torch.randn(1, 3, 20, 36)
    torch.testing.assert_close(adapted(images)[0], plain(images)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", DIGITS)
def test_a_converted_checkpoint_loads_by_name_and_by_init_cfg(
    name: str, digits_models: dict[str, nn.Module], tmp_path: Path
) -> None:
    model = digits_models[name]
    state = from_official(to_official(model.state_dict()))
    torch.save({"state_dict": state}, tmp_path / "converted.pth")

    loaded = get_model(name, pretrained=str(tmp_path / "converted.pth"))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)

    backbone = config_of(name).model.backbone
    backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "converted.pth"), "prefix": "backbone."}
    backbone = MODELS.build(backbone)
    backbone.init_weights()
    for key, value in model.backbone.state_dict().items():
        torch.testing.assert_close(backbone.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", DIGITS)
def test_one_training_step_reaches_every_parameter(name: str) -> None:
    model = MODELS.build(config_of(name).model).train()
    model.init_weights()
    wrapper = build_optim_wrapper(model, config_of(name).optim_wrapper)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    samples = [DataSample().set_gt_label(label) for label in range(8)]
    losses = model(torch.randn(8, 3, 32, 32), samples, mode="loss")
    wrapper.update_params(losses["loss"])
    assert losses["loss"].isfinite()
    still = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    # A bias table's entries for one token alone, and the queries and keys there, have no effect on a softmax of one.
    single = [key for key in still if ".3.blocks." not in key]
    assert single == []


@pytest.mark.parametrize("name", DIGITS)
def test_inference_by_name(name: str, digits_models: dict[str, nn.Module]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    result = inference_model(digits_models[name], image)
    assert result["pred_class"] in digits_models[name]._dataset_meta["classes"]
    assert sum(result["pred_scores"]) == pytest.approx(1, abs=1e-5)
    (again,) = ImageClassificationInferencer(digits_models[name])(image)
    assert again["pred_label"] == result["pred_label"]


def test_recipes_are_those_of_swin_and_nat() -> None:
    rates = {"hwt": 0.1, "mini": 0.2, "tiny": 0.2, "small": 0.3, "base": 0.5}
    for name in IMAGENET:
        config = config_of(name)
        optimizer = config.optim_wrapper.optimizer
        assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-3, 0.05)
        assert config.optim_wrapper.clip_grad.max_norm == 5.0
        assert config.auto_scale_lr.base_batch_size == 8 * config.train_dataloader.batch_size == 1024
        warm_up, cosine = config.param_scheduler
        assert (warm_up.end, cosine.begin, cosine.end, cosine.eta_min) == (20, 20, 300, 5e-6)
        assert config.train_cfg.max_epochs == (300 if name.startswith("hwt") else 310)
        assert config.model.backbone.drop_path_rate == next(r for key, r in rates.items() if key in name)
        assert [augment.type for augment in config.model.train_cfg.augments] == ["Mixup", "CutMix"]


def test_bias_tables_and_norms_are_not_decayed() -> None:
    for name, table in (
        ("hwt-tiny_8xb128_in1k", "relative_position_bias_table"),
        ("hnt-mini_8xb128_in1k", "rpb"),
        ("nat2d-mini_8xb128_in1k", "rpb"),
    ):
        config = config_of(name)
        with torch.device("meta"):
            model = MODELS.build(config.model)
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
        decay = {id(group["params"][0]): group["weight_decay"] for group in wrapper.optimizer.param_groups}
        for key, parameter in model.named_parameters():
            free = parameter.ndim == 1 or key.endswith(table)
            assert decay[id(parameter)] == (0 if free else 0.05), key


def test_the_larger_model_sees_larger_crops() -> None:
    for name, resize, crop in (("hwt-tiny_8xb128_in1k", 256, 224), ("hwt-tiny-w8_8xb128_in1k-256px", 292, 256)):
        config = config_of(name)
        assert config.model.backbone.img_size == crop
        assert config.train_dataloader.dataset.pipeline[1].scale == crop
        for loader in (config.val_dataloader, config.test_dataloader):
            assert [loader.dataset.pipeline[1].scale, loader.dataset.pipeline[2].crop_size] == [resize, crop]


@pytest.mark.parametrize("name", DIGITS)
def test_mmengine_counts_the_operations(name: str, digits_models: dict[str, nn.Module]) -> None:
    """Its counter traces the model, under which sizes are tensors unless the model makes integers of them."""
    counted = get_model_complexity_info(digits_models[name], (3, 32, 32), show_table=False, show_arch=False)
    assert counted["params"] == sum(p.numel() for p in digits_models[name].parameters())
    assert counted["flops"] > 0
