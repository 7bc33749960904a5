"""The packaged small models through `vitreous export`'s machinery: what each format takes, and what it refuses."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

from vitreous_core.bench.rows import read_rows
from vitreous_core.errors import UserError
from vitreous_core.export import record
from vitreous_core.export.api import export_model
from vitreous_core.export.formats import FORMATS, Format
from vitreous_core.testing.golden import golden_state
from vitreous_core.zoo import ModelCard, models

# Formats whose tools lack operators of other models, or compute them wrongly: there a refusal is right as well.
PARTIAL = {"executorch", "coreml"}
FOLDING = {"efficientvit", "swiftformer"}
ALWAYS = [("onnx", "efficientvit"), ("onnx", "swiftformer")]
"""What every test run does; the rest takes minutes and is for `nox -s exports`."""

each_pair = pytest.mark.parametrize(
    ("card", "kind"),
    [
        pytest.param(
            card, kind, id=f"{card.name}-{kind.name}",
            marks=() if (kind.name, card.paper.name) in ALWAYS else pytest.mark.exports,
        )
        for card in models() if card.is_digits for kind in FORMATS.values()
    ],
)  # fmt: skip


@each_pair
def test_small_models(card: ModelCard, kind: Format, tmp_path: Path) -> None:
    missing = [name for name in kind.modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: --format {kind.name} is NOT TESTED here")
    import vitreous_core.mm  # noqa: F401
    from vitreous_core.mm.models import Logits, build_model, input_size
    from vitreous_core.mm.train import load_config

    config = load_config(card.config)
    model = Logits(build_model(config)).eval()
    # Initial weights hide whole branches behind zeros.
    model.load_state_dict(golden_state(model.state_dict()))
    path = tmp_path / f"model{kind.suffix}"
    try:
        exported = export_model(model, path, kind.name, size=input_size(config))
    except UserError as refusal:
        if kind.name not in PARTIAL or card.paper.name in FOLDING:
            raise
        if "\n" in str(refusal) or path.exists():
            raise
        pytest.skip(f"refused: {refusal}")
    assert exported.runners[-1].error < 1e-4
    assert exported.folded == (card.paper.name in FOLDING)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, *input_size(config))).isfinite().all()


def test_what_an_export_finds_is_recorded_and_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "swiftformer-xs_1xb64_digits"
    assert record.main([name, "--format", "pt2", "--out", str(tmp_path)]) == 0
    (row,) = read_rows(tmp_path)
    assert (row["model"], row["format"], row["folded"], row["batch"]) == (name, "pt2", True, 1)
    assert [runner["name"] for runner in row["runners"]][-1] == row["runtime"]
    cells = runpy.run_path("docs/tables.py")["export_row"](row)
    assert cells[0] == "swiftformer-xs"
    assert all(0 < float(error) < 1e-4 for error in cells[3:6])
    apple = {**row, "runtime": "Core ML", "runners": row["runners"][:2]}
    assert runpy.run_path("docs/tables.py")["export_row"](apple)[5] == "not run here"
    assert record.main(["no-such-model", "--format", "pt2", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
