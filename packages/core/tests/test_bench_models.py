"""Networks as a benchmark problem: gate, modes and memory; and what the pages make of sweeps and peaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from vitreous_core.bench import render
from vitreous_core.bench.case import Case, Goal
from vitreous_core.bench.measure import TF32, DeviceClock, Roof, matmul_precision, measure_roof
from vitreous_core.bench.models import INFER, TRAIN, ModelProblem, model_provider
from vitreous_core.bench.runner import run_case

ROOF = Roof(1e12, {})


class Network(nn.Module):
    """Small, with dropout, a layer norm and a batch norm; returns its scores in a tuple."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8, momentum=0.5))
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 1000)
        self.gain = gain

    def forward(self, images: Tensor) -> tuple[Tensor]:
        tokens = self.norm(self.stem(images).flatten(2).mT)
        return (self.gain * self.head(self.drop(tokens).mean(1)),)


PROBLEM = ModelProblem("network", Network, batch=3, size=16)


def rows(problem: ModelProblem, *providers: Any) -> dict[tuple[str, str], dict[str, Any]]:
    case = Case("T/network", "T", problem, providers, (TRAIN, INFER), "cpu", ours="same", clock="wall")
    return {(row["provider"], row["mode"]): row for row in run_case(case, providers, lambda: ROOF, Console(quiet=True))}


