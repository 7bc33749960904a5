"""The committed tables are what the recorded files give, and the ledger is complete."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml

from vitreous_core.papers import papers

ROOT = Path(__file__).parents[1]


def test_committed_tables_are_what_the_files_give(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitreous_core.bench import render

    monkeypatch.chdir(ROOT)
    tables = runpy.run_path("docs/tables.py")
    assert tables["main"](["--check"]) == 0, "run `nox -s tables`"
    assert render.main(["--check"]) == 0, "run `nox -s tables`"


def test_every_paper_has_claims_with_a_source() -> None:
    ledger = {
        entry["paper"]: entry["claims"] for entry in yaml.safe_load((ROOT / "docs/results/claims.yml").read_text())
    }
    assert set(ledger) == {paper.name for paper in papers()}
    for claims in ledger.values():
        assert len(claims) >= 5
        for claim in claims:
            assert (
                {"claim", "quoted", "source"} <= set(claim) <= {"claim", "quoted", "source", "ours", "verdict", "note"}
            )
