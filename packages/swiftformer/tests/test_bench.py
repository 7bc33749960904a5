"""The benchmark's cases are whole, and its providers compute the same network."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from vitreous_core.bench.attention import BOTH, FORWARD
from vitreous_core.bench.models import INFER, ModelProblem
from vitreous_swiftformer import bench


def test_cases() -> None:
    cases = bench.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) > 0
    for case in cases:
        assert case.name.startswith(f"{case.mark}/")
        providers = {provider.name for provider in case.providers}
        assert case.ours in providers
        assert {goal.over for goal in case.goals} <= providers


@pytest.mark.parametrize("name", ["deploy", "eager", "timm"])
def test_providers_agree(name: str) -> None:
    if name == "timm":
        pytest.importorskip("timm", reason="timm is not installed: nothing of it is compared")
    case = next(case for case in bench.cases() if case.name == "S1/cpu-xs")
    (provider,) = (provider for provider in case.providers if provider.name == name)
    prepared = provider.prepare(case.problem, torch.device("cpu"))
    assert prepared.gate is not None
    gate = prepared.gate([INFER])
    assert gate.passed, gate


@pytest.mark.parametrize("name", ["S1-variants/s-batch1", "S1-float32/xs-batch128"])
def test_every_provider_of_a_variant_and_in_float32_is_built_and_agrees(name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed: nothing of it is compared")
    (case,) = (case for case in bench.cases() if case.name == name)
    problem = replace(case.problem, batch=2, dtype="float32")
    for provider in case.providers:
        prepared = provider.prepare(problem, torch.device("cpu"))
        assert prepared.gate is not None
        if not any(suffix in provider.name for suffix in ("graph", "compiled")):
            assert prepared.gate([INFER]).passed, provider.name


def test_all_variants_and_sizes_are_measured() -> None:
    measured: dict[str, set[tuple[str, int, int]]] = {}
    for case in bench.cases():
        if isinstance(case.problem, ModelProblem):
            problem = case.problem
            measured.setdefault(case.mark, set()).add((problem.network.split("-")[-1], problem.size, problem.batch))
            if case.device == "cuda" and not problem.autocast:
                assert (problem.dtype == "float32") == (case.mark == "S1-float32")
    networks = ("xs", "s", "l1", "l3")
    assert measured["S1-variants"] == {(arch, 224, batch) for arch in networks for batch in (1, 128)}
    assert measured["S1-sizes"] == {(arch, size, 128) for arch in networks for size in (384, 512)}
    assert measured["S1-float32"] == {(arch, 224, 128) for arch in networks}


def test_attention_agrees_with_the_truth() -> None:
    problem = bench.TokensProblem(2, 49, 24)
    eager = next(case for case in bench.cases() if case.mark == "attention").providers[1]
    prepared = eager.prepare(problem, torch.device("cpu"))
    assert prepared.gate is not None
    gate = prepared.gate([FORWARD, BOTH])
    assert set(gate.errors) == {"unit", "mixed", "dquery", "dkey", "dw_g"}
    assert gate.passed, gate
    assert problem.work(FORWARD).bytes == 4 * 2 * 49 * 24 * 2


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(bench.Unavailable, match="timm is not installed"):
        bench.timm_classifier("xs")
