"""The benchmark harness: gates before timing, rows for everything, ratios within one run, and the providers agree."""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitreous_core.bench import attention, core_cases, first_calls, host_tables, measure, render
from vitreous_core.bench.case import Case, Gate, Goal, Prepared, Provider, Unavailable, Work
from vitreous_core.bench.command import cases_of, main, suites
from vitreous_core.bench.quoted import quoted_rows, read_quotes
from vitreous_core.bench.rows import append_row, environment, read_rows, row_file
from vitreous_core.bench.runner import run, select
from vitreous_core.errors import BackendUnsupported, UserError
from vitreous_core.patterns import Neighborhood1d, Neighborhood2d, Pattern, Slide1d, Slide2d, Window1d, Window2d

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Nothing:
    """A problem of no size, with a roof."""

    def work(self, mode: str) -> Work:
        return Work(bytes=1000, flops=0)

    def facts(self) -> Mapping[str, Any]:
        return {"series": "nothing", "side": 1, "dtype": "float32"}


def provider(name: str, step: Any = lambda: None, *, error: float = 0.0, **prepared: Any) -> Provider:
    gate = Gate({"out": error}, {"out": 0.5}, "a number")
    return Provider(name, lambda problem, device: Prepared({"fwd": step}, lambda modes: gate, **prepared))


def refuse(problem: object, device: torch.device) -> Prepared:
    raise BackendUnsupported("odd", ["it is odd", "and so on"])


def run_rows(case: Case, folder: Path, **options: Any) -> list[dict[str, Any]]:
    (path,) = run("test", [case], folder=folder, commit="0123456789", **options)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_say_everything(tmp_path: Path) -> None:
    goal = Goal("fwd", "speed-up", 2.0, over="slow")
    case = Case("T/nothing", "T", Nothing(), (provider("triton"), provider("slow")), ("fwd",), "cpu", goals=(goal,))
    ours, slow = run_rows(case, tmp_path)
    assert (ours["suite"], ours["case"], ours["mark"], ours["mode"]) == ("test", "T/nothing", "T", "fwd")
    assert (ours["provider"], ours["ours"], slow["ours"]) == ("triton", True, False)
    assert ours["latency_ms_p20"] <= ours["latency_ms_p50"] <= ours["latency_ms_p80"]
    assert ours["samples"] >= 10
    assert ours["goals"] == [{"mode": "fwd", "kind": "speed-up", "bound": 2.0, "over": "slow", "mean": None}]
    assert ours["gate"] == {"passed": True, "errors": {"out": 0.0}, "limits": {"out": 0.5}, "truth": "a number"}
    assert ours["roof_ms"] == pytest.approx(1e3 * 1000 / (ours["copy_tb_per_s"] * 1e12))
    assert ours["roof_pct"] == pytest.approx(100 * ours["roof_ms"] / ours["latency_ms_p50"])
    assert (ours["commit"], ours["dirty"], ours["schema"]) == ("0123456789", False, 1)
    assert ours["torch"] == torch.__version__
    assert ours["clock"] == "wall"
    assert ours["peak_mib"] is None  # only a GPU knows


def test_a_lock_is_held_while_measuring_and_not_while_compiling(tmp_path: Path) -> None:
    lock, free = tmp_path / "lock", []

    def step() -> None:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.append(True)
            except BlockingIOError:
                free.append(False)

    case = Case("T/locked", "T", Nothing(), (provider("triton", step),), ("fwd",), "cpu")
    run_rows(case, tmp_path, lock=lock)
    assert all(free[:2])
    assert len(free) > 2
    assert not any(free[2:])


def test_commands_with_one_lock_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("T/nothing", "T", Nothing(), (provider("triton"), provider("slow")), ("fwd",), "cpu")
    times = iter(f"2026-01-01T00:00:0{second}+00:00" for second in range(9))
    for module in ("rows", "runner"):
        monkeypatch.setattr(f"vitreous_core.bench.{module}.now", lambda: next(times))
    for name in ("triton", "slow"):
        rows = run_rows(case, tmp_path, lock=tmp_path / "lock", provider_patterns=[name])
    assert [row["provider"] for row in rows] == ["triton", "slow"]
    assert rows[0]["time"] == rows[1]["time"]
    apart = run_rows(case, tmp_path / "apart", provider_patterns=["slow"])
    assert apart[0]["time"] > rows[0]["time"]


