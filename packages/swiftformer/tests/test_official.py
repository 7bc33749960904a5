"""Parity with the official implementation: key layouts, logits, inner maps, gradients, counts, and its traps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitreous_core.errors import StateMismatch
from vitreous_core.state import check_state
from vitreous_core.testing.golden import (
    golden_cotangent,
    golden_input,
    golden_manifest_state,
    golden_path,
    state_sha256,
)
from vitreous_swiftformer import EfficientAdditiveAttention, SwiftFormer, SwiftFormerHead
from vitreous_swiftformer.convert import from_official, to_official, to_timm

TESTS = Path(__file__).parent
STAGES = {
    "stem": "patch_embed",
    "norm": "norm",
    **{f"stage{stage + 1}": f"network.{2 * stage}" for stage in range(4)},
    **{f"down{stage}": f"network.{2 * stage - 1}" for stage in range(1, 4)},
}

Build = Callable[..., nn.Sequential]


@pytest.fixture(scope="module")
def xs(build: Build) -> nn.Sequential:
    return build("xs")


def load_golden(name: str) -> dict[str, np.ndarray]:
    with np.load(golden_path(TESTS, f"swiftformer_{name}.npz")) as file:
        return dict(file)


def load_manifest(name: str) -> dict[str, Any]:
    return json.loads(golden_path(TESTS, f"swiftformer_{name}.keys.json").read_text())


@pytest.mark.parametrize("name", ["xs", "s", "l1", "l3", "xs_nodist"])
def test_keys_shapes_and_order_are_the_official_ones(name: str) -> None:
    manifest = load_manifest(name)
    with torch.device("meta"):
        backbone = SwiftFormer(name.removesuffix("_nodist"))
        head = SwiftFormerHead(1000, backbone.channels[-1], distillation="nodist" not in name)
    ours = nn.ModuleDict({"backbone": backbone, "head": head})
    entries = [(key, list(tensor.shape)) for key, tensor in to_official(ours.state_dict()).items()]
    assert entries == [(entry["name"], entry["shape"]) for entry in manifest["entries"]]
    assert sum(parameter.numel() for parameter in ours.parameters()) == manifest["n_params"]


def test_conversion_both_ways_is_exact() -> None:
    manifest = load_manifest("xs")
    official = golden_manifest_state(manifest["entries"])
    assert state_sha256(official) == manifest["golden_state_sha256"]
    ours = from_official(official)
    back = to_official(ours)
    assert list(back) == list(official)
    assert all(back[name] is official[name] for name in official)
    assert from_official(back).keys() == ours.keys()
    with pytest.raises(StateMismatch, match=r"'backbone\.' or 'head\.'; got 'neck\.weight'"):
        to_official({"neck.weight": torch.zeros(1)})


def test_missing_surplus_and_foreign_class_counts_are_named(build: Build, tiny: dict[str, Any]) -> None:
    expected = build(tiny, num_classes=4).state_dict()
    official = to_official(build(tiny, num_classes=7).state_dict())
    # The official fine-tuning script drops `head_dist` where it means `dist_head`.
    with pytest.raises(StateMismatch, match=r"wrong shape.*head\.dist_head\.weight \(needs \(4, 16\), got \(7, 16\)\)"):
        check_state(expected, from_official(official))
    official = to_official(expected)
    official["network.0.0.gamma"] = official.pop("network.0.0.layer_scale")
    with pytest.raises(
        StateMismatch, match=r"missing: backbone\.network\.0\.0\.layer_scale; surplus: backbone\.network\.0\.0\.gamma"
    ):
        check_state(expected, from_official(official))


@pytest.mark.parametrize("name", ["xs", "l1"])
@torch.no_grad()
def test_logits_and_inner_maps(build: Build, name: str) -> None:
    golden = load_golden(f"{name}_224")
    model = build(name)
    assert state_sha256(to_official(model.state_dict())) == str(golden["state_sha256"])
    images = golden_input(2, 224, 224)
    # Measured: 1.8e-6 and 3.0e-6, the noise of fp32 itself.
    assert np.abs(model(images).numpy() - golden["logits_f64"]).max() < 2e-5

    model.double()
    outputs = record_outputs(model.backbone)
    # Measured: 5e-15 and 8e-15.
    assert np.abs(model(images.double()).numpy() - golden["logits_f64"]).max() < 1e-8
    check_probes(outputs, golden, "stage", STAGES.__getitem__)
    check_probes(outputs, golden, "block", str)


def record_outputs(module: nn.Module) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for name, child in module.named_modules():
        child.register_forward_hook(lambda _, __, y, name=name: outputs.__setitem__(name, y))
    return outputs


def check_probes(
    outputs: dict[str, Tensor], golden: dict[str, np.ndarray], kind: str, locate: Callable[[str], str]
) -> None:
    for index, name in enumerate(golden[f"{kind}_names"].tolist()):
        y = outputs[locate(name)]
        assert list(y.shape) == [size for size in golden[f"{kind}_shape"][index] if size], name
        # The stored values are those of a float32 run.
        assert y.mean().item() == pytest.approx(golden[f"{kind}_mean"][index], abs=2e-5), name
        assert y.std(correction=0).item() == pytest.approx(golden[f"{kind}_std"][index], rel=2e-5), name
        first = y.flatten()[:8].numpy()
        assert np.abs(first - golden[f"{kind}_first8"][index]).max() < 2e-5 * max(1.0, np.abs(first).max()), name


def test_training_forward_gradients_and_statistics(build: Build) -> None:
    golden = load_golden("xs_train")
    model = build("xs").double().train()
    scores = model(golden_input(*golden["input_shape"][[0, 2, 3]].tolist(), seed=1).double())
    loss = sum((golden_cotangent(y.shape, 7 + i).double() * y).sum() for i, y in enumerate(scores))
    loss.backward()
    # Measured: logits and loss 2e-15, gradients 1e-14 and statistics 2e-16 relative.
    assert len(scores) == int(golden["n_outputs"])
    for index, y in enumerate(scores):
        assert np.abs(y.detach().numpy() - golden[f"logits_{index}"]).max() < 1e-8
    assert loss.item() == pytest.approx(float(golden["loss"]), abs=1e-8)

    parameters = dict(model.named_parameters())
    for name, norm, first in zip(golden["grad_names"], golden["grad_l2"], golden["grad_first"], strict=True):
        gradient = parameters.pop(next(iter(from_official({str(name): None})))).grad
        # Biases before a batch norm have no gradient but rounding.
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-8, abs=1e-10), name
        assert gradient.flatten()[0].item() == pytest.approx(first, rel=1e-8, abs=1e-8 * norm + 1e-10), name
    assert not parameters
    buffers = to_official(dict(model.named_buffers()))
    for name, norm in zip(golden["buffer_names"], golden["buffer_l2"], strict=True):
        assert buffers[str(name)].norm().item() == pytest.approx(norm, rel=1e-10), name


@pytest.mark.parametrize(
    ("name", "two_heads", "one_head", "millions_of_macs"),
    [
        ("xs", 3_475_360, 3_254_360, 602.43),
        ("s", 6_092_128, 5_867_128, 984.60),
        ("l1", 12_057_920, 11_672_920, 1595.99),
        ("l3", 28_494_736, 27_981_736, 4008.37),
    ],
)
def test_counts_of_parameters_and_macs(name: str, two_heads: int, one_head: int, millions_of_macs: float) -> None:
    for distillation, parameters in ((True, two_heads), (False, one_head)):
        with torch.device("meta"):
            backbone = SwiftFormer(name)
            head = SwiftFormerHead(1000, backbone.channels[-1], distillation)
        assert sum(p.numel() for module in (backbone, head) for p in module.parameters()) == parameters
        second = 0 if distillation else 1000 * backbone.channels[-1]
        assert count_macs(backbone, head, 224) == pytest.approx(1e6 * millions_of_macs - second, abs=5e3)


def test_macs_at_512() -> None:
    with torch.device("meta"):
        backbone, head = SwiftFormer("l1"), SwiftFormerHead(1000, 384)
    assert count_macs(backbone, head, 512) == pytest.approx(8.335e9, abs=5e5)


def count_macs(backbone: SwiftFormer, head: SwiftFormerHead, size: int) -> int:
    """Multiply-adds of convolutions, linear maps and `Q w_g`.

    The tables do not count the weighted sum of the queries, which officially is a product and a sum.
    """
    with FlopCounterMode(display=False) as counter:
        maps = backbone.eval()(torch.empty(1, 3, size, size, device="meta"))
        head.eval()(maps)
    uncounted, side = 0, (size + 3) // 4
    for channels in backbone.channels:
        uncounted += side * side * channels
        side = (side + 1) // 2
    return counter.get_total_flops() // 2 - uncounted


@torch.no_grad()
def test_first_released_attention_is_another_model(xs: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its softmax over an axis of size one made every weight one; keys and shapes are the same.
    def forward(self: EfficientAdditiveAttention, x: Tensor) -> Tensor:
        query, key = (F.normalize(layer(x), dim=-1) for layer in (self.to_query, self.to_key))
        weights = (query @ self.w_g * self.scale).softmax(dim=-1)
        return self.final(self.Proj((weights * query).sum(1, keepdim=True) * key) + query)

    images = golden_input(2, 224, 224)
    corrected = xs(images)
    monkeypatch.setattr(EfficientAdditiveAttention, "forward", forward)
    # The shared notes measured 7.7 on the official code.
    assert (xs(images) - corrected).abs().max().item() == pytest.approx(7.7, abs=0.1)


@torch.no_grad()
def test_agrees_with_timm(xs: nn.Sequential) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: no second opinion on any input size")
    other = timm.create_model("swiftformer_xs").eval()
    other.load_state_dict(to_timm(xs.state_dict()))
    for height, width in ((224, 224), (96, 160), (65, 33), (5, 7)):
        images = golden_input(2, height, width)
        # Measured: 2e-6, for logits of size 3.
        assert (xs(images) - other(images)).abs().max() < 2e-5