@pytest.mark.parametrize("autocast", [True, False])
def test_the_same_network_passes_and_another_does_not(autocast: bool) -> None:
    problem = replace(PROBLEM, autocast=autocast)
    providers = (model_provider("same", Network), model_provider("other", lambda: Network(gain=1.2)))
    found = rows(problem, *providers)
    for mode in (TRAIN, INFER):
        assert found["same", mode]["state"] == "ok"
        assert found["other", mode]["state"] == "wrong"
    assert set(found["same", TRAIN]["gate"]["errors"]) == {"scores", "scores_trained", "dimages"}
    facts = found["same", INFER]["facts"]
    network = Network() if autocast else Network().bfloat16()
    assert facts["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    tensors = (*network.parameters(), *network.buffers())
    assert facts["standing_mib"] == pytest.approx(sum(tensor.nbytes for tensor in tensors) / 2**20)


def test_compiled_and_channels_last() -> None:
    provider = model_provider("same", Network, compiled=False, channels_last=True)
    assert rows(PROBLEM, provider)["same", TRAIN]["facts"]["channels_last"]
    prepared = model_provider("same", Network, compiled=True).prepare(PROBLEM, torch.device("cpu"))
    assert prepared.facts["compiled"]
    overhead = model_provider("same", Network, compiled=True, compile_mode="reduce-overhead", graphed=True)
    prepared = overhead.prepare(PROBLEM, torch.device("cpu"))
    assert prepared.facts["compile_mode"] == "reduce-overhead"
    assert prepared.steps.keys() == {INFER}


def test_networks_that_differ_are_not_compared() -> None:
    provider = model_provider("same", lambda: Network(gain=3.0))
    row = rows(replace(PROBLEM, reference=None), provider)["same", TRAIN]
    assert (row["state"], row["gate"]) == ("ok", None)
    # Or each with a reference of its own.
    other = ModelProblem("other", lambda: Network(gain=3.0), batch=3, size=16)
    row = rows(PROBLEM, model_provider("same", lambda: Network(gain=3.0), instead=other))["same", INFER]
    assert (row["state"], row["facts"]["computes"]["network"]) == ("ok", "other")


def test_weights_stay_and_gradients_go() -> None:
    """So that the gate may follow any number of steps, and a step's peak includes its gradients."""
    built = []
    provider = model_provider("same", lambda: built.append(Network()) or built[-1])
    prepared = provider.prepare(PROBLEM, torch.device("cpu"))
    before = [parameter.clone() for parameter in built[0].parameters()]
    for _ in range(3):
        prepared.steps[TRAIN]()
    assert all(torch.equal(*pair) for pair in zip(before, built[0].parameters(), strict=True))
    assert all(parameter.grad is None for parameter in built[0].parameters())
    assert built[0].training
    assert not prepared.steps[INFER]().requires_grad
    assert not built[0].training


def row(provider: str, mode: str = "fwd", **changes: Any) -> dict[str, Any]:
    base = {
        "suite": "s", "case": "T/a", "mark": "T", "provider": provider, "ours": provider == "ours", "mode": mode,
        "state": "ok", "reason": None, "goals": [], "facts": {}, "time": "1", "device": "gpu", "latency_ms_p50": 1.0,
        "peak_mib": 10.0, "driver": None, "torch": "2", "triton": None, "numba": None, "python": "3",
        "copy_tb_per_s": 3.0, "matmul_tflop_per_s": {"float16": 600.0}, "commit": "abc", "dirty": False,
    }  # fmt: skip
    return base | changes


def test_memory_goals_count_what_stands_there() -> None:
    goal = vars(Goal("fwd", "memory", 0.75, over="theirs"))
    theirs = row("theirs", facts={"standing_mib": 10.0})
    for standing, met in ((4.0, True), (6.0, False)):
        verdict = render.judge(goal, row("ours", facts={"standing_mib": standing}), {"theirs": theirs})
        assert (verdict.met, verdict.figure) == (met, (10 + standing) / 20)
    assert render.judge(goal, row("ours", peak_mib=None), {"theirs": theirs}).met is None
    assert render.judge(goal, row("ours"), {}).met is None


def test_the_memory_of_a_graph_is_that_of_the_network_without_one() -> None:
    graphed, compiled = {"graphed": True}, {"compile_mode": "reduce-overhead"}
    found = [
        row("net-graph", ours=True, peak_mib=1.0, facts={**graphed, "standing_mib": 5.0}),
        row("net", peak_mib=80.0, facts={"standing_mib": 5.0}),
        row("theirs", peak_mib=90.0),
        row("net-reduce-overhead", "train", ours=True, peak_mib=1.0, facts=compiled),
        row("net-compiled", "train", peak_mib=70.0),
        row("lone-graph", "infer", ours=True, peak_mib=1.0, facts=graphed),
    ]
    for each in found:
        each["goals"] = [vars(Goal(each["mode"], "speed-up", 1.0, over="theirs"))]
    (sheet,) = render.newest_sheets(found)
    lines = [line.split(" | ") for line in render.mark_table(sheet.of("T"), {}).splitlines()]
    columns = [lines[0].index(name) for name in ("peak MiB", "theirs peak MiB |")]
    cells = {line[1]: [line[column].strip(" |") for column in columns] for line in lines[2:]}
    assert cells == {"fwd": ["85", "90"], "train": ["70", ""], "infer": ["", ""]}


def test_cases_stand_in_the_order_of_their_names() -> None:
    names = ["T-more/a", "T/b10", "T/b2", "T/a"]
    (sheet,) = render.newest_sheets([row("ours", case=name, mark=name.partition("/")[0]) for name in names])
    assert [each["case"] for each in sheet.rows] == ["T/a", "T/b2", "T/b10", "T-more/a"]
    assert list(sheet.marks()) == ["T", "T-more"]


def test_sweeps_get_time_and_memory_plots_and_a_roofline(tmp_path: Path) -> None:
    found = [
        row(provider, case=f"T/{batch}", latency_ms_p50=batch * slow, peak_mib=batch * slow, flops=10**12, bytes=10**10,
            facts={"series": "one", "axis": "batch", "batch": batch, "dtype": "float16"})
        for batch in (1, 2, 4) for provider, slow in (("ours", 1.0), ("theirs", 2.0))
    ]  # fmt: skip
    sheet = render.Sheet("s", "gpu", found)
    drawn = dict(render.figures(sheet))
    assert list(drawn) == ["s-gpu-roofline", "s-gpu-t-time-fwd", "s-gpu-t-memory-fwd"]
    panel = drawn["s-gpu-t-memory-fwd"]().axes[0]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("batch", "peak MiB")
    assert [tuple(line.get_ydata()) for line in panel.get_lines()] == [(1.0, 2.0, 4.0), (2.0, 4.0, 8.0)]
    roofline = drawn["s-gpu-roofline"]().axes[0]
    points = [line.get_ydata()[0] for line in roofline.get_lines() if len(line.get_ydata()) == 1]
    assert points == [1000.0, 500.0, 250.0]  # TFLOP/s
    assert all(f"../figures/{name}.png" in render.page(sheet) for name in drawn)


def test_tf32_is_a_dtype_of_its_own() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    assert measure_roof(torch.device("cpu"), [TF32]).matmul_flops_per_s[TF32] > 0


def test_a_run_that_the_host_was_late_for_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, queried = [], iter([True, True, False, False])

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def query(self) -> bool:
            return next(queried)

        def elapsed_time(self, _: Event) -> float:
            return float(len(flushed))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = object.__new__(DeviceClock)
    clock._flush_ms = 1.0
    clock._flush = type("Flush", (), {"read": lambda self: flushed.append(1)})()
    monkeypatch.setattr(clock, "host_ms", lambda step: 0.0, raising=False)
    # One flush, two, four: the first run behind four counts, and four stay.
    assert clock.samples_ms(lambda: None, 2) == [7.0, 11.0]