@pytest.mark.parametrize("error", [0.6, math.nan])
def test_a_wrong_provider_is_not_timed(tmp_path: Path, error: float) -> None:
    runs: list[int] = []
    case = Case("T/wrong", "T", Nothing(), (provider("triton", lambda: runs.append(1), error=error),), ("fwd",), "cpu")
    (row,) = run_rows(case, tmp_path)
    assert row["state"] == "wrong"
    assert "out is off by" in row["reason"]
    assert "latency_ms_p50" not in row
    assert len(runs) == 2  # the first calls, which compile


def test_a_provider_that_cannot_is_a_row_that_says_why(tmp_path: Path) -> None:
    def run_out() -> None:
        raise torch.OutOfMemoryError("out of memory\nand a long story")

    providers = (Provider("odd", refuse), provider("large", run_out), provider("ready", missing={"fwd+bwd": "no"}))
    case = Case("T/rows", "T", Nothing(), providers, ("fwd", "fwd+bwd"), "cpu")
    rows = {(row["provider"], row["mode"]): row for row in run_rows(case, tmp_path)}
    assert rows["odd", "fwd"]["state"] == "unavailable"
    assert "it is odd; and so on" in rows["odd", "fwd"]["reason"]
    assert (rows["large", "fwd"]["state"], rows["large", "fwd"]["reason"]) == ("out of memory", "out of memory")
    assert rows["ready", "fwd"]["state"] == "ok"
    assert (rows["ready", "fwd+bwd"]["state"], rows["ready", "fwd+bwd"]["reason"]) == ("unavailable", "no")
    assert rows["large", "fwd+bwd"]["reason"] == "this provider has no fwd+bwd"


def test_providers_take_turns_in_rotated_order(tmp_path: Path) -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    providers = tuple(provider(name, step) for name, step in steps.items())
    run_rows(Case("T/turns", "T", Nothing(), providers, ("fwd",), "cpu"), tmp_path)
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    # The first calls, the warm-ups, then five rounds that start with another provider each.
    assert "".join(turns[-15:]) == "abcbcacababcbca"


def test_appending_keeps_the_rows_before(tmp_path: Path) -> None:
    case = Case("T/again", "T", Nothing(), (provider("triton"),), ("fwd",), "cpu")
    run_rows(case, tmp_path)
    rows = run_rows(case, tmp_path)
    assert len(rows) == 2
    assert list(read_rows(tmp_path)) == rows


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"schema": 1}\n{"schema"\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is no row"):
        list(read_rows(tmp_path))


def test_rows_of_another_schema_are_left_out(tmp_path: Path) -> None:
    append_row(tmp_path / "a" / "rows.jsonl", {"schema": 0})
    assert list(read_rows(tmp_path)) == []


def test_the_environment_names_device_and_commit() -> None:
    facts = environment(CPU, "1a2b3c4d5e-dirty")
    assert (facts["commit"], facts["dirty"], facts["run"][-7:]) == ("1a2b3c4d5e", True, "1a2b3c4")
    path = row_file(Path("rows"), {**facts, "device": "NVIDIA H100 80GB HBM3"})
    assert path.parent == Path("rows/nvidia-h100-80gb-hbm3")


# Providers of attention.

SMALL = attention.AttentionProblem(Window2d(4), 8, 8, batch=2, head_dim=8, dtype="float32")
BIASED = replace(SMALL, bias_extent=(4, 4))


@pytest.mark.parametrize("problem", [SMALL, BIASED], ids=["plain", "bias"])
def test_all_ways_to_compute_windows_pass_the_gate(problem: attention.AttentionProblem) -> None:
    on_curve = attention.attention_provider("runs", attention.sdpa, order="hilbert")
    in_windows = attention.attention_provider("tiles", attention.SDPA_WINDOWS.prepare.keywords["build"],
                                              order="window", tile=4)  # fmt: skip
    ways = [attention.EAGER, attention.SDPA, attention.SDPA_WINDOWS, attention.EAGER_WINDOWS, on_curve, in_windows]
    for way in ways:
        prepared = way.prepare(problem, CPU)
        assert prepared.gate is not None
        gate = prepared.gate(core_cases.MODES)
        assert gate.passed, (way.name, gate)
        assert ("dtable" in gate.errors) == (problem.bias_extent is not None)
        assert len(prepared.steps["fwd+bwd"]()) == 3 + (problem.bias_extent is not None)  # type: ignore[arg-type]


def test_the_truth_of_a_long_sequence_is_computed_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention._dense_results(BIASED, CPU, torch.float64)
    monkeypatch.setattr(attention, "_MOST_SCORES", 2 * 64 * 10)  # ten tokens at a time, the last run shorter
    in_runs = attention._dense_results(BIASED, CPU, torch.float64)
    assert set(whole) == {"out", "dquery", "dkey", "dvalue", "dtable"}
    for name, tensor in in_runs.items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-13)


