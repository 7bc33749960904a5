"""Flash-Swin inside MMPretrain: names, recipes, training, loading, inference."""

import math
import subprocess

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmpretrain import ImageClassificationInferencer, get_model, inference_model, list_models
from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor
from mmpretrain.registry import MODELS, PARAM_SCHEDULERS
from mmpretrain.structures import DataSample
from torch import nn

import vitreous_flash_window.mm  # noqa: F401
from vitreous_core.mm import reproduce
from vitreous_core.papers import papers
from vitreous_flash_window import FlashShiftWindowMSA, FlashSwinTransformer, FlashWindowMSA

CONFIGS = next(paper for paper in papers() if paper.name == "flash_window").configs
V1 = [f"flash-swin-{arch}_16xb64_in1k" for arch in ("tiny", "small", "base", "large")]
V1 += [f"flash-swin-{arch}_16xb64_in1k-384px" for arch in ("base", "large")]
V2 = [f"flash-swinv2-{arch}-w{w}_16xb64_in1k-256px" for arch in ("tiny", "small", "base") for w in (8, 16)]
DIGITS = ["flash-swin-tiny_1xb64_digits", "flash-swinv2-tiny_1xb64_digits"]
FASHION = ["flash-swin-tiny_1xb128_fashion-mnist", "flash-swinv2-tiny_1xb128_fashion-mnist"]


def config(name):
    return Config.fromfile(CONFIGS / ("flash_swin_v2" if "v2" in name else "flash_swin") / f"{name}.py")


def digits_model(name=DIGITS[0], **changes):
    settings = config(name)
    settings.merge_from_dict({f"model.{key}": value for key, value in changes.items()})
    torch.manual_seed(0)
    model = MODELS.build(settings.model)
    model.init_weights()
    return model


class TestNames:
    def test_listed(self):
        assert set(list_models("flash-swin*")) == {*V1, *V2, *DIGITS, *FASHION}

    @pytest.mark.parametrize("name", DIGITS)
    def test_with_other_stages_and_classes(self, name):
        model = get_model(name, backbone={"out_indices": (0, 1)}, head={"num_classes": 3}).eval()
        maps = model.extract_feat(torch.zeros(1, 3, 48, 40), stage="backbone")
        assert [tuple(m.shape) for m in maps] == [(1, 32, 12, 10), (1, 64, 6, 5)]
        assert model(torch.zeros(1, 3, 48, 40)).shape == (1, 3)

    def test_inference_on_an_image(self):
        image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        result = inference_model(get_model(DIGITS[0]), image)
        assert math.isclose(sum(result["pred_scores"]), 1.0, rel_tol=1e-5)
        assert len(ImageClassificationInferencer(DIGITS[1])([image, image])) == 2

    def test_modules_build_from_configs(self):
        sizes = {"embed_dims": 8, "num_heads": 2, "window_size": 4}
        assert isinstance(MODELS.build({"type": "FlashShiftWindowMSA", **sizes, "init_cfg": None}), FlashShiftWindowMSA)
        init = {"type": "Constant", "layer": "Linear", "val": 0.5}
        window = MODELS.build({"type": "FlashWindowMSA", **sizes, "init_cfg": init})
        window.init_weights()
        assert isinstance(window, FlashWindowMSA)
        assert (window.proj.weight == 0.5).all()
        assert MODELS.build({"type": "FlashWindowMSAV2", **sizes})(torch.zeros(1, 16, 8)).shape == (1, 16, 8)


class TestRecipe:
    """The lines of Swin's training script as MMEngine resolves them."""

    def test_learning_rate_by_epoch(self):
        recipe = config(V1[0])
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=recipe.optim_wrapper.optimizer.lr)
        settings = [s | {"optimizer": optimizer, "convert_to_iter_based": False} for s in recipe.param_scheduler]
        schedulers = [PARAM_SCHEDULERS.build(s) for s in settings]
        assert recipe.train_cfg.max_epochs == 300
        for epoch in range(300):
            warm_up = 1e-6 + (1e-3 - 1e-6) * epoch / 19
            cosine = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * (epoch - 20) / 280)) / 2
            assert math.isclose(optimizer.param_groups[0]["lr"], warm_up if epoch < 20 else cosine, rel_tol=1e-6), epoch
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()

    @pytest.mark.parametrize(
        ("name", "exempt"),
        [
            (V1[0], ("relative_position_bias_table",)),
            (V2[0], ("logit_scale", "q_bias", "v_bias", "cpb_mlp.0.weight", "cpb_mlp.2.weight")),
        ],
    )
    def test_decay_spares_norms_biases_and_position_parameters(self, name, exempt):
        recipe = config(name)
        with torch.device("meta"):
            model = MODELS.build(recipe.model)
        wrapper = build_optim_wrapper(model, recipe.optim_wrapper)
        decays = {id(group["params"][0]): group["weight_decay"] for group in wrapper.param_groups}
        for key, parameter in model.named_parameters():
            spared = parameter.ndim == 1 or key.endswith(exempt)
            assert decays[id(parameter)] == (0.0 if spared else 0.05), key
        assert recipe.optim_wrapper.clip_grad == {"max_norm": 5.0}

    def test_batch_and_augmentation(self):
        for name in (*V1, *V2):
            recipe = config(name)
            assert recipe.train_dataloader.batch_size == 64
            assert recipe.auto_scale_lr.base_batch_size == 1024
            assert [a["type"] for a in recipe.model.train_cfg.augments] == ["Mixup", "CutMix"]
            assert recipe.model.head.loss.label_smooth_val == 0.1
            side = recipe.model.backbone.img_size
            assert recipe.train_dataloader.dataset.pipeline[1].scale == side
            for loader in (recipe.val_dataloader, recipe.test_dataloader):
                resize, *crop, pack = loader.dataset.pipeline[1:]
                assert pack["type"] == "PackInputs"
                assert (crop[0]["crop_size"] if crop else resize["scale"]) == side
                assert (bool(crop), resize["scale"]) == (side < 384, {224: 256, 256: 292, 384: 384}[side])

    def test_stochastic_depth_and_windows(self):
        rates = {name: config(name).model.backbone.drop_path_rate for name in (*V1, *V2)}
        assert [rates[name] for name in V1] == [0.2, 0.3, 0.5, 0.2, 0.1, 0.2]
        assert [rates[name] for name in V2] == [0.2, 0.2, 0.3, 0.3, 0.5, 0.5]
        windows = [config(name).model.backbone.window_size for name in V2[:2]]
        assert windows == [8, [16, 16, 16, 8]]
        fine = config(V1[4])
        assert fine.model.backbone.stage_cfgs.block_cfgs.window_size == 12
        assert (fine.optim_wrapper.optimizer.lr, fine.optim_wrapper.optimizer.weight_decay) == (1e-5, 1e-8)
        assert fine.train_cfg.max_epochs == 30


