"""EfficientViT inside MMPretrain: registration, configs, recipe, training, distillation, loading."""

import copy
import math

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain import ImageClassificationInferencer, get_model, inference_model, list_models
from mmpretrain.registry import HOOKS, MODELS, PARAM_SCHEDULERS
from mmpretrain.structures import DataSample
from torch import nn

import vitreous_efficientvit.mm  # noqa: F401
from vitreous_core.papers import papers
from vitreous_core.testing.golden import golden_input
from vitreous_efficientvit import EfficientViTMSRA, EfficientViTMSRAHead

CONFIGS = next(paper for paper in papers() if paper.name == "efficientvit").configs / "efficientvit"
IMAGENET = [f"efficientvit-msra-m{i}_8xb256_in1k" for i in range(6)]
DIGITS = "efficientvit-msra-m0_1xb64_digits"
ABLATIONS = ("", "-no-sandwich", "-two-ffns", "-no-cascade", "-no-split", "-uniform-qkv", "-ffn-ratio-4")
FASHION = [f"efficientvit-msra-m0{ablation}_1xb128_fashion-mnist" for ablation in ABLATIONS]


def config(name):
    return Config.fromfile(CONFIGS / f"{name}.py")


def small_model(distillation=False, **backbone):
    settings = config(DIGITS).model
    settings.backbone |= {"img_size": 64, **backbone}
    settings.head.distillation = distillation
    torch.manual_seed(0)
    return MODELS.build(settings)


def samples(*labels):
    return [DataSample().set_gt_label(label) for label in labels]


@pytest.fixture(scope="module")
def recipe():
    return config("efficientvit-msra-m5_8xb256_in1k")