def test_windows_of_the_curve_are_windows_of_the_image_on_powers_of_two() -> None:
    on_curve = attention.attention_provider("hwa", attention.sdpa, order="hilbert", pattern=Window1d(16))
    gate = on_curve.prepare(SMALL, CPU).gate
    assert gate is not None
    assert gate(core_cases.MODES).passed


def test_the_gate_sees_another_pattern() -> None:
    off_by_one = attention.attention_provider("hwa", attention.sdpa, order="hilbert", pattern=Window1d(16, 1))
    gate = off_by_one.prepare(SMALL, CPU).gate
    assert gate is not None
    errors = gate(core_cases.MODES).errors
    assert not gate(core_cases.MODES).passed
    assert min(errors.values()) > 1e-3


def test_only_what_is_timed_is_compared() -> None:
    gate = attention.SDPA.prepare(BIASED, CPU).gate
    assert gate is not None
    assert set(gate(("fwd",)).errors) == {"out"}
    assert set(gate(("fwd+bwd",)).errors) == {"out_trained", "dquery", "dkey", "dvalue", "dtable"}


def test_unfolding_is_slide_attention() -> None:
    problem = replace(SMALL, pattern=Slide2d(5), height=7, width=9)
    gate = attention.UNFOLD.prepare(problem, CPU).gate
    assert gate is not None
    assert gate(core_cases.MODES).passed


@pytest.mark.parametrize(
    "pattern",
    [Window1d(10), Window1d(10, 3), Slide1d(9), Neighborhood1d(9), Neighborhood1d(8), Window2d(3), Slide2d(3),
     Neighborhood2d(4), Neighborhood2d(5)],
    ids=str,
)  # fmt: skip
def test_the_masks_written_for_flex_are_the_patterns(pattern: Pattern) -> None:
    problem = replace(SMALL, pattern=pattern, height=7, width=9)
    mask = attention.flex_mask(problem)
    assert mask is not None
    token = torch.arange(63)
    got = mask(None, None, token[:, None], token[None, :])
    np.testing.assert_array_equal(got.numpy(), pattern.dense(7, 9))


