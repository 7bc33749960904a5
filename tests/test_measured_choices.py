"""What `backend="auto"` chooses is what won in the rows of `docs/results/bench`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitreous_core.bench.render import newest_sheets
from vitreous_core.bench.rows import read_rows
from vitreous_efficientvit import EfficientViTMSRA
from vitreous_efficientvit.ops import choose_backend

BENCH = Path(__file__).parents[1] / "docs" / "results" / "bench"
OPERATORS = {
    "attention": "cascaded_group_attention",
    "ffn": "feed_forward",
    "depthwise": "halving_depthwise",
    "convolution": "halving_convolution",
}
_TIE = 1.05
"""Two runs of one kernel differ by less."""

SIDES = (14, 7, 4)  # maps of the three stages of a 224-pixel image


def test_fused_layers_of_efficientvit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitreous_efficientvit.ops.api.device_reasons", lambda device: [])
    times: dict[str, dict[str, float]] = {}
    for sheet in newest_sheets(read_rows(BENCH)):
        for row in sheet.rows:
            if row["mark"] == "E1-layers" and row["state"] == "ok":
                times.setdefault(row["case"], {})[row["provider"]] = row["latency_ms_p50"]
    judged = 0
    for case, of in times.items():
        layer, arch, place = case.split("/")[1].split("-")
        if layer not in OPERATORS or not {"triton", "folded"} <= of.keys():
            continue
        batch, number = int(case.rpartition("batch")[2]), int(place[-1])
        widths = EfficientViTMSRA.arch_settings[arch]["channels"]
        if layer == "convolution":
            channels, side = (3, *[widths[0] // part for part in (8, 4, 2)])[number - 1], 448 >> number
        else:  # the width of a merging, which is another, decides nothing
            channels, side = widths[number - 1], SIDES[number - 1]
        chosen = choose_backend(OPERATORS[layer], "cuda", torch.float16, channels, batch * side**2)
        taken = of["triton" if chosen == "triton" else "folded"]
        assert taken <= _TIE * min(of["triton"], of["folded"]), (case, of, chosen)
        judged += 1
    assert judged >= 64