class TestNames:
    def test_listed(self):
        assert set(list_models("efficientvit-msra*")) == {*IMAGENET, DIGITS, *FASHION}

    def test_by_name(self, build):
        model = get_model("efficientvit-msra-m0_8xb256_in1k").eval()
        plain = build("m0")
        model.load_state_dict(plain.state_dict())
        with torch.no_grad():
            assert torch.equal(model(golden_input(1, 224, 224)), plain(golden_input(1, 224, 224)))

    def test_with_other_stages_and_classes(self):
        model = get_model(DIGITS, backbone={"out_indices": (0, 1, 2)}, head={"num_classes": 3}).eval()
        maps = model.extract_feat(torch.zeros(1, 3, 112, 112), stage="backbone")
        assert [tuple(m.shape) for m in maps] == [(1, 32, 7, 7), (1, 48, 4, 4), (1, 64, 2, 2)]
        assert model.extract_feat(torch.zeros(1, 3, 112, 112), stage="pre_logits").shape == (1, 64)
        assert model(torch.zeros(1, 3, 112, 112)).shape == (1, 3)

    def test_inference_on_an_image(self):
        image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        result = inference_model(get_model(DIGITS), image)
        assert result["pred_class"] in {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
        assert math.isclose(sum(result["pred_scores"]), 1.0, rel_tol=1e-5)
        assert len(ImageClassificationInferencer(DIGITS)([image, image])) == 2


class TestRecipe:
    """The lines of the official script, section 6 of the notes, as MMEngine resolves them."""

    def test_learning_rate_by_epoch(self, recipe):
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=recipe.optim_wrapper.optimizer.lr)
        schedulers = [PARAM_SCHEDULERS.build(s | {"optimizer": optimizer}) for s in recipe.param_scheduler]
        for epoch in range(recipe.train_cfg.max_epochs):
            cosine = 1e-5 + (4e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2
            expected = 1e-6 + epoch * (4e-3 - 1e-6) / 5 if epoch < 5 else cosine
            # The ramp multiplies the cosine's first values, which are not quite its peak.
            assert math.isclose(optimizer.param_groups[0]["lr"], expected, rel_tol=1e-3), epoch
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()

    def test_weight_decay_and_clipping(self, recipe):
        model = MODELS.build(recipe.model)
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            wrapper = build_optim_wrapper(model, recipe.optim_wrapper)
        decays = {id(p): group["weight_decay"] for group in wrapper.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            spared = parameter.ndim == 1 or name.endswith("attention_biases")
            assert decays[id(parameter)] == (0.0 if spared else 0.025), name
        assert type(wrapper).__name__ == "AGCOptimWrapper"
        assert recipe.optim_wrapper.clip_grad == {"type": "agc", "clip_factor": 0.02}
        assert isinstance(wrapper.optimizer, torch.optim.AdamW)
        assert wrapper.optimizer.defaults["betas"] == (0.9, 0.999)

    def test_batch(self, recipe):
        assert recipe.train_dataloader.batch_size * 8 == recipe.auto_scale_lr.base_batch_size == 2048
        assert recipe.train_dataloader.sampler == {"type": "RepeatAugSampler"}
        assert recipe.model.train_cfg.augments == [{"type": "Mixup", "alpha": 0.8}, {"type": "CutMix", "alpha": 1.0}]
        assert recipe.model.head.loss == {"type": "LabelSmoothLoss", "label_smooth_val": 0.1, "mode": "original"}
        transforms = {transform.type: transform for transform in recipe.train_dataloader.dataset.pipeline}
        assert transforms["RandomErasing"].erase_prob == 0.25
        assert (transforms["RandAugment"].magnitude_level, transforms["RandAugment"].magnitude_std) == (9, 0.5)

    def test_average_is_kept_beside(self, recipe):
        (settings,) = recipe.custom_hooks
        hook = HOOKS.build(settings)
        assert hook.evaluate_on_origin
        assert not hook.evaluate_on_ema
        assert math.isclose(1 - settings.momentum, 0.99996)

    def test_runs_from_end_to_end(self, recipe, tmp_path):
        # The whole recipe on a few digits: sampler, mixing, clipping, averaging and schedule work together.
        settings, digits = copy.deepcopy(recipe), config(DIGITS)
        settings.model.backbone = digits.model.backbone | {"img_size": 64}
        settings.model.head |= {"num_classes": 10, "in_channels": 64}
        settings.data_preprocessor = digits.data_preprocessor
        for loader in (settings.train_dataloader, settings.val_dataloader):
            source = digits.train_dataloader.dataset | {"indices": 16}
            source.pipeline[-2].scale = 64
            loader.dataset = source
            loader |= {"batch_size": 8, "num_workers": 0, "persistent_workers": False}
        settings.test_dataloader = settings.val_dataloader
        settings.train_cfg.max_epochs = 1
        settings.val_evaluator = settings.test_evaluator = digits.val_evaluator
        settings.update(work_dir=str(tmp_path), log_level="ERROR", experiment_name=tmp_path.name)
        runner = Runner.from_cfg(settings)
        assert len(runner.train_dataloader) == 2
        runner.train()
        checkpoint = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
        averaged, trained = checkpoint["state_dict"], checkpoint["ema_state_dict"]
        trained = {name.removeprefix("module."): value for name, value in trained.items() if name != "steps"}
        assert trained.keys() == averaged.keys()
        moved = [name for name in averaged if not torch.equal(averaged[name], trained[name])]
        assert "head.classifier.l.weight" in moved
        live = runner.model.state_dict()
        assert all(torch.equal(live[name], trained[name]) for name in trained)

    @pytest.mark.parametrize("name", IMAGENET)
    def test_variant(self, name):
        model = MODELS.build(config(name).model)
        assert model.backbone.channels == EfficientViTMSRA.arch_settings[name.split("-")[2][:2]]["channels"]
        assert model(torch.zeros(1, 3, 224, 224).expand(2, -1, -1, -1)).shape == (2, 1000)


class TestClasses:
    def test_are_the_plain_ones_with_init_cfg(self, tmp_path):
        source = small_model()
        torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
        pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth"), "prefix": "backbone."}
        model = small_model(init_cfg=pretrained, frozen_stages=1)
        assert isinstance(model.backbone, EfficientViTMSRA)
        assert isinstance(model.head, EfficientViTMSRAHead)
        model.init_weights()
        for (name, expected), got in zip(
            source.backbone.state_dict().items(), model.backbone.state_dict().values(), strict=True
        ):
            assert torch.equal(got, expected), name
        assert not model.train().backbone.blocks1.training

    def test_initialization_keeps_identity_blocks(self):
        model = small_model()
        model.init_weights()
        assert not model.backbone.blocks1[0].mixer.m.attn.proj[1].bn.weight.any()

    def test_layer_depth_of_the_classifier(self):
        assert small_model().get_layer_depth("backbone.blocks3.0.0.m.c.weight") == (3, 5)

    def test_deploy_keeps_predictions(self):
        model = small_model(distillation=True).double().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 2.0)
        images = golden_input(2, 64, 64).double()
        with torch.no_grad():
            before = model(images)
            for module in model.modules():
                if hasattr(module, "switch_to_deploy"):
                    module.switch_to_deploy()
            torch.testing.assert_close(model(images), before, rtol=0, atol=1e-9)
        assert len(model.predict(images)) == 2


class TestDistillation:
    """The loss itself is core's; here: that the head's classifiers get the right terms."""

    @pytest.mark.parametrize("mode", ["hard", "soft"])
    def test_terms(self, mode):
        model = small_model({"mode": mode, "alpha": 0.3, "tau": 2.0}).train()
        feats, labels = model.extract_feat(golden_input(4, 64, 64)), [1, 2, 3, 4]
        teacher = torch.randn(4, 10)
        first, second = model.head.scores(feats)
        base = model.head.loss_module(first, torch.tensor(labels))
        if mode == "hard":
            term = nn.functional.cross_entropy(second, teacher.argmax(1))
        else:
            target, logits = (teacher / 2).softmax(1), (second / 2).log_softmax(1)
            term = 4 * (target * (target.log() - logits)).sum() / 40
        loss = model.head.loss(feats, samples(*labels), teacher_logits=teacher)["loss"]
        torch.testing.assert_close(loss, 0.7 * base + 0.3 * term)

    def test_against_a_teacher_from_a_config(self):
        settings = config(DIGITS).model
        settings.type = "DistilledImageClassifier"
        settings.backbone.img_size = 64
        settings.head.distillation = True
        settings.teacher = {
            "type": "ImageClassifier",
            "backbone": {"type": "ResNet", "depth": 18, "out_indices": (3,)},
            "neck": {"type": "GlobalAveragePooling"},
            "head": {"type": "LinearClsHead", "num_classes": 10, "in_channels": 512},
        }
        model = MODELS.build(settings).train()
        model.loss(golden_input(4, 64, 64), samples(0, 1, 2, 3))["loss"].backward()
        assert all(p.grad is not None for p in model.head.parameters())
        assert not any("teacher" in name for name in model.state_dict())
        assert len(model.eval().predict(golden_input(2, 64, 64))) == 2

    def test_without_a_teacher(self):
        model = small_model(distillation=True).train()
        assert model.loss(golden_input(2, 64, 64), samples(0, 1))["loss"].isfinite()
        first, second = model(golden_input(2, 64, 64))
        assert first.shape == second.shape == (2, 10)

    def test_needs_the_second_head(self):
        model = small_model()
        with pytest.raises(ValueError, match="second classifier"):
            model.head.loss(
                model.extract_feat(golden_input(2, 64, 64)), samples(0, 1), teacher_logits=torch.zeros(2, 10)
            )
