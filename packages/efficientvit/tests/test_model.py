"""The backbone and head against the official numbers, and their behaviour as modules."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vitreous_core.testing.golden import golden_cotangent, golden_input, golden_path
from vitreous_efficientvit import EfficientViTMSRA, EfficientViTMSRAHead, FinerMaps
from vitreous_efficientvit.convert import to_official, to_timm

TESTS = Path(__file__).parent


def load(name):
    return np.load(golden_path(TESTS, f"{name}.npz"))


class TestGolden:
    """Numbers of the official implementation under the golden weights."""

    @pytest.mark.parametrize(("arch", "distillation"), [("m0", False), ("m0", True), ("m4", False)])
    def test_logits(self, build, arch, distillation):
        golden = load(f"efficientvit_{arch}_dist_224" if distillation else f"efficientvit_{arch}_224")
        model, images = build(arch, distillation), golden_input(2, 224, 224)
        with torch.no_grad():
            single = model(images).numpy()
            double = model.double()(images.double()).numpy()
        # The official code's own fp32 noise is 9e-7; measured here 9e-7 and 2e-15.
        assert np.abs(single - golden["logits_f64"]).max() < 2e-5
        assert np.abs(double - golden["logits_f64"]).max() < 1e-8

    @pytest.mark.parametrize("arch", ["m0", "m4"])
    def test_stages_and_blocks(self, build, arch):
        golden, model = load(f"efficientvit_{arch}_224"), build(arch)
        stages = {"stem": "patch_embed", "stage1": "blocks1", "stage2": "blocks2", "stage3": "blocks3"}
        seen = {}

        def record(name):
            return lambda module, inputs, output: seen.__setitem__(name, output)

        names = [*stages.values(), *golden["block_names"].tolist()]
        for name in names:
            model.backbone.get_submodule(name).register_forward_hook(record(name))
        # A Sequential that is iterated over runs no hook of its own: its last child speaks for it.
        for stage in ("blocks1", "blocks2", "blocks3"):
            model.backbone.get_submodule(stage)[-1].register_forward_hook(record(stage))
        with torch.no_grad():
            model(golden_input(2, 224, 224))
        for kind, keys in (("stage", stages.values()), ("block", golden["block_names"].tolist())):
            for i, key in enumerate(keys):
                output = seen[key].double()
                assert tuple(output.shape) == tuple(s for s in golden[f"{kind}_shape"][i] if s)
                assert abs(output.mean() - golden[f"{kind}_mean"][i]) < 1e-6, key
                assert abs(output.std(correction=0) - golden[f"{kind}_std"][i]) < 1e-6, key
                first = output.flatten()[:8].numpy()
                assert np.abs(first - golden[f"{kind}_first8"][i]).max() < 1e-5, key

    def test_training_step(self, build):
        golden, model = load("efficientvit_m0_train"), build("m0").double().train()
        logits = model(golden_input(8, 224, 224, seed=1).double())
        loss = (golden_cotangent(logits.shape) * logits).sum()
        loss.backward()
        assert np.abs(logits.detach().numpy() - golden["logits_0"]).max() < 1e-8
        assert abs(loss.item() - golden["loss"]) < 1e-8
        gradients = to_official({name: p.grad for name, p in model.named_parameters()})
        for name, norm, first in zip(golden["grad_names"], golden["grad_l2"], golden["grad_first"], strict=True):
            gradient = gradients[name]
            assert abs(gradient.norm().item() - norm) < 1e-8 * max(norm, 1.0), name
            assert abs(gradient.flatten()[0].item() - first) < 1e-8, name
        buffers = to_official(model.state_dict())
        for name, norm in zip(golden["buffer_names"], golden["buffer_l2"], strict=True):
            assert abs(buffers[name].norm().item() - norm) < 1e-8, name


class TestSizes:
    @pytest.mark.parametrize(("arch", "img_size"), [("m0", 256), ("m5", 224), ("m1", 320)])
    def test_equals_timm(self, build, arch, img_size):
        model = build(arch, img_size=img_size)
        other = timm_model(arch, img_size, model)
        with torch.no_grad():
            for size in [(img_size, img_size), (img_size, 160), (208, img_size + 64)]:
                images = golden_input(1, *size)
                # Scaling q or the scores is the same number (the scale is 1/4); measured 0 to 5e-7.
                torch.testing.assert_close(model(images), other(images), rtol=0, atol=5e-6)

    def test_rectangular_construction_uses_the_shorter_side(self, build):
        model = build("m0", img_size=(160, 448))
        tables = {name: p.shape[1] for name, p in model.named_parameters() if name.endswith("attention_biases")}
        assert [
            tables[f"backbone.blocks{s}.{i}.mixer.m.attn.attention_biases"] for s, i in ((1, 0), (2, 3), (3, 3))
        ] == [49, 25, 9]
        other = timm_model("m0", (160, 448), model)
        images = golden_input(1, 160, 448)
        with torch.no_grad():
            torch.testing.assert_close(model(images), other(images), rtol=0, atol=5e-6)

    @pytest.mark.parametrize("size", [(16, 16), (16, 48), (112, 80), (240, 272)])
    def test_maps_of_any_multiple_of_16(self, tiny, size):
        model = EfficientViTMSRA(tiny, img_size=96, out_indices=(0, 1, 2)).eval()
        height, width = size[0] // 16, size[1] // 16
        for channels, output in zip(tiny["channels"], model(torch.randn(2, 3, *size)), strict=True):
            assert output.shape == (2, channels, height, width)
            height, width = (height + 1) // 2, (width + 1) // 2

    def test_stage_maps_smaller_than_the_window(self, tiny):
        model = EfficientViTMSRA(tiny | {"window_size": 7}, img_size=32, out_indices=(0, 1, 2)).eval()
        sides = [module.window_size for module in model.modules() if hasattr(module, "window_size")]
        assert sides == [2, 1, 1, 1]
        assert [tuple(y.shape[2:]) for y in model(torch.randn(1, 3, 32, 32))] == [(2, 2), (1, 1), (1, 1)]

    def test_checkpoint_of_another_size(self, build):
        small, large = build("m0"), build("m0", img_size=384, golden=False)
        with pytest.warns(UserWarning, match="4x4 windows are resized to 6x6"):
            large.load_state_dict(small.state_dict())
        name = "blocks1.0.mixer.m.attn.attention_biases"
        assert torch.equal(large.backbone.get_parameter(name), small.backbone.get_parameter(name))


def timm_model(arch, img_size, model):
    timm = pytest.importorskip("timm", reason="timm is not installed: the comparison with its EfficientViT did not run")
    other = timm.create_model(f"efficientvit_{arch}", img_size=img_size)
    other.load_state_dict(to_timm(model.state_dict()))
    return other.eval()


class TestHead:
    def test_pair_in_training_mean_in_evaluation(self):
        head = EfficientViTMSRAHead(5, 8, distillation=True)
        feats = (torch.zeros(4, 2, 9, 9), torch.randn(4, 8, 3, 3))
        first, second = head.train()(feats)
        assert first.shape == second.shape == (4, 5)
        head.eval()
        first, second = head.scores(feats)
        assert not torch.equal(first, second)
        torch.testing.assert_close(head(feats), (first + second) / 2)

    def test_pools_the_last_map(self):
        feats = (torch.zeros(2, 4, 6, 6), torch.arange(36.0).view(2, 2, 3, 3))
        head = EfficientViTMSRAHead(0, 2).eval()
        assert head(feats).tolist() == [[4.0, 13.0], [22.0, 31.0]]

    def test_no_classes_twice(self):
        head = EfficientViTMSRAHead(0, 2, distillation=True).eval()
        head.switch_to_deploy()
        assert not list(head.parameters())

    def test_bad_classes(self):
        with pytest.raises(ValueError, match="num_classes"):
            EfficientViTMSRAHead(-1, 8)


class TestTraining:
    """Conventions of a trainable backbone."""

    def test_fresh_blocks_are_the_identity(self, tiny):
        model = EfficientViTMSRA(tiny, img_size=96).eval()
        x = torch.randn(2, 16, 6, 6)
        assert torch.equal(model.blocks1(x), x)
        zeros = [name for name, p in model.named_parameters() if name.endswith("bn.weight") and not p.any()]
        # Four branches and the attention's projection in each of four blocks, one FFN in each of four locals.
        assert len(zeros) == 4 * 5 + 4
        assert all(model.get_parameter(f"blocks2.{i}.0.m.bn.weight").all() for i in (0, 2))

    @pytest.mark.parametrize("frozen", [-1, 0, 1, 3])
    def test_frozen_stages(self, tiny, frozen):
        model = EfficientViTMSRA(tiny, frozen_stages=frozen).train()
        parts = [model.patch_embed, model.blocks1, model.blocks2, model.blocks3]
        for i, part in enumerate(parts):
            assert part.training == (i > frozen)
            assert all(p.requires_grad == (i > frozen) for p in part.parameters())
            assert all(module.training == (i > frozen) for module in part.modules())

    def test_norm_eval(self, tiny):
        model = EfficientViTMSRA(tiny, norm_eval=True).train()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms
        assert model.training
        assert not any(norm.training for norm in norms)

    @pytest.mark.parametrize("frozen", [-1, 1])
    def test_checkpointing_changes_no_result(self, build, tiny, frozen):
        plain = build(tiny, num_classes=10, img_size=96, drop_path_rate=0.5, frozen_stages=frozen)
        saving = copy.deepcopy(plain)
        saving.backbone.with_cp = True
        results = []
        for model in (plain.train(), saving.train()):
            torch.manual_seed(3)
            logits = model(golden_input(4, 96, 96))
            logits.square().sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results.append(({"logits": logits} | gradients, dict(model.named_buffers())))
        for expected, got in zip(*results, strict=True):
            assert expected.keys() == got.keys()
            for name, value in expected.items():
                assert torch.equal(value, got[name]), name

    def test_drop_path_drops_images(self, tiny):
        model = EfficientViTMSRA(tiny, drop_path_rate=0.9, img_size=96)
        rates = [module.drop_path for module in model.modules() if hasattr(module, "drop_path")]
        expected = np.repeat(np.linspace(0, 0.9, 4), 5)
        in_blocks = rates[:5] + rates[9:19] + rates[23:]
        np.testing.assert_allclose(in_blocks, expected, atol=1e-6)
        assert not any(rates[5:9] + rates[19:23])
        residual = model.blocks3[3].ffn1
        residual.m = nn.Identity()
        torch.manual_seed(0)
        x = torch.ones(2000, 1, 1, 1)
        kept = residual(x).flatten() - 1
        assert set(kept.round(decimals=4).tolist()) == {0.0, 10.0}
        assert abs(kept.mean() - 1.0) < 0.25  # five standard deviations
        assert torch.equal(residual.eval()(x), 2 * x)

    def test_every_parameter_learns(self, build, tiny):
        model = build(tiny, True, num_classes=10, img_size=96).train()
        first, second = model(golden_input(4, 96, 96))
        (first.square().sum() + second.square().sum()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_layer_depth(self, tiny):
        model = EfficientViTMSRA(tiny)
        depths = {name: model.get_layer_depth(f"backbone.{name}", "backbone.") for name, _ in model.named_parameters()}
        assert {total for _, total in depths.values()} == {6}
        assert [depth for depth, _ in depths.values()] == sorted(depth for depth, _ in depths.values())
        assert depths["patch_embed.0.c.weight"] == (0, 6)
        assert depths["blocks1.0.dw0.m.c.weight"] == (1, 6)
        assert depths["blocks2.1.conv1.c.weight"] == depths["blocks2.3.ffn0.m.pw1.c.weight"] == (2, 6)
        assert depths["blocks2.4.dw0.m.c.weight"] == (3, 6)
        assert depths["blocks3.3.dw0.m.c.weight"] == (4, 6)
        assert model.get_layer_depth("head.classifier.l.weight", "backbone.") == (5, 6)

    @pytest.mark.parametrize(
        ("out_indices", "strides"),
        [(-1, [64]), (0, [16]), ((0, 1, 2), [16, 32, 64]), ([0, -1], [16, 64]), ((2, 0), [16, 64])],
    )
    def test_out_indices(self, tiny, out_indices, strides):
        outputs = EfficientViTMSRA(tiny, out_indices=out_indices).eval()(torch.randn(1, 3, 128, 128))
        assert isinstance(outputs, tuple)
        assert [128 // output.shape[-1] for output in outputs] == strides

    def test_channels_last_and_empty_batches(self, build, tiny):
        model, images = build(tiny, num_classes=10, img_size=96), golden_input(2, 96, 96)
        with torch.no_grad():
            expected = model(images)
            assert model(images[:0]).shape == (0, 10)
            got = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.compile
def test_compiles_to_one_graph(build, tiny):
    model, images = build(tiny, True, num_classes=10, img_size=96), golden_input(2, 96, 112)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(images), model(images))


def test_trains_under_autocast(build, tiny):
    model, images = build(tiny, num_classes=10, img_size=96).train(), golden_input(4, 96, 96)
    with torch.no_grad():
        expected = copy.deepcopy(model)(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    logits.float().square().sum().backward()
    assert (logits - expected).norm() < 0.15 * expected.norm()  # bfloat16 carries 8 bits; measured 0.06
    assert all(p.grad.isfinite().all() for p in model.parameters())


class TestBadInput:
    @pytest.mark.parametrize("shape", [(1, 3, 232, 232), (1, 3, 224, 8), (1, 3, 0, 16), (1, 3, 15, 16)])
    def test_size(self, tiny, shape):
        with pytest.raises(ValueError, match="multiples of 16"):
            EfficientViTMSRA(tiny)(torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(3, 224, 224), (1, 4, 224, 224)])
    def test_layout(self, tiny, shape):
        with pytest.raises(ValueError, match=r"x must be \[B, 3, height, width\]"):
            EfficientViTMSRA(tiny)(torch.zeros(shape))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"arch": "m6"}, ValueError, "arch must be one of .*'m0'.* or a dict; got 'm6'"),
            ({"arch": 3}, TypeError, "arch must be a name or a dict; got int"),
            ({"img_size": 230}, ValueError, "img_size must be positive multiples of 16; got 230"),
            ({"img_size": 0}, ValueError, "img_size must be positive"),
            ({"img_size": "224"}, TypeError, "img_size must be an int"),
            ({"img_size": (224, 224, 3)}, TypeError, "img_size must be an int or"),
            ({"out_indices": 3}, ValueError, "out_indices must lie in -3..2"),
            ({"img_size": 224.0}, TypeError, "img_size must be an int or"),
            ({"out_indices": 1.0}, TypeError, "out_indices must be an int or a sequence"),
            ({"out_indices": ()}, TypeError, "out_indices must be an int or a sequence"),
            ({"frozen_stages": 4}, ValueError, "frozen_stages must be -1"),
            ({"drop_path_rate": 1.0}, ValueError, "drop_path_rate"),
        ],
    )
    def test_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            EfficientViTMSRA(**arguments)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_heads": (3, 3, 2)}, "num_heads must divide channels; got 3 heads for 16"),
            ({"channels": (12, 24, 32)}, "multiple of 8"),
            ({"depths": (1, 2)}, "needs 3 entries"),
            ({"num_heads": 2}, "needs 3 entries"),
            ({"depths": (1, 0, 1)}, "must be positive"),
            ({"kernel_sizes": (3, 3)}, "kernel_sizes needs an entry"),
            ({"embed_dims": (1, 2, 3)}, "arch needs .* got .*embed_dims"),
        ],
    )
    def test_arch(self, tiny, change, message):
        with pytest.raises(ValueError, match=message):
            EfficientViTMSRA(tiny | change)

    def test_arch_lacks_an_entry(self, tiny):
        with pytest.raises(ValueError, match="arch needs"):
            EfficientViTMSRA({key: value for key, value in tiny.items() if key != "depths"})


def test_import_is_light():
    code = (
        "import sys, vitreous_efficientvit, vitreous_efficientvit.convert\n"
        "heavy = [name for name in sys.modules if name.split('.')[0] in {'mmengine', 'mmpretrain', 'timm'}]\n"
        "heavy += [name for name in sys.modules if name == 'vitreous_efficientvit.ops.triton']  # the kernels\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class TestFinerMaps:
    def test_are_put_in_front(self):
        neck = FinerMaps(8, levels=2)
        maps = (torch.randn(2, 8, 5, 7), torch.randn(2, 16, 3, 4))
        finer = neck(maps)
        assert [tuple(y.shape[1:]) for y in finer] == [(8, 20, 28), (8, 10, 14), (8, 5, 7), (16, 3, 4)]
        assert finer[2:] == maps
        torch.testing.assert_close(finer[1], neck.layers[0](maps[0]))

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="levels must be positive; got 0"):
            FinerMaps(8, levels=0)
