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


def row(provider: str, time: str, latency: float, **others: object) -> dict[str, object]:
    facts = {"suite": "core", "case": "H/a", "mode": "fwd", "state": "ok", "device": "GPU", "peak_mib": 12.0}
    return facts | {"provider": provider, "time": time, "latency_ms_p50": latency} | others


def test_a_claim_takes_its_figures_from_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tables = runpy.run_path("docs/tables.py")
    rows = [
        row("slow", "1", 8.0), row("ours", "1", 4.0), row("slow", "2", 9.0), row("ours", "2", 2.0),
        row("ours", "3", 1.0), row("slow", "3", 1.0, state="out of memory"), row("slow", "2", 0.5, mode="fwd+bwd"),
    ]  # fmt: skip
    tables["our_figure"].__globals__["recorded_rows"] = lambda: rows
    origin = {"bench": "core", "cases": ["H/a"], "mode": "fwd"}
    assert tables["our_figure"](origin | {"speed_up": ["slow", "ours"]}) == "4.5×"
    assert tables["our_figure"](origin | {"ms": ["slow", "ours"]}) == "9 → 2 ms"
    assert tables["our_figure"](origin | {"mib": ["ours"]}) == "12 MiB"
    rows += [row("ours", "4", 3.0, facts={"batch": 128})]
    assert tables["our_figure"](origin | {"images_per_second": ["ours"]}) == "42,700"
    assert tables["hardware"](origin | {"ms": ["slow"]}) == "GPU"
    with pytest.raises(ValueError, match="no run of core H/a fwd has all of"):
        tables["our_figure"](origin | {"ms": ["slow", "other"]})
    with pytest.raises(ValueError, match="no run"):
        tables["our_figure"](origin | {"ms": ["slow"], "device": "another"})


def test_a_claim_about_accuracy_is_judged_by_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitreous_core.ablations import Comparison

    monkeypatch.chdir(ROOT)
    tables = runpy.run_path("docs/tables.py")
    names = ("efficientvit-msra-m0_1xb128_fashion-mnist", "efficientvit-msra-m0-no-cascade_1xb128_fashion-mnist")
    entry = {"claim": "a", "quoted": "−1 point", "ours": {"accuracy": list(names), "expected": "lower"}}
    ledger = [{"paper": "efficientvit", "title": "A", "claims": [entry | {"source": "b"}]}]

    def judge(*second: float) -> tuple[str, ...]:
        runs = Comparison(names, ([88.0, 88.2, 88.4], second), {"device": "GPU", "epochs": 1}) if second else None
        tables["compared"].__globals__["compared"] = lambda _: runs
        assert tables["claims_page"](ledger)
        assert len(tables["ablation_pages"](ledger)) == bool(second)
        return tables["our_figure"](entry["ours"]), tables["hardware"](entry["ours"]), tables["verdict"](entry)

    figure = "88.20 ± 0.20 → 87.20 ± 0.20 % on fashion-mnist"
    assert judge(87.0, 87.2, 87.4) == (figure, "GPU", "holds in part")
    assert judge(87.8, 88.0, 88.2)[2] == "not reproduced at this scale"  # within the noise
    assert judge(89.0, 89.2, 89.4)[2] == "not reproduced at this scale"  # the other way round
    assert judge() == ("–", "–", "not run here")
    with pytest.raises(ValueError, match="the runs give the verdict"):
        tables["verdict"](entry | {"verdict": "holds"})


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


def test_published_speeds_stand_beside_cases_that_there_are() -> None:
    from vitreous_core.bench.command import cases_of
    from vitreous_core.bench.quoted import read_quotes

    quotes = read_quotes(ROOT / "docs/results/quoted.yml")
    assert quotes
    providers = {
        (suite, case.name): {provider.name for provider in case.providers}
        for suite in {quote.suite for quote in quotes}
        for case in cases_of(suite)
    }
    for quote in quotes:
        assert (quote.suite, quote.case) in providers, quote
        assert quote.provider is None or quote.provider in providers[quote.suite, quote.case], quote
