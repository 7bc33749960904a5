"""Parameters and multiply-adds of the published models, from MMPretrain's tables and the notes' roofline table."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitreous_flash_window import FlashSwinTransformer, FlashSwinTransformerV2

WINDOW_12 = {"stage_cfgs": {"block_cfgs": {"window_size": 12}}}

# Parameters (M) and GFLOP as MMPretrain's metafile has them: multiply-adds without the attention products. Then the
# forward GFLOP of the attention core (two per multiply-add).
V1 = [
    ("tiny", 224, {}, 28.29, 4.36, 0.280),
    ("small", 224, {}, 49.61, 8.52, 0.457),
    ("base", 224, {}, 87.77, 15.14, 0.610),
    ("large", 224, {}, 196.53, 34.04, 0.915),
    ("tiny", 384, WINDOW_12, None, None, 2.42),
    ("small", 384, WINDOW_12, None, None, 3.95),
    ("base", 384, WINDOW_12, 87.90, 44.49, 5.27),
    ("large", 384, WINDOW_12, 196.74, 100.04, 7.90),
]


def count(build, size):
    """Parameters with a head of 1000 classes, multiply-adds of the attention products, and of the rest."""
    with torch.device("meta"):
        backbone = build().eval()
        head = torch.nn.Linear(backbone.num_features[-1], 1000)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            head(backbone(torch.empty(1, 3, size, size))[-1].mean((2, 3)))
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    parameters = sum(p.numel() for module in (backbone, head) for p in module.parameters())
    return parameters, attention // 2, (counter.get_total_flops() - attention) // 2


@pytest.mark.parametrize(
    ("arch", "size", "options", "parameters", "metafile_gflop", "attention_gflop"), V1, ids=lambda v: str(v)[:6]
)
def test_v1_tables(arch, size, options, parameters, metafile_gflop, attention_gflop):
    counted, attention, rest = count(lambda: FlashSwinTransformer(arch, img_size=size, **options), size)
    assert f"{2 * attention / 1e9:.3g}" == f"{attention_gflop:.3g}"
    if parameters is not None:
        assert round(counted / 1e6, 2) == parameters
        # Their counter adds the norms' elements, between 0.05 and 0.25 % of the whole.
        assert 0.9975 < rest / 1e9 / metafile_gflop < 1.0


@pytest.mark.parametrize(
    # Parameters (M) as MMPretrain's metafile has them; multiply-adds (G) of the table in Microsoft's release.
    ("arch", "window", "parameters", "gflop"),
    [
        ("tiny", 8, 28.35, 5.9),
        ("tiny", [16, 16, 16, 8], 28.35, 6.6),
        ("small", 8, 49.73, 11.5),
        ("small", [16, 16, 16, 8], 49.73, 12.6),
        ("base", 8, 87.92, 20.3),
        ("base", [16, 16, 16, 8], 87.92, 21.8),
    ],
)
def test_v2_tables(arch, window, parameters, gflop):
    counted, attention, rest = count(lambda: FlashSwinTransformerV2(arch, window_size=window), 256)
    assert round(counted / 1e6, 2) == parameters
    assert abs((attention + rest) / 1e9 - gflop) < 0.21


def test_tiny_to_the_last_parameter():
    with torch.device("meta"):
        model = FlashSwinTransformer("tiny")
    assert sum(p.numel() for p in model.parameters()) == 27_519_354
    assert len(model.state_dict()) == 183
