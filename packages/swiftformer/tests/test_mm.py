"""SwiftFormer inside MMPretrain: registration, configs, recipe, distillation, loading, metafile and card."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitreous_swiftformer.mm  # noqa: F401  (first: it repairs MMEngine)

# isort: split
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain import ImageClassificationInferencer, get_model, inference_model, list_models
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import HOOKS, MODELS, PARAM_SCHEDULERS
from mmpretrain.structures import DataSample

from vitreous_core.mm.distillation import DistilledImageClassifier
from vitreous_core.papers import papers
from vitreous_core.state import check_state, unwrap_state
from vitreous_core.testing.golden import golden_input
from vitreous_swiftformer import SwiftFormer, SwiftFormerHead
from vitreous_swiftformer.convert import from_official, to_official

Build = Callable[..., nn.Sequential]

PAPER = next(paper for paper in papers() if paper.name == "swiftformer")
ARCHS = ("xs", "s", "l1", "l3")
IMAGENET = [f"swiftformer-{arch}{kind}_16xb128_in1k" for kind in ("", "-nodist") for arch in ARCHS]
DIGITS = "swiftformer-xs_1xb64_digits"
FASHION = [f"swiftformer-xs{ablation}_1xb128_fashion-mnist" for ablation in ("", "-key-value", "-self-attention")]


def config(name: str) -> Config:
    return Config.fromfile(PAPER.configs / "swiftformer" / f"{name}.py")


def small_settings(**changes: Any) -> Any:
    settings = config(DIGITS).model
    for key, value in changes.items():
        settings[key] = settings[key] | value if isinstance(value, dict) and key in settings else value
    return settings


def small_model(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build(small_settings(**changes))


def samples(*labels: int) -> list[DataSample]:
    return [DataSample().set_gt_label(label) for label in labels]


@pytest.fixture(scope="module")
def recipe() -> Config:
    return config("swiftformer-l1_16xb128_in1k")


@pytest.fixture(scope="module")
def entries() -> list[dict[str, Any]]:
    return yaml.safe_load((PAPER.configs / "swiftformer" / "metafile.yml").read_text())["Models"]


def test_models_are_listed() -> None:
    assert set(list_models("swiftformer")) == {*IMAGENET, DIGITS, *FASHION}


@torch.no_grad()
def test_official_checkpoint_gives_the_plain_model_by_name(build: Build, tmp_path: Path) -> None:
    plain = build("xs")
    torch.save({"model": to_official(plain.state_dict()), "epoch": 299}, tmp_path / "official.pth")
    converted = from_official(unwrap_state(torch.load(tmp_path / "official.pth", weights_only=True)))
    name = "swiftformer-xs_16xb128_in1k"
    check_state(get_model(name).state_dict(), converted)
    torch.save({"state_dict": converted}, tmp_path / "ours.pth")
    images = golden_input(1, 64, 96)
    model = get_model(name, pretrained=str(tmp_path / "ours.pth"))
    assert torch.equal(model(images), plain(images))
    # As a dense backbone: the classifier still reads the last map through its trained norm.
    dense = get_model(name, pretrained=str(tmp_path / "ours.pth"), backbone={"out_indices": (0, 1, 2, 3)})
    assert len(dense.extract_feat(images, stage="backbone")) == 4
    assert torch.equal(dense(images), plain(images))


def test_inference_on_an_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    result = inference_model(get_model(DIGITS), image)
    assert result["pred_class"] in {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
    assert sum(result["pred_scores"]) == pytest.approx(1.0, abs=1e-5)
    assert len(ImageClassificationInferencer(DIGITS)([image, image])) == 2


def test_classes_are_the_plain_ones_with_init_cfg(tmp_path: Path) -> None:
    source = small_model()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth"), "prefix": "backbone."}
    # Fine-tuning to another class count with the head anew: officially it raises.
    model = small_model(backbone={"init_cfg": pretrained, "frozen_stages": 1}, head={"num_classes": 3})
    assert isinstance(model.backbone, SwiftFormer)
    assert isinstance(model.backbone, BaseBackbone)
    assert isinstance(model.head, SwiftFormerHead)
    model.init_weights()
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.backbone.state_dict().items())
    assert not model.train().backbone.network[0].training
    assert model.get_layer_depth("backbone.network.2.1.attn.w_g") == (4, 6)


@torch.no_grad()
def test_deploy_keeps_predictions() -> None:
    model = small_model(head={"distillation": True}).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
            module.running_mean.normal_()
    images = golden_input(2, 32, 32).double()
    before = model(images)
    for module in model.modules():
        if hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()
    assert (model(images) - before).abs().max() < 1e-9
    assert len(model.predict(images)) == 2


@pytest.mark.parametrize("arch", ARCHS)
def test_variants_differ_as_in_the_paper(arch: str) -> None:
    settings = config(f"swiftformer-{arch}_16xb128_in1k")
    transforms = {transform.type: transform for transform in settings.train_dataloader.dataset.pipeline}
    assert ("RandAugment" in transforms) == (arch != "xs")
    # timm jitters colours only where it does not augment otherwise.
    assert ("ColorJitter" in transforms) == (arch == "xs")
    assert transforms["RandomErasing"].erase_prob == 0.25
    augments = settings.model.get("train_cfg", {}).get("augments")
    mixing = [{"type": "Mixup", "alpha": 0.8}, {"type": "CutMix", "alpha": 1.0}]
    assert augments == (mixing if arch in ("l1", "l3") else None)
    # Building must not fetch the teacher.
    for name in (f"swiftformer-{arch}_16xb128_in1k", f"swiftformer-{arch}-nodist_16xb128_in1k"):
        model = MODELS.build(config(name).model)
        assert model.backbone.channels == SwiftFormer.arch_settings[arch]["channels"]
        assert (model.head.dist_head is None) == ("nodist" in name)
        assert (model._teacher is None) == ("nodist" in name)


def test_batch_evaluation_and_loss(recipe: Config) -> None:
    assert recipe.train_dataloader.batch_size * 16 == recipe.auto_scale_lr.base_batch_size == 2048
    assert recipe.train_dataloader.sampler.type == "RepeatAugSampler"
    assert recipe.train_dataloader.sampler.num_repeats == 3
    resize, crop = recipe.val_dataloader.dataset.pipeline[1:3]
    assert (resize.scale, resize.interpolation, crop.crop_size) == (256, "bicubic", 224)
    assert (recipe.train_cfg.max_epochs, recipe.train_cfg.val_interval) == (300, 20)
    assert recipe.model.head.loss == {"type": "LabelSmoothLoss", "label_smooth_val": 0.1, "mode": "original"}
    assert recipe.model.head.distillation == {"mode": "hard", "alpha": 0.5}
    assert recipe.model.teacher.model_name == "regnety_160.deit_in1k"
    (average,) = recipe.custom_hooks
    hook = HOOKS.build(average)
    assert (hook.evaluate_on_ema, hook.evaluate_on_origin) == (False, True)
    assert 1 - average.momentum == pytest.approx(0.99996)


def test_teacher_exists() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: the recipes' teacher comes from it")
    assert timm.is_model_pretrained("regnety_160.deit_in1k")


def test_weight_decay_and_clipping(recipe: Config) -> None:
    model = MODELS.build(recipe.model)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        wrapper = build_optim_wrapper(model, recipe.optim_wrapper)
    decays = {id(p): group["weight_decay"] for group in wrapper.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if parameter.ndim == 1 else 0.025), name
    decayed = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if decays[id(parameter)]}
    assert decayed == {"weight", "w_g", "layer_scale", "layer_scale_1", "layer_scale_2"}
    assert type(wrapper).__name__ == "AGCOptimWrapper"
    assert wrapper.clip_grad_kwargs["clip_factor"] == 0.01
    assert {group["lr"] for group in wrapper.param_groups} == {2e-3}
    assert wrapper.optimizer.defaults["betas"] == (0.9, 0.999)


def test_learning_rate_by_epoch(recipe: Config) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build(s | {"optimizer": optimizer}) for s in recipe.param_scheduler]
    for epoch in range(recipe.train_cfg.max_epochs):
        cosine = 1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2
        expected = 1e-6 + epoch * (2e-3 - 1e-6) / 5 if epoch < 5 else cosine
        # The ramp multiplies the cosine's first values, which are not quite its peak. Measured: 4e-4.
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-3), epoch
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_the_right_classifier_learns_from_the_teacher(mode: str) -> None:
    model = small_model(head={"distillation": {"mode": mode, "alpha": 0.3, "tau": 2.0}}).train()
    feats, labels = model.extract_feat(golden_input(4, 32, 32)), [1, 2, 3, 4]
    teacher = torch.randn(4, 10)
    first, second = model.head(feats)
    base = model.head.loss_module(first, torch.tensor(labels))
    if mode == "hard":
        term = nn.functional.cross_entropy(second, teacher.argmax(1))
    else:
        target, logits = (teacher / 2).softmax(1), (second / 2).log_softmax(1)
        term = 4 * (target * (target.log() - logits)).sum() / second.numel()
    loss = model.head.loss(feats, samples(*labels), teacher_logits=teacher)["loss"]
    torch.testing.assert_close(loss, 0.7 * base + 0.3 * term)


def test_the_recipe_trains_and_resumes(recipe: Config, tmp_path: Path) -> None:
    # The whole recipe on a few digits: teacher, sampler, mixing, clipping, averaging and schedule work together.
    teacher = small_model()
    torch.save({"state_dict": teacher.state_dict()}, tmp_path / "teacher.pth")
    settings, digits = copy.deepcopy(recipe), config(DIGITS)
    settings.model.backbone = digits.model.backbone
    settings.model.head |= {"num_classes": 10, "in_channels": 48}
    settings.model.teacher = digits.model
    settings.model.teacher_checkpoint = str(tmp_path / "teacher.pth")
    settings.data_preprocessor = digits.data_preprocessor
    for loader in (settings.train_dataloader, settings.val_dataloader):
        loader.dataset = digits.train_dataloader.dataset | {"indices": 16}
        loader |= {"batch_size": 8, "num_workers": 0, "persistent_workers": False}
    settings.test_dataloader = settings.val_dataloader
    settings.val_evaluator = settings.test_evaluator = digits.val_evaluator
    settings.train_cfg |= {"max_epochs": 1, "val_interval": 1}
    settings.update(work_dir=str(tmp_path), log_level="ERROR", experiment_name=f"{tmp_path.name}_first")

    runner = Runner.from_cfg(settings)
    runner.train()
    frozen = runner.model.teacher.state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in teacher.state_dict().items())
    averaged, trained = read_weights(tmp_path / "epoch_1.pth")
    assert averaged.keys() == trained.keys() == runner.model.state_dict().keys()
    assert not [name for name in averaged if "teacher" in name]
    assert all(torch.equal(value, trained[name]) for name, value in runner.model.state_dict().items())
    assert not torch.equal(averaged["head.dist_head.weight"], trained["head.dist_head.weight"])

    settings.train_cfg.max_epochs = 2
    settings.update(resume=True, experiment_name=f"{tmp_path.name}_second")
    Runner.from_cfg(settings).train()
    _, again = read_weights(tmp_path / "epoch_2.pth")
    assert not torch.equal(again["head.head.weight"], trained["head.head.weight"])


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The averaged and the trained weights: MMEngine's EMA hook saves the average as the state dict."""
    checkpoint = torch.load(path, weights_only=True)
    trained = {name.removeprefix("module."): value for name, value in checkpoint["ema_state_dict"].items()}
    del trained["steps"]
    return checkpoint["state_dict"], trained


