"""The backbone and head as MMPretrain and PyTorch users expect them: outputs, sizes, freezing, recomputation."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitreous_core.testing.golden import golden_input
from vitreous_swiftformer import SwiftFormer, SwiftFormerHead
from vitreous_swiftformer.model import ConvEncoder, SwiftFormerEncoder

Build = Callable[..., nn.Sequential]


def test_import_is_light() -> None:
    code = (
        "import sys, vitreous_swiftformer; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'mmengine', 'mmpretrain', 'mmcv', 'timm'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (37, 21), (5, 3), (1, 1)], ids=str)
@torch.no_grad()
def test_maps_of_every_stage_at_any_size(build: Build, tiny: dict[str, Any], size: tuple[int, int]) -> None:
    backbone = build(tiny, out_indices=(0, 1, 2)).backbone
    maps = backbone(golden_input(2, *size))
    sides = [tuple(((r + 1) // 2 + 1) // 2 for r in size)]
    for _ in range(2):
        sides.append(tuple((r + 1) // 2 for r in sides[-1]))
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, *side) for channels, side in zip(tiny["channels"], sides, strict=True)
    ]
    assert all(m.isfinite().all() for m in maps)


@torch.no_grad()
def test_out_indices(build: Build, tiny: dict[str, Any]) -> None:
    images = golden_input(1, 32, 32)
    every = build(tiny, out_indices=(0, 1, 2)).backbone(images)
    for chosen, stages in ((-2, (1,)), ([2, 0], (0, 2)), ((-1, 1), (1, 2))):
        maps = build(tiny, out_indices=chosen).backbone(images)
        assert len(maps) == len(stages)
        assert all(torch.equal(m, every[stage]) for m, stage in zip(maps, stages, strict=True))
    assert len(SwiftFormer(tiny)(images)) == 1


def test_norms_are_named_as_officially() -> None:
    with torch.device("meta"):
        classification, dense = SwiftFormer("xs"), SwiftFormer("xs", out_indices=(0, 1, 2, 3))
    shared = {name for name in classification.state_dict() if not name.startswith("norm")}
    norms = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert set(classification.state_dict()) == shared | {f"norm.{name}" for name in norms}
    assert set(dense.state_dict()) == shared | {f"norm{i}.{name}" for i in (0, 2, 4, 6) for name in norms}


@torch.no_grad()
def test_last_norm_loads_under_both_names(build: Build, tiny: dict[str, Any]) -> None:
    images = golden_input(1, 32, 32)
    classification = build(tiny).backbone
    dense = SwiftFormer(tiny, out_indices=(0, 2)).eval()
    report = dense.load_state_dict(classification.state_dict(), strict=False)
    assert {name.partition(".")[0] for name in report.missing_keys} == {"norm0"}
    assert not report.unexpected_keys
    assert torch.equal(dense(images)[-1], classification(images)[-1])
    again = SwiftFormer(tiny).eval()
    report = again.load_state_dict(dense.state_dict(), strict=False)
    assert not report.missing_keys
    assert torch.equal(again(images)[-1], classification(images)[-1])


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_frozen_stages(build: Build, tiny: dict[str, Any], frozen: int) -> None:
    backbone = build(tiny, out_indices=(0, 1, 2), frozen_stages=frozen).backbone.train()
    before = copy.deepcopy(backbone.state_dict())
    sum(m.square().sum() for m in backbone(golden_input(2, 32, 32).requires_grad_())).backward()
    torch.optim.SGD(backbone.parameters(), lr=0.1).step()
    inside = ["patch_embed.", *(f"network.{i}." for i in range(2 * frozen - 1))]
    inside += [f"norm{2 * stage}." for stage in range(frozen)]
    for name, value in backbone.state_dict().items():
        if name.startswith(tuple(inside)):
            assert torch.equal(value, before[name]), name
        elif not name.endswith("bias"):  # before a batch norm they have no gradient but rounding
            assert not torch.equal(value, before[name]), name
    assert all(p.requires_grad != n.startswith(tuple(inside)) for n, p in backbone.named_parameters())


def test_norm_eval(build: Build, tiny: dict[str, Any]) -> None:
    backbone = build(tiny, norm_eval=True).backbone.train()
    assert backbone.training
    assert not any(m.training for m in backbone.modules() if isinstance(m, _BatchNorm))
    before = copy.deepcopy(dict(backbone.named_buffers()))
    backbone(golden_input(2, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    assert all(p.requires_grad for p in backbone.parameters())


def test_recomputation_changes_nothing(build: Build, tiny: dict[str, Any]) -> None:
    results = []
    for with_cp in (False, True):
        backbone = build(tiny, with_cp=with_cp, drop_path_rate=0.5).backbone.double().train()
        images = golden_input(4, 32, 32).double().requires_grad_()
        torch.manual_seed(3)
        (maps,) = backbone(images)
        maps.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
        results.append({"maps": maps, "images": images.grad, **gradients, **dict(backbone.named_buffers())})
    plain, recomputed = results
    assert all(torch.equal(recomputed[name], value) for name, value in plain.items())


def test_stochastic_depth_reaches_every_branch(tiny: dict[str, Any]) -> None:
    # Officially only the attention blocks' branches are dropped, and the script never passes a rate.
    backbone = SwiftFormer(tiny, drop_path_rate=0.4)
    blocks = [block for stage in backbone.network[::2] for block in stage]
    assert [block.drop_path for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    locals_ = [block.local_representation.drop_path for block in blocks if isinstance(block, SwiftFormerEncoder)]
    assert locals_ == pytest.approx([0.1, 0.2, 0.4])


@torch.no_grad()
def test_a_dropped_branch_leaves_the_image_and_a_kept_one_is_scaled_up() -> None:
    torch.manual_seed(0)
    block = ConvEncoder(4, 8, drop_path=0.75).train()
    block.norm.eval()
    x = torch.randn(64, 4, 3, 3)
    branch = block.eval()(x) - x
    block.train()
    block.norm.eval()
    change = block(x) - x
    kept = change.abs().amax(dim=(1, 2, 3)) > 0
    assert 4 <= kept.sum() <= 28
    assert torch.allclose(change[kept], 4 * branch[kept], atol=1e-6)


def test_initial_values(tiny: dict[str, Any]) -> None:
    model = SwiftFormer("s")
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("layer_scale_1", "layer_scale_2"):
            assert (parameter == 1e-5).all(), name
        elif leaf == "layer_scale" or (leaf == "weight" and parameter.ndim == 1):
            assert (parameter == 1).all(), name
        elif leaf == "bias":
            assert not parameter.any(), name
    linear, w_g = model.network[6][-1].attn.Proj.weight, model.network[6][-1].attn.w_g
    # Standard errors of a standard deviation from 50,176 and 224 draws: 0.3 % and 5 %.
    assert linear.std().item() == pytest.approx(0.02, rel=0.02)
    assert w_g.std().item() == pytest.approx(1.0, rel=0.25)


def test_layer_depth_covers_every_parameter() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"backbone": SwiftFormer("xs"), "head": SwiftFormerHead(10, 220)})
    backbone = model.backbone
    depths = {name: backbone.get_layer_depth(name, "backbone.") for name, _ in model.named_parameters()}
    assert {total for _, total in depths.values()} == {sum(backbone.depths) + 2}
    assert {depth for depth, _ in depths.values()} == set(range(sum(backbone.depths) + 2))
    expected = {
        "backbone.patch_embed.0.weight": 0,
        "backbone.network.0.0.dwconv.weight": 1,
        "backbone.network.0.2.attn.w_g": 3,
        "backbone.network.1.proj.weight": 4,
        "backbone.network.2.0.layer_scale": 4,
        "backbone.network.6.3.linear.fc2.bias": 16,
        "backbone.norm.weight": 17,
        "head.head.weight": 17,
    }
    assert {name: depths[name][0] for name in expected} == expected


@torch.no_grad()
def test_head_gives_the_pair_while_training_and_the_mean_in_evaluation() -> None:
    head = SwiftFormerHead(5, 8, distillation=True)
    feats = (torch.zeros(1), golden_input(2, 4, 6).repeat(1, 3, 1, 1)[:, :8])
    pooled = feats[-1].mean((2, 3))
    pair = head(feats)
    assert isinstance(pair, tuple)
    assert torch.equal(pair[0], head.head(pooled))
    assert torch.equal(pair[1], head.dist_head(pooled))
    assert torch.allclose(head.eval()(feats), torch.stack(pair).mean(0), atol=1e-7)
    single = SwiftFormerHead(5, 8)
    assert isinstance(single(feats), Tensor)
    assert not [name for name in single.state_dict() if "dist" in name]


@pytest.mark.compile
def test_trains_in_one_compiled_graph(build: Build, tiny: dict[str, Any]) -> None:
    for with_cp in (False, True):
        plain = build(tiny, with_cp=with_cp).backbone.train()
        compiled = copy.deepcopy(plain)
        images = golden_input(2, 32, 32)
        plain(images)[0].square().sum().backward()
        torch.compile(compiled, backend="aot_eager", fullgraph=True)(images)[0].square().sum().backward()
        for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3)
        for a, b in zip(plain.buffers(), compiled.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@torch.no_grad()
def test_batch_of_none_and_memory_formats(build: Build, tiny: dict[str, Any]) -> None:
    model = build(tiny)
    images = golden_input(2, 32, 48)
    assert model(images[:0]).shape == (0, 1000)
    strided = images.to(memory_format=torch.channels_last)
    assert torch.allclose(model.to(memory_format=torch.channels_last)(strided), model(images), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"arch": "xl"}, ValueError, r"arch must be one of \['xs', 's', 'l1', 'l3'\] or a dict; got 'xl'"),
        ({"arch": 3}, TypeError, "arch must be a name or a dict; got int"),
        ({"arch": {"channels": (8, 8)}}, ValueError, r"needs channels and depths.*got \['channels'\]"),
        ({"arch": {"channels": (8, 8), "depths": (1,)}}, ValueError, "every stage"),
        ({"arch": {"channels": (8, 8), "depths": (1, 0)}}, ValueError, "depth of at least 1"),
        ({"out_indices": 4}, ValueError, r"out_indices must lie in -4\.\.3; got 4"),
        ({"out_indices": "last"}, TypeError, "out_indices must be an int or a sequence of ints"),
        ({"out_indices": ()}, TypeError, "out_indices must be"),
        ({"frozen_stages": 5}, ValueError, r"frozen_stages must lie in -1\.\.4; got 5"),
        ({"drop_path_rate": 1.0}, ValueError, r"drop_path_rate must lie in \[0, 1\); got 1\.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SwiftFormer(**settings)


def test_bad_inputs(tiny: dict[str, Any]) -> None:
    backbone = SwiftFormer(tiny)
    for shape in ((3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32)):
        with pytest.raises(ValueError, match=r"x must be images \[B, 3, height, width\]"):
            backbone(torch.zeros(shape))
    with pytest.raises(ValueError, match="num_classes must be positive; got 0"):
        SwiftFormerHead(0, 8)
