"""The cases of this paper: every provider computes what its case says, on a small image and without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from vitreous_core.bench.attention import AttentionProblem, attention_provider, dense
from vitreous_core.bench.case import Case
from vitreous_hilbert_attn import bench
from vitreous_hilbert_attn.attention import CurveAttention, HilbertNeighborhoodAttention
from vitreous_hilbert_attn.attention_2d import NeighborhoodAttention2d

CPU = torch.device("cpu")
CASES = bench.cases()


def test_names_are_unique_and_start_with_the_mark() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.name.startswith(f"{case.mark}/")
        names = [provider.name for provider in case.providers]
        assert len(set(names)) == len(names)
        assert case.ours in names
        assert {goal.over for goal in case.goals} <= set(names)


def test_the_papers_own_sizes_are_there() -> None:
    names = {case.name for case in CASES}
    assert {"WSA/16/128", "WSA/8/64", "WSA/16/96", "SA/7/56", "SA/11/96", "SA/17/128", "NA/17/96", "NA/7/56"} <= names
    for family, size in (("WSA", 16), ("SA", 17), ("NA", 17)):
        assert f"{family}/{size}/256" in names


@pytest.mark.parametrize("case", [case for case in CASES if case.mark in ("sides", "batches")], ids=lambda c: c.name)
def test_a_sweep_names_its_axis(case: Case) -> None:
    facts = case.problem.facts()
    assert facts["axis"] == {"sides": "side", "batches": "batch"}[case.mark]
    assert str(facts[facts["axis"]]) == case.name.rpartition("/")[2]


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.problem, AttentionProblem)], ids=lambda c: c.name)
def test_providers_of_attention_ask_for_the_same_image(case: Case) -> None:
    for provider in case.providers:
        instead = provider.prepare.keywords["instead"]  # type: ignore[attr-defined]
        if instead is None:
            continue
        same = ("height", "width", "batch", "heads", "head_dim", "dtype", "bias_extent")
        assert [getattr(instead, name) for name in same] == [getattr(case.problem, name) for name in same]
        assert instead.order == "hilbert"
        # A window or kernel of the curve has as many tokens as the square.
        square = getattr(case.problem.pattern, "window", None) or case.problem.pattern.kernel  # type: ignore[attr-defined]
        assert (getattr(instead.pattern, "size", None) or instead.pattern.kernel) == square**2


def shrunk(problem: AttentionProblem) -> AttentionProblem:
    return replace(problem, height=14, width=14, batch=1, head_dim=8, dtype="float32")


@pytest.mark.parametrize("name", ["WSA/7/56", "SA/7/56", "NA/7/56"])
def test_every_way_gives_what_the_gate_asks_for(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    for provider in case.providers:
        settings = dict(provider.prepare.keywords)  # type: ignore[attr-defined]
        changes, instead = settings["changes"], settings["instead"]
        build = dense if settings["build"] is bench.ours else settings["build"]  # no GPU for the kernel here
        small = attention_provider(
            provider.name, build, instead=None if instead is None else shrunk(instead), **changes
        ).prepare(shrunk(case.problem), CPU)  # type: ignore[arg-type]
        assert small.gate is not None
        assert small.gate(bench.MODES).passed, provider.name


def tiny(dim: int, heads: int) -> CurveAttention:
    return HilbertNeighborhoodAttention(dim, heads, 5, backend="torch")


MODULE = bench.ModuleProblem(tiny, 6, batch=2, dim=16, dtype="float32")


class OffByAHundredth(HilbertNeighborhoodAttention):
    def attend(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        out = super().attend(qkv, size)
        return out if self.backend == "torch" else 1.01 * out


@pytest.mark.parametrize("on_curve", [False, True])
def test_the_gate_of_a_module_passes_and_can_fail(on_curve: bool) -> None:
    gate = bench._gate_module(MODULE, CPU, on_curve, bench.MODES)
    assert gate.passed
    assert set(gate.errors) == {"out", "tokens", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "rpb"}
    assert 0 < gate.errors["qkv.weight"] < 1e-5
    wrong = replace(MODULE, build=lambda dim, heads: OffByAHundredth(dim, heads, 5, backend="auto"))
    gate = bench._gate_module(wrong, CPU, on_curve, bench.MODES)
    assert not gate.passed
    assert gate.errors["out"] > 1e-3


@pytest.mark.parametrize("name", ["module", "module-on-curve", "attention", "projections", "reorder"])
def test_every_part_runs_both_ways(name: str) -> None:
    (case,) = (case for case in CASES if case.name == "parts/hna-17/96")
    (provider,) = (provider for provider in case.providers if provider.name == name)
    prepared = provider.prepare(MODULE, CPU)
    for mode in bench.MODES:
        prepared.steps[mode]()


def test_parts_make_the_module() -> None:
    module = MODULE.module(CPU)
    tokens, _ = bench._tokens(MODULE, CPU, MODULE.dim)
    on_curve = module.curve.put_on(tokens, 6, 6)
    parts = module.curve.take_off(module.proj(module.attend(module.qkv(on_curve), (6, 6))), 6, 6)
    torch.testing.assert_close(parts, module(tokens, (6, 6)))


def test_the_work_of_a_module_is_counted() -> None:
    forward, both = MODULE.work("fwd"), MODULE.work("fwd+bwd")
    tokens = 2 * 36
    assert forward.flops == 2 * tokens * 16 * (3 * 16 + 16)
    assert (both.bytes, both.flops) == (3 * forward.bytes, 3 * forward.flops)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("side", [14, 7])
def test_neighbourhoods_by_flex_attention_are_those_of_the_module(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "compiled_flex", lambda: flex_attention)
    module = NeighborhoodAttention2d(32, 2, 7, relative_bias=False, order="row_major", backend="torch")
    qkv = torch.randn(2, side**2, 96)
    by_flex = bench._attend_by_flex(module, bench.flex_masks(7), qkv, (side, side))
    torch.testing.assert_close(by_flex, module.attend(qkv, (side, side)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("relative_bias", [True, False])
def test_nat_by_flex_attention_is_nat(monkeypatch: pytest.MonkeyPatch, relative_bias: bool) -> None:
    monkeypatch.setattr(bench, "compiled_flex", lambda: flex_attention)
    name, backbone = "nat2d-mini_8xb128_in1k", {"order": "row_major", "relative_bias": relative_bias}
    # Not by monkeypatch, which ends with deleting what PyTorch's configuration only computes.
    with torch._dynamo.config.patch(recompile_limit=8):
        by_flex = bench._nat_by_flex(name, backbone).eval()
    plain = bench._build_network(name, {"backbone": {**backbone, "backend": "torch"}}).eval()
    plain.load_state_dict(by_flex.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(by_flex(images), plain(images), rtol=0, atol=1e-4)


def test_networks_are_built_by_name_and_only_ours_are_compared() -> None:
    for case in (case for case in CASES if case.mark == "H7"):
        assert case.clock == "wall"
        (own, *others) = case.providers
        assert own.prepare.keywords["instead"] is None  # type: ignore[attr-defined]
        assert case.problem.reference is not None  # type: ignore[attr-defined]
        assert {goal.mode for goal in case.goals} == set(case.modes)
        for other in others:
            assert other.prepare.keywords["instead"].network != case.problem.network  # type: ignore[attr-defined]
