"""Conversion from and to Microsoft's layout."""

import pytest
import torch
from torch import nn

from vitreous_core.errors import StateMismatch
from vitreous_core.state import check_state
from vitreous_flash_window import FlashSwinTransformer, FlashSwinTransformerV2
from vitreous_flash_window.convert import from_official, to_official

ARCH = {"embed_dims": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}


@pytest.fixture(params=["v1", "v2"])
def model(request, fill):
    if request.param == "v1":
        backbone = FlashSwinTransformer(ARCH, window_size=4)
    else:
        backbone = FlashSwinTransformerV2({**ARCH, "extra_norm_every_n_blocks": 0}, window_size=4)
    classifier = nn.ModuleDict({"backbone": backbone, "head": nn.ModuleDict({"fc": nn.Linear(32, 5)})})
    classifier.version = request.param
    return fill(classifier)


def test_official_names(model):
    names = set(to_official(model.state_dict()))
    block = {"norm1.weight", "attn.qkv.weight", "attn.proj.bias", "attn.relative_position_index", "mlp.fc1.weight"}
    block |= {"mlp.fc2.bias", "norm2.bias"}
    block |= (
        {"attn.relative_position_bias_table", "attn.qkv.bias"}
        if model.version == "v1"
        else {"attn.logit_scale", "attn.q_bias", "attn.v_bias", "attn.cpb_mlp.0.bias", "attn.relative_coords_table"}
    )
    assert {f"layers.2.blocks.1.{name}" for name in block} <= names
    assert {"patch_embed.proj.weight", "patch_embed.norm.bias", "norm.weight", "head.weight", "head.bias"} <= names
    # In the official code patch merging ends stages 0 and 1.
    merging = {name.split(".")[1] for name in names if ".downsample." in name}
    assert merging == {"0", "1"}
    assert not any(part in name for name in names for part in ("backbone", "w_msa", "stages", "ffn", "norm2.norm"))


def test_both_directions_are_exact_inverses(model):
    state = model.state_dict()
    official = to_official(state)
    back = from_official(official)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    again = to_official(back)
    assert list(again) == list(official)
    assert all(torch.equal(again[name], official[name]) for name in official)


def official_merging(x, official, stage, v2):
    """Patch merging as the official code has it: four strided maps side by side."""
    cells = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
    weight, bias = (official[f"layers.{stage}.downsample.norm.{name}"] for name in ("weight", "bias"))
    reduction = official[f"layers.{stage}.downsample.reduction.weight"]
    if v2:
        return nn.functional.layer_norm(cells @ reduction.T, weight.shape, weight, bias)
    return nn.functional.layer_norm(cells, weight.shape, weight, bias) @ reduction.T


def test_patch_merging_computes_the_same_from_official_weights(model, draw):
    v2 = model.version == "v2"
    official = to_official(model.double().state_dict())
    merging = model["backbone"].stages[1 if v2 else 0].downsample
    x = draw(2, 6, 4, 8)
    ours, shape = merging(x.flatten(1, 2), (6, 4))
    assert shape == (3, 2)
    torch.testing.assert_close(ours.view(2, 3, 2, 16), official_merging(x, official, 0, v2), rtol=0, atol=1e-13)


def test_derived_masks_are_dropped_and_old_names_made_new(model):
    state = model.state_dict()
    official = to_official(state) | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    check_state(state, from_official(official))
    old = {name.replace("backbone.norm2.", "backbone.norm."): tensor for name, tensor in state.items()}
    old["backbone.stages.0.blocks.1.attn.attn_mask"] = torch.zeros(4, 16, 16)
    normal = from_official(old)
    check_state(state, normal)
    assert all(normal[name] is old.get(name, normal[name]) for name in normal), "MMPretrain's layout is ours"


def test_missing_and_surplus_keys_are_named(model):
    state, official = model.state_dict(), to_official(model.state_dict())
    del official["layers.1.blocks.0.mlp.fc1.bias"]
    official["layers.1.blocks.0.attn.rope"] = torch.zeros(1)
    with pytest.raises(StateMismatch) as error:
        check_state(state, from_official(official))
    assert "missing: backbone.stages.1.blocks.0.ffn.layers.0.0.bias" in str(error.value)
    assert "surplus: backbone.stages.1.blocks.0.attn.w_msa.rope" in str(error.value)


def test_keys_that_are_not_a_classifiers_are_refused():
    with pytest.raises(StateMismatch, match=r"keys must start with 'backbone\.' or 'head\.fc\.'; got 'neck\.weight'"):
        to_official({"neck.weight": torch.zeros(1)})
    with pytest.raises(StateMismatch, match="four pixels"):
        from_official({"layers.0.downsample.reduction.weight": torch.zeros(2, 6)})