@pytest.mark.parametrize("name", DIGITS)
def test_a_few_steps_learn_one_batch(name):
    model = digits_model(name).train()
    images = torch.randn(8, 3, 32, 32)
    samples = [DataSample().set_gt_label(i) for i in range(8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model.loss(images, samples)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", FASHION)
def test_fashion_mnist_configs_have_shifted_windows_and_read_the_packages_files(name):
    settings = config(name)
    backbone = MODELS.build(settings.model).backbone
    side = settings.model.backbone.img_size
    scales = {loader.dataset.pipeline[-2].scale for loader in (settings.train_dataloader, settings.test_dataloader)}
    assert scales == {side}
    assert backbone.stages[0].blocks[1].attn.shift_size > 0
    assert backbone.patch_resolution == (2 * backbone.stages[0].blocks[0].attn.window_size,) * 2
    for loader, split in (("train", "train"), ("val", "test"), ("test", "test")):
        dataset = settings[f"{loader}_dataloader"].dataset
        assert (dataset.type, dataset.split) == ("GzippedFashionMNIST", split)


class TestLoading:
    def test_pretrained_backbone_by_prefix(self, tmp_path):
        source = digits_model()
        path = tmp_path / "source.pth"
        torch.save({"state_dict": source.state_dict()}, path)
        init = {"type": "Pretrained", "checkpoint": str(path), "prefix": "backbone."}
        target = digits_model(**{"backbone.init_cfg": init})
        expected = source.backbone.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in target.backbone.state_dict().items())

    def test_another_window_through_mmengine(self, tmp_path):
        source = digits_model()
        path = tmp_path / "source.pth"
        torch.save({"state_dict": source.state_dict()}, path)
        model = get_model(DIGITS[0], pretrained=str(path), backbone={"window_size": 8})
        table = model.backbone.stages[0].blocks[0].attn.w_msa.relative_position_bias_table
        assert table.shape == (225, 2)
        assert table.detach().abs().sum() > 0
        torch.testing.assert_close(
            table[112], source.backbone.stages[0].blocks[0].attn.w_msa.relative_position_bias_table[24]
        )

    def test_the_plain_backbone_is_the_same_model(self):
        registered = digits_model().backbone.eval()
        plain = FlashSwinTransformer(registered.arch_settings, img_size=32, window_size=4).eval()
        plain.load_state_dict(registered.state_dict())
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(plain(x)[0], registered(x)[0])


def test_layer_wise_learning_rates():
    settings = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1}}
    model = digits_model()
    wrapper = LearningRateDecayOptimWrapperConstructor(settings, {"layer_decay_rate": 0.5})(model)
    rates = {id(group["params"][0]): group["lr"] for group in wrapper.param_groups}
    assert rates[id(model.head.fc.weight)] == 1.0
    assert rates[id(model.backbone.stages[1].blocks[1].norm1.weight)] == 0.5
    assert rates[id(model.backbone.patch_embed.projection.weight)] == 0.5**5


def test_reproductions_run_side_by_side(monkeypatch, capsys):
    commands = []

    def run(command, **_):
        commands.append(command)
        fails = "triton" in command
        return subprocess.CompletedProcess(command, 2 * fails, "first\nthe record\n", "reproduce: error: no GPU\n")

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    options = [
        "--seed",
        "0",
        "1",
        "--backend",
        "torch",
        "triton",
        "--jobs",
        "3",
        "--amp",
        "--cfg-options",
        "a=1",
        "b=2",
    ]
    assert reproduce.main(["flash_window", DIGITS[0], *options, "--commit", "012-dirty"]) == 2
    assert len(commands) == 4
    assert all(command[-3:] == ["--cfg-options", "a=1", "b=2"] for command in commands)
    assert all(command[command.index("--commit") + 1] == "012-dirty" for command in commands)
    chosen = {(c[c.index("--seed") + 1], c[c.index("--backend") + 1]) for c in commands}
    assert chosen == {(seed, backend) for seed in "01" for backend in ("torch", "triton")}
    lines = capsys.readouterr().out.splitlines()
    assert f"{DIGITS[0]} torch-seed1: the record" in lines
    assert f"{DIGITS[0]} triton-seed0: reproduce: error: no GPU" in lines
    assert reproduce.main(["flash_window", DIGITS[0], "--cfg-options", "nonsense"]) == 2
