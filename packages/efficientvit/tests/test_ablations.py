"""The switches of the paper's ablations change what they say and nothing else; their configs train."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitreous_efficientvit.mm  # noqa: F401
from vitreous_core.errors import BackendUnsupported
from vitreous_core.testing.golden import golden_input, golden_state
from vitreous_core.zoo import find_model
from vitreous_efficientvit import CascadedGroupAttention, EfficientViTMSRA
from vitreous_efficientvit.model import EfficientViTBlock

BASE = "efficientvit-msra-m0_1xb128_fashion-mnist"
# What an ablation's backbone has of its own.
CHANGES = {
    "no-sandwich": {"ffns": (0, 1), "depths": (2, 3, 2)},
    "two-ffns": {"ffns": (2, 2), "depths": (1, 1, 1)},
    "no-cascade": {"head_input": "slice"},
    "no-split": {"head_input": "full"},
    "uniform-qkv": {"key_dim": (16, 32, 48)},
    "ffn-ratio-4": {"ffn_ratio": 4, "channels": (48, 104, 160)},
}
SWITCHES = [
    {"head_input": "slice"}, {"head_input": "full"}, {"ffns": (0, 1)}, {"ffns": (2, 1)}, {"ffn_ratio": 4},
    {"key_dim": (4, 6, 8)},
]  # fmt: skip


def name_of(ablation):
    return BASE.replace("m0_", f"m0-{ablation}_")


def config(name):
    return Config.fromfile(find_model(name).config)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


class TestAttention:
    @pytest.mark.parametrize(
        ("head_input", "reached"),
        [("cascade", [{0, 1, 2}, {1, 2}, {2}]), ("slice", [{0}, {1}, {2}]), ("full", [{0, 1, 2}] * 3)],
    )
    def test_which_heads_a_slice_reaches(self, head_input, reached):
        attention = CascadedGroupAttention(12, 3, 4, (5, 3, 3), 4, head_input)
        attention.load_state_dict(golden_state(attention.state_dict()))
        attention.proj = nn.Identity()
        attention = attention.double().eval()
        windows = torch.randn(1, 12, 4, 4, dtype=torch.float64, requires_grad=True)
        for head, outputs in enumerate(attention(windows).chunk(3, dim=1)):
            (gradient,) = torch.autograd.grad(outputs.sum(), windows, retain_graph=True)
            touched = {piece for piece, each in enumerate(gradient.chunk(3, dim=1)) if each.any()}
            assert touched == {piece for piece in range(3) if head in reached[piece]}

    def test_full_is_the_same_as_slice_where_the_other_channels_have_no_weight(self):
        full, sliced = (CascadedGroupAttention(12, 3, 4, (5, 3, 3), 4, kind).eval() for kind in ("full", "slice"))
        sliced.load_state_dict(golden_state(sliced.state_dict()))
        state = sliced.state_dict()
        for head in range(3):
            weight = torch.zeros_like(full.qkvs[head].c.weight)
            weight[:, 4 * head : 4 * head + 4] = state[f"qkvs.{head}.c.weight"]
            state[f"qkvs.{head}.c.weight"] = weight
        full.load_state_dict(state)
        windows = torch.randn(2, 12, 4, 4)
        with torch.no_grad():
            torch.testing.assert_close(full(windows), sliced(windows))

    def test_one_head_makes_no_difference(self):
        kinds = [CascadedGroupAttention(8, 1, 3, (3,), 4, kind).eval() for kind in ("cascade", "slice", "full")]
        windows = torch.randn(2, 8, 3, 3)
        with torch.no_grad():
            for attention in kinds:
                attention.load_state_dict(golden_state(kinds[0].state_dict()))
            first, *others = [attention(windows) for attention in kinds]
        assert all(torch.equal(first, other) for other in others)

    def test_an_unknown_input_of_heads(self):
        with pytest.raises(ValueError, match="head_input must be one of 'cascade', 'slice', 'full'; got 'all'"):
            CascadedGroupAttention(8, 1, 3, (3,), 4, "all")


class TestParameters:
    """Against the layers' formulas: a convolution of 1x1 has in x out weights, a batch norm two for each channel."""

    @staticmethod
    def block(channels=24, heads=3, key_dim=4, **options):
        options = {"head_input": "cascade", "ffns": (1, 1), "ffn_ratio": 2} | options
        return parameters(EfficientViTBlock(channels, heads, 3, (3, 3, 3), key_dim, 0.0, **options))

    def test_heads(self):
        assert self.block(head_input="slice") == self.block()
        # Each of three heads reads 24 channels instead of 8 into 2 x 4 + 8.
        assert self.block(head_input="full") - self.block() == 3 * (24 - 8) * 16

    def test_ffns(self):
        one = 24 * 9 + 2 * 24 + 2 * 24 * 48 + 2 * 48 + 2 * 24  # a depthwise convolution and an FFN
        assert self.block(ffns=(2, 2)) - self.block() == 2 * one
        assert self.block() - self.block(ffns=(0, 1)) == one
        assert self.block(ffn_ratio=4) - self.block() == 2 * (2 * 24 * 48 + 2 * 48)

    def test_keys(self):
        # Queries and keys of four channels more: their convolution and norm, and those of the query over the window.
        assert self.block(key_dim=8) - self.block() == 3 * (8 * 8 + 2 * 8 + 4 * 9 + 2 * 4)


