"""Sizes and costs of M0 to M5 as measured on the official code, and the tables that repeat them."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitreous_efficientvit

METAFILE = Path(vitreous_efficientvit.__file__).parent / ".mim/configs/efficientvit/metafile.yml"

# arch: parameters, with two heads, after folding the batch norms, 1e6 multiply-adds at 224.
TABLE = {
    "m0": (2_349_436, 2_542_820, 2_334_916, 79.19),
    "m1": (2_980_560, 3_173_944, 2_964_256, 167.05),
    "m2": (4_187_554, 4_413_002, 4_168_338, 201.04),
    "m3": (6_900_722, 7_222_362, 6_875_890, 262.66),
    "m4": (8_804_228, 9_189_996, 8_776_340, 299.31),
    "m5": (12_473_772, 12_859_540, 12_436_260, 521.58),
}
ENTRIES = {"m0": 699, "m1": 615, "m2": 603, "m3": 675, "m4": 699, "m5": 835}
OTHER_SIZES = {("m4", 384): 840.1, ("m4", 512): 1594.8, ("m5", 384): 1494.3, ("m5", 512): 2799.8}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model, size):
    """Convolutions, matrix products and linear layers, without batch norms, activations and pooling."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("arch", TABLE)
def test_parameters_and_cost(build, arch):
    plain, two_heads, folded, cost = TABLE[arch]
    model = build(arch, golden=False)
    assert parameters(model) == plain
    assert round(multiply_adds(model, 224) / 1e6, 2) == cost
    assert parameters(build(arch, distillation=True, golden=False)) == two_heads
    tables = [table for name, table in model.named_parameters() if name.endswith("attention_biases")]
    assert len(model.state_dict()) + len(tables) == ENTRIES[arch]  # official files hold the index buffers too
    model.backbone.switch_to_deploy()
    model.head.switch_to_deploy()
    # The official fusion keeps the bias tables; ours holds the bias of every pair of tokens as a buffer instead.
    assert parameters(model) + sum(table.numel() for table in tables) == folded
    assert round(multiply_adds(model, 224) / 1e6, 2) == cost


@pytest.mark.parametrize(("arch", "size"), OTHER_SIZES)
def test_cost_at_other_sizes(build, arch, size):
    assert round(multiply_adds(build(arch, golden=False, img_size=size), size) / 1e6, 1) == OTHER_SIZES[arch, size]


def test_attention_products_of_m0(build):
    model = build("m0", golden=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert round(products / 2 / 1e6, 2) == 2.35


def test_layers_of_m4(build):
    counted = [m for m in build("m4", golden=False).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(counted) == 117


def test_metafile_repeats_these_numbers(build):
    models = yaml.safe_load(METAFILE.read_text())["Models"]
    by_arch = {entry["Name"].split("-")[2].split("_")[0]: entry for entry in models if "in1k" in entry["Name"]}
    assert by_arch.keys() == TABLE.keys()
    for arch, entry in by_arch.items():
        assert entry["Metadata"]["Parameters"] == TABLE[arch][0]
        assert entry["Metadata"]["FLOPs"] == multiply_adds(build(arch, golden=False), 224)