def test_a_way_that_does_not_compile_gives_way_to_the_next() -> None:
    def fails(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        raise attention.InductorError(RuntimeError("out of shared memory\nand much more"), None)

    tensors = attention.draw(SMALL, CPU)
    works = attention.dense(SMALL, tensors)
    assert attention.first_that_compiles([fails, works, fails], tensors) is works
    with pytest.raises(Unavailable, match=r"does not compile: .*out of shared memory$"):
        attention.first_that_compiles([fails], tensors)


def test_flex_keeps_our_tables_where_arithmetic_cannot_say_it() -> None:
    assert attention.flex_mask(replace(SMALL, order="hilbert")) is None
    assert attention.flex_mask(replace(SMALL, pattern=Slide2d(3, 2))) is None


def test_a_provider_may_compute_another_problem() -> None:
    other = replace(SMALL, pattern=Neighborhood2d(3))
    prepared = attention.attention_provider("other", attention.dense, instead=other).prepare(SMALL, CPU)
    assert prepared.gate is not None
    assert prepared.gate(core_cases.MODES).passed
    assert prepared.facts["computes"]["pattern"] == repr(other.pattern)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(SMALL, pattern=Window2d(4), height=6), "do not divide 6 x 8"),
        (replace(SMALL, pattern=Window1d(7)), "equal windows"),
        (replace(SMALL, order="hilbert"), "neither tiles nor runs"),
        (replace(BIASED, pattern=Window1d(16), order="hilbert"), "share no bias"),
    ],
)
def test_windows_that_cannot_be_cut(problem: attention.AttentionProblem, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        attention.SDPA_WINDOWS.prepare(problem, CPU)


def test_work_is_counted_as_the_design_counts_it() -> None:
    problem = attention.AttentionProblem(Window2d(8), 64, 64)  # 16 images, 2 heads, head_dim 64, half precision
    tensor = 16 * 2 * 64 * 64 * 64 * 2
    pairs = 64 * 64 * 64
    assert problem.work("fwd") == Work(4 * tensor, 4 * pairs * 64 * 32)
    assert problem.work("fwd+bwd") == Work(11 * tensor, 14 * pairs * 64 * 32)
    biased = replace(problem, bias_extent=(8, 8))
    assert biased.work("fwd").bytes - problem.work("fwd").bytes == 4 * 15 * 15 * 2


def test_the_roof_is_the_larger_floor() -> None:
    roof = measure.Roof(copy_bytes_per_s=1e12, matmul_flops_per_s={"float16": 1e15})
    assert roof.milliseconds(Work(10**9, 0), "float16") == pytest.approx(1.0)
    assert roof.milliseconds(Work(10**9, 3 * 10**12), "float16") == pytest.approx(3.0)


# Orders and layouts.


def test_curve_and_layout_gates_pass_and_can_fail() -> None:
    problem = host_tables.CurveProblem(16, 16)
    for way in (host_tables.NUMBA_CURVE, host_tables.PYTHON_CURVE):
        gate = way.prepare(problem, CPU).gate
        assert gate is not None
        assert gate(core_cases.MODES).passed
    assert not host_tables._compare_curves(host_tables._walked(16, 16)[::-1], problem).passed
    layout = host_tables.LayoutProblem(Neighborhood2d(5), 16, 16, "random")
    gate = host_tables.NUMBA_LAYOUT.prepare(layout, CPU).gate
    assert gate is not None
    assert gate(core_cases.MODES).passed


def test_hilbertsfc_is_a_row_either_way() -> None:
    pytest.importorskip("numpy")
    rectangle = host_tables.CurveProblem(16, 24)
    with pytest.raises(Unavailable, match="hilbertsfc"):
        host_tables.HILBERTSFC.prepare(rectangle, CPU)


def sleeper(connection: Connection, seconds: float) -> None:
    connection.send(None)
    time.sleep(seconds)
    connection.send([1.0, 2.0])


def dier(connection: Connection) -> None:
    raise SystemExit(3)


def test_a_process_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    # The children are forked here, so that they need not import torch again.
    import multiprocessing

    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(host_tables.multiprocessing, "get_context", lambda method: fork)
    assert host_tables.timed_apart(sleeper, (0.0,), 30.0) == [1.0, 2.0]
    with pytest.raises(Unavailable, match=r"not done after 0\.1 s"):
        host_tables.timed_apart(sleeper, (600.0,), 0.1)
    with pytest.raises(Unavailable, match="ended with exit code 3"):
        host_tables.timed_apart(dier, (), 30.0)


def test_a_cold_curve_pays_for_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_calls, "_COLD_CURVES", 1)
    curve = host_tables.CurveProblem(8, 8)
    (cold,) = first_calls.COLD_CURVE.prepare(first_calls.ColdCurveProblem(curve), CPU).samples_ms[host_tables.BUILD]
    # Importing Numba alone takes longer than a thousand of these orders.
    step = host_tables.NUMBA_CURVE.prepare(curve, CPU).steps[host_tables.BUILD]
    step()
    assert cold > measure.WallClock(CPU).samples_ms(step, 5)[2]