class TestBackbone:
    def test_layout(self, tiny):
        def layers(ffns):
            return [name for name, _ in EfficientViTMSRA(tiny | {"ffns": ffns}).blocks1[0].named_children()]

        assert layers((1, 1)) == ["dw0", "ffn0", "mixer", "dw1", "ffn1"]
        assert layers((0, 1)) == ["mixer", "dw0", "ffn0"]
        assert layers((2, 2)) == ["dw0", "ffn0", "dw1", "ffn1", "mixer", "dw2", "ffn2", "dw3", "ffn3"]

    def test_written_out_defaults_are_the_network_of_the_paper(self, tiny):
        written = {"head_input": "cascade", "ffns": (1, 1), "ffn_ratio": 2, "key_dim": (4, 4, 4)}
        torch.manual_seed(0)
        first = EfficientViTMSRA(tiny).state_dict()
        torch.manual_seed(0)
        second = EfficientViTMSRA(tiny | written).state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())

    @pytest.mark.parametrize("switch", SWITCHES, ids=str)
    def test_every_parameter_learns_and_deploy_is_exact(self, build, tiny, switch):
        model = build(tiny | switch, num_classes=10, img_size=96)
        learner = copy.deepcopy(model).train()
        learner(golden_input(4, 96, 96)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.parameters())
        model, images = model.double(), golden_input(2, 96, 112).double()
        with torch.no_grad():
            expected = model(images)
            model.backbone.switch_to_deploy()
            model.head.switch_to_deploy()
            assert (model(images) - expected).abs().max() < 1e-9  # as for the paper's networks
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())

    def test_kernels_refuse_heads_that_do_not_cascade(self, build, tiny):
        model = build(tiny | {"head_input": "slice"})
        with pytest.raises(BackendUnsupported, match=r"blocks1\.0.*head_input must be 'cascade'; got 'slice'"):
            model.backbone.switch_to_deploy("triton")
        assert not model.backbone.deploy

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"key_dim": (4, 4)}, r"arch\['key_dim'\] must be one number or 3; got \(4, 4\)"),
            ({"key_dim": (4, 0, 4)}, "key_dim must be positive; got 0"),
            ({"ffns": 1}, r"arch\['ffns'\] must be \(before, after\)"),
            ({"ffns": (0, 0)}, "not both 0"),
            ({"ffns": (-1, 2)}, "not negative"),
            ({"ffn_ratio": 0.5}, "at least 1; got 0.5"),
            ({"head_input": "all"}, "head_input must be one of"),
        ],
    )
    def test_bad_switches(self, tiny, change, message):
        with pytest.raises(ValueError, match=message):
            EfficientViTMSRA(tiny | change)


class TestConfigs:
    @pytest.mark.parametrize("ablation", CHANGES)
    def test_differ_from_the_base_in_what_they_say(self, ablation):
        base, other = config(BASE).to_dict(), config(name_of(ablation)).to_dict()
        expected = copy.deepcopy(base)
        expected["model"]["backbone"]["arch"] |= CHANGES[ablation]
        expected["model"]["head"]["in_channels"] = expected["model"]["backbone"]["arch"]["channels"][-1]
        assert other == expected

    @pytest.mark.parametrize("name", [BASE, *map(name_of, CHANGES)])
    def test_train_and_cost_what_the_metafile_says(self, name):
        settings = config(name)
        model = MODELS.build(settings.model).train()
        samples = [DataSample().set_gt_label(label) for label in (0, 9)]
        model.loss(golden_input(2, 112, 112), samples)["loss"].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert model.eval()(torch.zeros(1, 3, 112, 112)).shape == (1, 10)
        assert counter.get_total_flops() // 2 == find_model(name).macs
        assert parameters(model) == find_model(name).parameters

    @pytest.mark.parametrize("ablation", ["no-sandwich", "no-cascade", "uniform-qkv", "ffn-ratio-4"])
    def test_cost_as_many_multiply_adds_where_the_card_says_so(self, ablation):
        assert abs(find_model(name_of(ablation)).macs / find_model(BASE).macs - 1) < 0.02

    def test_budget(self):
        settings = config(BASE)
        assert settings.train_cfg.max_epochs == 1
        for loader, split in (("train", "train"), ("val", "test"), ("test", "test")):
            dataset = settings[f"{loader}_dataloader"].dataset
            assert (dataset.type, dataset.split) == ("GzippedFashionMNIST", split)
            assert dataset.pipeline[-2].scale == settings.model.backbone.img_size