def test_dropping_the_teacher_of_a_config() -> None:
    settings = config("swiftformer-xs_16xb128_in1k")
    settings.merge_from_dict({"model.teacher": None})
    model = MODELS.build(settings.model).train()
    assert isinstance(model, DistilledImageClassifier)
    model.backbone.norm_eval = True
    losses = model.train().loss(golden_input(2, 32, 32), samples(3, 4))
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.head.parameters())


@torch.no_grad()
def test_metafile_counts_and_files(entries: list[dict[str, Any]]) -> None:
    assert [entry["Name"] for entry in entries] == [*IMAGENET, DIGITS, *FASHION]
    for entry in entries[: -len(FASHION)]:  # the others: test_ablations.py
        settings = Config.fromfile(PAPER.root / ".mim" / entry["Config"])
        size = 32 if entry["Name"] == DIGITS else 224
        with torch.device("meta"):
            model = MODELS.build(settings.model).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size, device="meta"))
        # As the paper's table, without the weighted sum of the queries.
        uncounted, side = 0, (size + 3) // 4
        for channels in model.backbone.channels:
            uncounted += side * side * channels
            side = (side + 1) // 2
        assert entry["Metadata"]["FLOPs"] == counter.get_total_flops() // 2 - uncounted, entry["Name"]
        assert entry["Metadata"]["Parameters"] == sum(p.numel() for p in model.parameters()), entry["Name"]


def test_card_and_metafile_quote_the_same(entries: list[dict[str, Any]]) -> None:
    card = (Path(__file__).parents[1] / "README.md").read_text()
    quoted = {entry["Name"]: entry["Results"][0]["Metrics"].get("Top 1 Accuracy") for entry in entries}
    rows = dict(re.findall(r"^\| `(swiftformer-\S+)` \| ([\d.]+) \|", card, re.MULTILINE))
    assert {name: float(top1) for name, top1 in rows.items()} == {n: q for n, q in quoted.items() if q is not None}
    assert all(name in card for name in quoted)


@pytest.mark.gpu
def test_recipe_step_on_a_gpu() -> None:
    teacher = small_settings()
    settings = small_settings(type="DistilledImageClassifier", head={"distillation": True}, teacher=teacher)
    model = MODELS.build(settings).cuda().train()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses = model.loss(golden_input(4, 32, 32).cuda(), [sample.to("cuda") for sample in samples(0, 1, 2, 3)])
    losses["loss"].backward()
    assert model.teacher.head.head.weight.is_cuda
    assert all(p.grad.isfinite().all() for p in model.parameters())
