"""Official key layouts to ours and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vitreous_core.errors import StateMismatch
from vitreous_core.state import check_state
from vitreous_core.testing.golden import golden_manifest_state, golden_path
from vitreous_hilbert_attn import (
    HilbertNeighborhoodTransformer,
    HilbertWindowTransformer,
    NeighborhoodAttentionTransformer,
)
from vitreous_hilbert_attn.convert import from_official, to_official

HERE = Path(__file__).parent
MODELS = {
    "hwt_tiny_224": (HilbertWindowTransformer, 768),
    "hnt_mini_224": (HilbertNeighborhoodTransformer, 512),
    "hnt_mini_224_norpb": (lambda: HilbertNeighborhoodTransformer(relative_bias=False), 512),
    # NAT's releases name everything as HNT's does; only the tables are of 13 x 13 offsets.
    "nat_mini": (NeighborhoodAttentionTransformer, 512),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], nn.Module]:
    """The official state dict of a model, and ours as an MMPretrain classifier lays it out."""
    manifest = request.param.removesuffix("_norpb").replace("nat_mini", "hnt_mini_224")
    entries = json.loads(golden_path(HERE, f"{manifest}.keys.json").read_text())["entries"]
    if request.param.endswith("_norpb"):
        entries = [entry for entry in entries if not entry["name"].endswith(".rpb")]
    if request.param == "nat_mini":
        entries = [
            entry | {"shape": [entry["shape"][0], 13, 13]} if entry["name"].endswith(".rpb") else entry
            for entry in entries
        ]
    build, channels = MODELS[request.param]
    model = nn.ModuleDict({"backbone": build(), "head": nn.ModuleDict({"fc": nn.Linear(channels, 1000)})})
    return golden_manifest_state(entries), model


def without_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("attn_mask")}


def test_official_keys_fit_the_model_exactly(case: tuple) -> None:
    official, model = case
    converted = from_official(official)
    check_state(model.state_dict(), converted)
    assert list(converted) == list(model.state_dict())
    model.load_state_dict(converted)
    torch.testing.assert_close(model["head"]["fc"].weight.data, official["head.weight"], rtol=0, atol=0)
    torch.testing.assert_close(model["backbone"].norm3.bias.data, official["norm.bias"], rtol=0, atol=0)


def test_both_directions_undo_each_other(case: tuple) -> None:
    official, model = case
    converted = from_official(official)
    assert to_official(converted) == without_masks(official)
    assert list(from_official(to_official(model.state_dict()))) == list(model.state_dict())


def test_missing_surplus_and_misshapen_keys_are_named(case: tuple) -> None:
    official, model = case
    wrong = dict(official)
    del wrong["norm.weight"]
    wrong["extra.weight"] = torch.zeros(1)
    wrong["head.bias"] = torch.zeros(7)
    with pytest.raises(StateMismatch) as refusal:
        check_state(model.state_dict(), from_official(wrong))
    message = str(refusal.value)
    assert "missing: backbone.norm3.weight" in message
    assert "surplus: backbone.extra.weight" in message
    assert "head.fc.bias (needs (1000,), got (7,))" in message


def test_masks_are_neither_needed_nor_rejected() -> None:
    model = HilbertWindowTransformer(
        {"embed_dims": 8, "depths": (2, 2), "num_heads": (1, 2)}, img_size=32, window_size=3
    )
    state = model.state_dict()
    assert not any("mask" in name for name in state)
    masks = {f"layers.{stage}.blocks.1.attn_mask": torch.zeros(4, 9, 9) for stage in (0, 1)}
    model.load_state_dict(state | masks)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.attn_mask"):
        model.load_state_dict(state | {"layers.0.attn_mask": torch.zeros(1)})
    assert "backbone.norm1.weight" in from_official(
        {"layers.1.blocks.0.norm1.weight": torch.zeros(1), "norm.weight": torch.zeros(1)}
    )
