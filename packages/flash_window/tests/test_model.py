"""The backbones: official numbers, MMPretrain's classes, sizes, training switches, checkpoints, bad input."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmpretrain.models import SwinTransformer, SwinTransformerV2
from torch import nn

from vitreous_core.testing.golden import golden_input, golden_path, golden_state, state_sha256
from vitreous_flash_window import FlashSwinTransformer, FlashSwinTransformerV2
from vitreous_flash_window.attention import resize_bias_table

ARCH = {"embed_dims": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}
ARCH_V2 = {**ARCH, "extra_norm_every_n_blocks": 2}
PAIRS = {
    "v1": (FlashSwinTransformer, SwinTransformer, ARCH),
    "v2": (FlashSwinTransformerV2, SwinTransformerV2, ARCH_V2),
}


class TestGoldenTiny:
    @pytest.fixture(scope="class")
    @classmethod
    def golden(cls):
        return np.load(golden_path(Path(__file__).parent, "swin_tiny_224.npz"))

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, golden):
        model = FlashSwinTransformer("tiny").eval()
        model.load_state_dict(golden_state(model.state_dict()))
        assert state_sha256(dict(model.named_parameters())) == golden["parameter_sha256"]
        return model

    def test_float32(self, golden, model):
        with torch.no_grad():
            (feature,) = model(golden_input(2, 224, 224))
        assert feature.shape == tuple(golden["feature_shape"])
        # Measured 9e-6.
        assert np.abs(feature.mean((2, 3)).numpy() - golden["pooled_f64"]).max() < 5e-5

    def test_float64_and_every_stage(self, golden, model):
        probes, kept = dict(zip(golden["stage_names"], range(len(golden["stage_names"])), strict=True)), {}
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: kept.update({name: o}))
            for name in probes
            if name in dict(model.named_modules())
        ]
        with torch.no_grad():
            (feature,) = model.double()(golden_input(2, 224, 224).double())
        model.float()
        for hook in hooks:
            hook.remove()
        assert np.abs(feature.mean((2, 3)).numpy() - golden["pooled_f64"]).max() < 1e-12
        assert np.abs(feature.flatten()[:16].numpy() - golden["feature_first16"]).max() < 1e-12
        assert abs(feature.norm() - golden["feature_l2"].item()) < 1e-9
        assert len(kept) >= 4
        for name, value in kept.items():
            value = value[0] if isinstance(value, tuple) else value
            expected = golden["stage_first8"][probes[name]]
            assert np.abs(value.flatten()[:8].numpy() - expected).max() < 1e-11, name


def matched(version, fill, **options):
    """Our backbone and MMPretrain's with the same weights, float64; our keys and parameter order are theirs."""
    flash, plain, arch = PAIRS[version]
    options = {"arch": arch, **options}
    ours, theirs = flash(**options).double(), fill(plain(**options).double())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert not any(ours.load_state_dict(theirs.state_dict()))
    return ours, theirs


@pytest.fixture
def _branches_drawn_one_by_one(monkeypatch):
    """As MMPretrain draws stochastic depth, so that the same seed leaves out the same branches; stages draw at once."""
    monkeypatch.setattr("vitreous_flash_window.model.branch_factors", lambda rates, *_: [None] * len(rates))


drawn_alike = pytest.mark.usefixtures("_branches_drawn_one_by_one")

# Measured 2e-14 in V1. V2 multiplies its scores by up to 100 in every block: 6e-11.
TOLERANCE = {"v1": 1e-12, "v2": 5e-10}