# Cases and the command.


def test_core_cases_are_well_formed() -> None:
    cases = core_cases.cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = [provider.name for provider in case.providers]
        assert case.name.startswith(f"{case.mark}/")
        assert len(set(names)) == len(names)
        assert case.ours in names
        for goal in case.goals:
            assert goal.mode in case.modes
            assert goal.over is None or goal.over in names
            assert (goal.kind == "speed-up") == (goal.over is not None)
    marks = {case.mark for case in cases}
    assert marks == {"H1", "H2", "H3", "H4", "H5", "H6", "first-call", "smoke"}
    # The H1 table: six patterns, three sizes.
    assert sum(case.mark == "H1" for case in cases) == 18


def test_cases_are_chosen_by_name_and_device() -> None:
    cases = core_cases.cases()
    assert {case.mark for case in select(cases, ["h6*", "SMOKE/*"], CPU)} == {"H6", "smoke"}
    with pytest.raises(UserError, match="no case matches nope"):
        select(cases, ["nope"], CPU)
    with pytest.raises(UserError, match="all 18 matching cases need a GPU"):
        select(cases, ["H1/*"], CPU)


def test_an_unknown_suite_is_named_with_what_there_is() -> None:
    assert "core" in suites()
    with pytest.raises(UserError, match="no benchmarks named 'nope'; there are core"):
        cases_of("nope")


def test_the_command_runs_a_case_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["core", "--case", "smoke/wsa*", "--provider", "sdpa*", "--provider", "triton",
                 "--out", str(tmp_path)]) == 0  # fmt: skip
    rows = list(read_rows(tmp_path))
    assert {row["provider"] for row in rows} == {"sdpa", "sdpa-windows", "triton"}
    assert {row["state"] for row in rows if row["provider"] != "triton"} == {"ok"}
    assert {row["state"] for row in rows if row["provider"] == "triton"} == {"unavailable"}
    assert "tensors must be on a CUDA device" in next(row["reason"] for row in rows if row["provider"] == "triton")
    assert str(next(tmp_path.rglob("*.jsonl"))) in capsys.readouterr().out
    assert main(["core", "--case", "nope"]) == 2