def assert_same(ours, theirs, image, tolerance, seed=5):
    """Every output map and every gradient agree, relative to the largest entry."""
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        x = image.clone().requires_grad_()
        torch.manual_seed(seed)
        maps = model(x)
        torch.manual_seed(0)
        sum((m * torch.randn(m.shape, dtype=m.dtype)).sum() for m in maps).backward()
        results.append({f"map {i}": m for i, m in enumerate(maps)} | {"image": x.grad})
        results[-1] |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        assert results[0][name].shape == expected.shape
        error = (results[0][name] - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error < tolerance, f"{name}: {error:.1e}"


@drawn_alike
@pytest.mark.parametrize("version", PAIRS)
def test_equals_mmpretrain_at_changing_sizes(draw, fill, version):
    window = 7 if version == "v1" else 8
    ours, theirs = matched(version, fill, window_size=window, out_indices=(0, 1, 2), drop_path_rate=0.4)
    # Divisible, divisible by nothing, and with a last map exactly as small as the window.
    for size in ((144, 176), (133, 157), (16 * window, 16 * window)):
        for training in (False, True):
            ours.train(training), theirs.train(training)
            assert_same(ours, theirs, draw(2, 3, *size), TOLERANCE[version])


@drawn_alike
@pytest.mark.parametrize(
    ("version", "size", "options"),
    [
        ("v1", (49, 133), {"pad_small_map": True, "out_after_downsample": True, "out_indices": (0, 2)}),
        ("v1", (130, 113), {"drop_rate": 0.1, "stage_cfgs": {"block_cfgs": {"ffn_cfgs": {"ffn_drop": 0.2}}}}),
        ("v1", (128, 128), {"stage_cfgs": [{"block_cfgs": {"window_size": w}} for w in (8, 4, 8)]}),
        ("v1", (113, 112), {"in_channels": 1, "patch_size": 2, "stage_cfgs": {"downsample_cfg": {"kernel_size": 3}}}),
        (
            "v1",
            (112, 112),
            {"patch_cfg": {"kernel_size": 7, "padding": "same", "bias": False}, "norm_cfg": None},
        ),
        ("v1", (112, 112), {"stage_cfgs": {"block_cfgs": {"ffn_ratio": 2, "attn_cfgs": {"qkv_bias": False}}}}),
        ("v2", (64, 100), {"pad_small_map": True, "window_size": [8, 8, 16], "pretrained_window_sizes": [6, 0, 12]}),
        ("v2", (128, 128), {"stage_cfgs": {"block_cfgs": {"ffn_cfgs": {"act_cfg": {"type": "ReLU"}}}}}),
    ],
    ids=[
        "small-maps",
        "dropout",
        "window-per-stage",
        "patches",
        "overlapping-patches",
        "blocks",
        "v2-windows",
        "v2-ffn",
    ],
)
def test_constructor_arguments_mean_what_mmpretrains_mean(draw, fill, version, size, options):
    ours, theirs = matched(version, fill, **{"out_indices": (0, 1, 2), **options})
    assert ours.training
    assert theirs.training
    assert_same(ours, theirs, draw(2, options.get("in_channels", 3), *size), TOLERANCE[version])


@drawn_alike
def test_equals_mmpretrain_at_384_with_window_12(draw, fill):
    options = {
        "arch": {"embed_dims": 8, "depths": (2, 1, 1, 2), "num_heads": (1, 1, 2, 4)},
        "img_size": 384,
        "out_indices": (3,),
        "stage_cfgs": {"block_cfgs": {"window_size": 12}},
    }
    assert_same(*matched("v1", fill, **options), draw(1, 3, 384, 384), TOLERANCE["v1"])


@drawn_alike
@pytest.mark.parametrize("version", PAIRS)
def test_absolute_position_embedding(draw, fill, version):
    options = {"use_abs_pos_embed": True, "img_size": 128, "window_size": 4, "out_indices": (2,)}
    ours, theirs = matched(version, fill, **options)
    assert_same(ours, theirs, draw(1, 3, 128, 128), TOLERANCE[version])
    if version == "v1":
        # MMPretrain resizes it in float32 even in a float64 model. Measured 1e-5; V2's sharp softmax amplifies it.
        assert_same(ours, theirs, draw(1, 3, 96, 144), tolerance=1e-4)


@pytest.mark.parametrize("version", PAIRS)
def test_out_indices_default_to_the_last_stage(version):
    flash, _, arch = PAIRS[version]
    x = torch.zeros(1, 3, 64, 64)
    shapes = [
        [tuple(m.shape) for m in flash(arch, window_size=4, out_indices=i)(x)] for i in (-1, 2, (0, -1), (-3, 1, 2))
    ]
    assert shapes[0] == shapes[1] == [(1, 32, 4, 4)]
    assert shapes[2] == [(1, 8, 16, 16), (1, 32, 4, 4)]
    assert shapes[3] == [(1, 8, 16, 16), (1, 16, 8, 8), (1, 32, 4, 4)]
    assert isinstance(flash(arch, window_size=4)(x), tuple)


class TokenBatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class TestTraining:
    @pytest.mark.parametrize("version", PAIRS)
    def test_frozen_stages(self, version):
        flash, _, arch = PAIRS[version]
        model = flash(arch, window_size=4, frozen_stages=1, out_indices=(1, 2), drop_path_rate=0.5, drop_rate=0.1)
        model.train()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {
            name
            for name, _ in model.named_parameters()
            if name.startswith(("patch_embed", "stages.0", "stages.1", "norm1"))
        }
        assert not model.stages[1].training
        assert model.stages[2].training
        assert not model.drop_after_pos.training
        # Nothing random is left before stage 2.
        maps = [model(torch.ones(2, 3, 64, 64))[0] for _ in range(2)]
        assert torch.equal(*maps)

    def test_norm_eval_stops_batch_norms_only(self):
        for norm_eval in (True, False):
            model = FlashSwinTransformer(
                ARCH, window_size=4, norm_eval=norm_eval, norm_cfg={"type": TokenBatchNorm}, out_indices=2
            ).train()
            assert model.norm2.training is not norm_eval
            assert model.stages[0].blocks[0].norm1.training

    @pytest.mark.parametrize("version", PAIRS)
    def test_recomputation_gives_the_same_gradients(self, draw, fill, version):
        flash, _, arch = PAIRS[version]
        models = [
            fill(flash(arch, window_size=4, with_cp=cp, drop_path_rate=0.5).double()).train() for cp in (False, True)
        ]
        assert_same(*models, draw(2, 3, 64, 64), tolerance=1e-15)

    def test_recomputation_saves_memory(self):
        def kept(with_cp):
            model = FlashSwinTransformer(ARCH, window_size=4, with_cp=with_cp)
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
                model(torch.zeros(1, 3, 64, 64))
            return sum(sizes)

        assert kept(True) < 0.3 * kept(False)

    def test_drop_path_is_unbiased_in_bfloat16(self):
        from vitreous_flash_window.layers import DropPath

        torch.manual_seed(0)
        ones = torch.ones(20000, 1, dtype=torch.bfloat16)
        kept = DropPath(0.3)(ones).ne(0).double().mean().item()
        assert abs(kept - 0.7) < 0.015  # four standard deviations
        assert torch.equal(DropPath(0.3).eval()(ones), ones)


@pytest.mark.parametrize("version", PAIRS)
def test_layer_depths(version):
    flash, plain, arch = PAIRS[version]
    ours = flash(arch, window_size=4, use_abs_pos_embed=True, out_indices=(1, 2))
    names = [f"backbone.{name}" for name, _ in ours.named_parameters()]
    depths = {name: ours.get_layer_depth(name, "backbone.") for name in names}
    assert set(depths.values()) == {(depth, 8) for depth in range(8)}
    assert depths["backbone.absolute_pos_embed"] == depths["backbone.patch_embed.norm.bias"] == (0, 8)
    assert depths["backbone.stages.1.blocks.1.norm1.weight"] == (4, 8)
    assert depths["backbone.norm2.weight"] == ours.get_layer_depth("head.fc.weight", "backbone.") == (7, 8)
    merging = "backbone.stages.0.downsample.norm.bias" if version == "v1" else "backbone.stages.1.downsample.norm.bias"
    assert depths[merging] == (2, 8)
    if version == "v1":  # MMPretrain has no such method for V2, and counts the position embedding to the head
        theirs = plain(arch, window_size=4, out_indices=(1, 2))
        for name in names:
            if "absolute" not in name:
                assert theirs.get_layer_depth(name, "backbone.") == depths[name]


class TestLoading:
    def test_old_files(self, fill):
        ours, theirs = matched("v1", fill, out_indices=(2,))
        state = theirs.state_dict()
        old = {
            name.replace("norm2.", "norm.", 1) if name.startswith("norm2.") else name: t for name, t in state.items()
        }
        old["stages.0.blocks.1.attn.attn_mask"] = torch.zeros(4, 49, 49)
        fresh = FlashSwinTransformer(ARCH).double()
        assert not any(fresh.load_state_dict(old))
        assert torch.equal(fresh.norm2.weight, ours.norm2.weight)
        inside = nn.ModuleDict({"backbone": FlashSwinTransformer(ARCH).double()})
        assert not any(inside.load_state_dict({f"backbone.{name}": t for name, t in old.items()}))
        assert torch.equal(inside["backbone"].norm2.weight, ours.norm2.weight)

    def test_another_window_and_image_size(self, fill):
        source = fill(FlashSwinTransformer(ARCH, img_size=112, use_abs_pos_embed=True))
        target = FlashSwinTransformer(ARCH, img_size=192, use_abs_pos_embed=True, window_size=12)
        assert not any(target.load_state_dict(source.state_dict()))
        name = "stages.1.blocks.1.attn.w_msa.relative_position_bias_table"
        assert torch.equal(target.get_parameter(name), resize_bias_table(source.get_parameter(name), 12))
        image = source.absolute_pos_embed.detach().view(1, 28, 28, 8).permute(0, 3, 1, 2)
        expected = nn.functional.interpolate(image, size=(48, 48), mode="bicubic").flatten(2).transpose(1, 2)
        torch.testing.assert_close(target.absolute_pos_embed.detach(), expected)

    def test_v2_in_another_window(self, fill):
        source = fill(FlashSwinTransformerV2(ARCH_V2, window_size=8))
        target = FlashSwinTransformerV2(ARCH_V2, window_size=[16, 16, 8], pretrained_window_sizes=[8, 8, 8])
        assert not any(target.load_state_dict(source.state_dict()))

    def test_mmpretrain_loads_ours(self):
        ours = FlashSwinTransformer(ARCH)
        assert not any(SwinTransformer(ARCH, out_indices=(2,)).load_state_dict(ours.state_dict()))

    def test_missing_and_surplus_keys_are_named(self):
        state = FlashSwinTransformer(ARCH).state_dict()
        del state["stages.0.blocks.0.norm1.bias"]
        state["stages.0.blocks.0.attn.w_msa.rope"] = torch.zeros(1)
        with pytest.raises(RuntimeError, match=r"(?s)norm1\.bias.*w_msa\.rope"):
            FlashSwinTransformer(ARCH).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("version", PAIRS)
def test_whole_model_in_low_precision(draw, version, dtype):
    flash, _, arch = PAIRS[version]
    torch.manual_seed(0)
    model = flash(arch, window_size=4, use_abs_pos_embed=True).to(dtype)
    (low,) = model(draw(2, 3, 72, 88, dtype=dtype))
    low.float().square().sum().backward()
    (high,) = model.double()(draw(2, 3, 72, 88).to(dtype).double())
    assert low.dtype == dtype
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert high.isfinite().all()


@pytest.mark.parametrize("version", PAIRS)
def test_whole_graph_compiles(draw, version):
    flash, _, arch = PAIRS[version]
    arch = {**arch, "depths": (2, 1), "num_heads": (1, 2)}
    model = flash(arch, window_size=4, out_indices=(0, 1), use_abs_pos_embed=True).double().eval()
    x = draw(1, 3, 34, 46)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(x), model(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FlashSwinTransformer("huge"), ValueError, "arch must be one of tiny, small, base, large, or a dict"),
        (lambda: FlashSwinTransformer({"depths": (2,)}), ValueError, "arch must be a name or a dict with the keys"),
        (lambda: FlashSwinTransformer(3), ValueError, "got int"),
        (lambda: FlashSwinTransformer({**ARCH, "num_heads": (1, 2)}), ValueError, "one num_heads per stage"),
        (
            lambda: FlashSwinTransformer({**ARCH, "num_heads": (3, 2, 4)}),
            ValueError,
            "num_heads must divide embed_dims",
        ),
        (lambda: FlashSwinTransformer(ARCH, out_indices=3), ValueError, r"out_indices must lie in -3..2; got 3"),
        (lambda: FlashSwinTransformer(ARCH, frozen_stages=3), ValueError, "frozen_stages must be in"),
        (lambda: FlashSwinTransformer(ARCH, norm_cfg={"type": "XN"}), ValueError, "norm_cfg: type must be one of"),
        (lambda: FlashSwinTransformer(ARCH, norm_cfg="LN"), TypeError, "norm_cfg must be a dict"),
        (lambda: FlashSwinTransformer(ARCH, stage_cfgs=[{}]), ValueError, "stage_cfgs must be one dict or 3 of them"),
        (lambda: FlashSwinTransformer(ARCH, stage_cfgs={"widow": 7}), TypeError, "widow"),
        (lambda: FlashSwinTransformer(ARCH, patch_cfg={"padding": "all"}), ValueError, "padding must be 'corner'"),
        (lambda: FlashSwinTransformer(ARCH, patch_cfg={"conv_type": "Conv1d"}), ValueError, "conv_type"),
        (
            lambda: FlashSwinTransformerV2(ARCH_V2, window_size=[8, 8]),
            ValueError,
            "window_size must be one number or 3",
        ),
        (
            lambda: FlashSwinTransformer(ARCH)(torch.zeros(1, 1, 64, 64)),
            ValueError,
            r"x must be \[B, 3, height, width\]",
        ),
        (lambda: FlashSwinTransformer(ARCH)(torch.zeros(1, 3, 64, 64)), ValueError, "smaller than window_size = 7"),
        (lambda: FlashSwinTransformer(ARCH)(torch.zeros(1, 3, 2, 2)), ValueError, "smaller than window_size = 7"),
        (
            lambda: FlashSwinTransformer(ARCH, backend="triton")(torch.zeros(1, 3, 112, 112)),
            NotImplementedError,
            "CUDA device",
        ),
    ],
)
def test_bad_input_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_importing_the_package_is_light():
    code = "import sys, vitreous_flash_window; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {name.split(".")[0] for name in loaded} & {"mmengine", "mmpretrain", "mmcv", "torchvision", "timm"}