def test_a_full_gpu_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_roof(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 400 MiB\nand a long story")

    monkeypatch.setattr("vitreous_core.bench.runner.measure_roof", measure_roof)
    assert main(["core", "--case", "smoke/wsa*", "--provider", "sdpa", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "bench: error: no GPU memory is left to measure with; end what else runs there: CUDA out of memory. Tried to "
        "allocate 400 MiB\n"
    )


# Tables and figures.


def row(case: str, name: str, latency: float, *, when: str = "t1", mode: str = "fwd", **changes: Any) -> dict[str, Any]:
    ours = name == "triton"
    goal = {"mode": mode, "kind": "speed-up", "bound": 2.0, "over": "flex", "mean": 2.5}
    return {
        "schema": 1, "suite": "core", "device": "GPU One", "time": when, "run": "r", "commit": "abcdef0123",
        "dirty": False, "driver": "1", "torch": "2", "triton": "3", "numba": "4", "python": "5", "case": case,
        "mark": case.split("/")[0], "provider": name, "ours": ours, "mode": mode, "state": "ok", "reason": None,
        "goals": [goal], "facts": {"series": "S", "side": int(case.split("/")[-1])}, "gate": None,
        "latency_ms_p50": latency, "roof_pct": 50.0, "peak_mib": 1.0, "copy_tb_per_s": 3.0,
        "matmul_tflop_per_s": {"float16": 700.0}, **changes,
    }  # fmt: skip


def test_ratios_are_taken_within_the_newest_run() -> None:
    rows = [
        row("H1/a/8", "triton", 1.0), row("H1/a/8", "flex", 9.0),
        row("H1/a/8", "triton", 1.0, when="t2"), row("H1/a/8", "flex", 1.5, when="t2"),
        row("H1/a/16", "triton", 1.0), row("H1/a/16", "flex", 6.0),
    ]  # fmt: skip
    (sheet,) = render.newest_sheets(rows)
    assert sheet.name == "core-gpu-one"
    figures = [(verdict.met, verdict.figure) for _, _, verdict in render.verdicts(sheet.of("H1"))]
    assert figures == [(False, 1.5), (True, 6.0)]
    # The older run shows, or a slow machine would hide what others saw; it decides nothing.
    texts = [verdict.text for _, _, verdict in render.verdicts(sheet.of("H1"))]
    assert texts == ["**not met**: 1.50× flex (asked 2×); met at abcdef0: 9.00×", "met: 6.00× flex (asked 2×)"]
    assert render.mean_verdicts(sheet.of("H1")) == [
        "Geometric mean of the 2 speed-ups over flex, fwd: 3.00× (asked 2.5×): met."
    ]


def test_a_provider_left_out_of_the_newest_run_keeps_its_row_and_is_compared_within_its_own_run() -> None:
    rows = [row("H1/a/8", "triton", 4.0, when="t0"), row("H1/a/8", "flex", 9.0, when="t0"),
            row("H1/a/8", "triton", 2.0, commit="0123456789"), row("H1/a/8", "flex", 9.0),
            row("H1/a/8", "eager", 20.0),
            row("H1/a/8", "triton", 1.0, when="t2"), row("H1/a/8", "eager", 30.0, when="t2")]  # fmt: skip
    (sheet,) = render.newest_sheets(rows)
    ((_, _, verdict),) = render.verdicts(sheet.of("H1"))
    assert (verdict.met, verdict.figure) == (True, 4.5)
    line = "| a/8 | fwd | met: 4.50× flex (asked 2×), both at 0123456 | 1.00 | 9.00 (run 1) | 30.0 | 50 % | 1 | 1 | 2 |"
    assert line in render.page(sheet).replace("\N{NO-BREAK SPACE}", " ")


def test_a_provider_that_no_run_has_beside_ours_is_no_rival() -> None:
    rows = [row("H1/a/8", "flex", 9.0), row("H1/a/8", "triton", 1.0, when="t2")]
    (sheet,) = render.newest_sheets(rows)
    ((_, _, verdict),) = render.verdicts(sheet.of("H1"))
    assert (verdict.met, verdict.text) == (None, "flex: no row in this run")


def test_only_the_newest_provider_of_ours_is_judged() -> None:
    rows = [row("H1/a/8", "old-triton", 3.0, ours=True), row("H1/a/8", "flex", 9.0),
            row("H1/a/8", "triton", 1.0, when="t2"), row("H1/a/8", "flex", 6.0, when="t2")]  # fmt: skip
    (sheet,) = render.newest_sheets(rows)
    ((ours, _, verdict),) = render.verdicts(sheet.of("H1"))
    assert (ours["provider"], verdict.figure) == ("triton", 6.0)


def test_notes_on_a_run_stand_beside_its_rows(tmp_path: Path) -> None:
    entry = row("H1/a/8", "triton", 1.0)
    path = row_file(tmp_path / "bench", entry)
    append_row(path, entry)
    path.with_suffix(".txt").write_text("It was a warm day.\n")
    (sheet,) = render.newest_sheets([entry])
    notes = render.read_notes(tmp_path / "bench", sheet.rows)
    assert notes == {"t1": "It was a warm day."}
    assert "TFLOP/s. It was a warm day.\n" in render.page(replace(sheet, notes=notes))


@pytest.mark.parametrize(
    ("goal", "met", "text"),
    [
        ({"kind": "speed-up", "bound": 4.0, "over": "flex"}, False, "**not met**: 3.00× flex (asked 4×)"),
        ({"kind": "milliseconds", "bound": 2.0, "over": None}, True, "met: 2.00 ms (asked 2 ms)"),
        ({"kind": "roof", "bound": 60, "over": None}, False, "**not met**: 50 % of the roof (asked 60 %)"),
        ({"kind": "speed-up", "bound": 4.0, "over": "sdpa"}, None, "sdpa: no row in this run"),
        ({"kind": "speed-up", "bound": 4.0, "over": "eager"}, None, "eager: out of memory"),
    ],
)
def test_verdicts(goal: dict[str, Any], met: bool | None, text: str) -> None:
    ours, flex = row("H1/a/8", "triton", 2.0), row("H1/a/8", "flex", 6.0)
    eager = row("H1/a/8", "eager", 0.0, state="out of memory")
    verdict = render.judge(goal, ours, {"triton": ours, "flex": flex, "eager": eager})
    assert (verdict.met, verdict.text) == (met, text)


def test_pages_and_figures_are_rendered_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(f"H1/a/{side}", name, side * slowness) for side in (8, 16) for name, slowness in
            (("triton", 1.0), ("flex", 3.0))]  # fmt: skip
    rows.append(row("H1/a/16", "eager", 0.0, state="out of memory", reason="too large"))
    for entry in rows:
        append_row(tmp_path / "bench" / "gpu-one" / "r.jsonl", entry)
    assert render.main([str(tmp_path), "--check"]) == 2
    assert render.main([str(tmp_path)]) == 0
    assert render.main([str(tmp_path), "--check"]) == 0
    page = (tmp_path / "tables" / "core-gpu-one.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "| a/16 | fwd | met: 3.00× flex (asked 2×) | 16.0 | 48.0 | out of memory | 50 % | 1 |" in page
    assert "eager, out of memory: too large (1 rows)" in page
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == ["core-gpu-one-h1-roof.png", "core-gpu-one-h1-speed-up.png", "core-gpu-one-h1-time-fwd.png"]
    assert all(f"../figures/{name}" in page for name in drawn)
    assert "2 of 2" in (tmp_path / "speed.md").read_text()
    assert "is not what the rows give" in capsys.readouterr().out


def test_what_others_published_stands_beside_our_newest_row(tmp_path: Path) -> None:
    path = tmp_path / "quoted.yml"
    assert read_quotes(path) == []
    first, second, third = (
        {"source": "S", "hardware": "V100", "setting": "batch 9", "suite": "core", "case": "T/{}", "unit": unit,
         "figures": figures}
        for unit, figures in (("images/s", {"8": 27644}), ("ms", {"8": "2 to 3"}), ("ms", {"9": 0.5}))
    )  # fmt: skip
    path.write_text(json.dumps([first, second | {"provider": "flex"}, third]))
    facts = {"mode": "infer", "facts": {"side": 8, "batch": 4}}
    rows = [
        row("T/8", "triton", 8.0, when="t1", **facts), row("T/8", "triton", 0.03, when="t2", **facts),
        row("T/8", "triton", 1.0, when="t3", **facts | {"mode": "train"}),
        row("T/8", "triton", 0.0, when="t4", state="wrong", **facts), row("T/8", "flex", 7.0, **facts),
    ]  # fmt: skip
    assert quoted_rows(read_quotes(path), rows) == [
        ["core 8", "*27,644 images/s*", "V100", "batch 9", "S", "133,000 images/s", "GPU One", "T/8, triton"],
        ["core 8", "*2 to 3 ms*", "V100", "batch 9", "S", "1.75 ms", "GPU One", "T/8, flex"],
        ["core 9", "*0.5 ms*", "V100", "batch 9", "S", "–", "–", "T/9"],
    ]
    append_row(tmp_path / "bench" / "gpu-one" / "r.jsonl", rows[1])
    assert render.main([str(tmp_path)]) == 0
    assert "133,000 images/s" in (tmp_path / "speed.md").read_text()
    path.write_text(json.dumps([first | {"unit": "fps"}]))
    with pytest.raises(ValueError, match="must be images/s or ms; got 'fps'"):
        read_quotes(path)


def test_a_mark_shows_its_own_figures_alone() -> None:
    rows = [row(f"{mark}/8", name, latency) for mark in ("E1", "E1-sizes") for name, latency in
            (("triton", 1.0), ("flex", 3.0))]  # fmt: skip
    (sheet,) = render.newest_sheets(rows)
    page = render.page(render.Sheet("s", "gpu", sheet.rows))
    for figure in ("s-gpu-e1-roof", "s-gpu-e1-speed-up", "s-gpu-e1-sizes-roof", "s-gpu-e1-sizes-speed-up"):
        assert page.count(f"../figures/{figure}.png") == 1
