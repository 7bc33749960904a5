"""The order of events: prepare and compile, gate, time in rotation, measure memory, write rows."""

from __future__ import annotations

import fcntl
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import BackendUnsupported, UserError
from .case import Case, Gate, Prepared, Provider, Unavailable
from .measure import Clock, DeviceClock, Roof, choose_clock, measure_roof, peak_mib, quantiles
from .rows import Row, append_row, environment, now, replays, row_file

ROUNDS = 5
"""Times every provider gets its turn, each time in another order."""

_TURN_MS = 40.0
_FEWEST, _MOST = 2, 25
"""Timings a turn takes: as many as fit in `_TURN_MS`, within these bounds."""
_WARM_UP_MS = 20.0


def select(cases: Sequence[Case], case_patterns: Sequence[str], device: torch.device) -> list[Case]:
    """Cases that match one of the patterns (all, when there is none) and can run on this kind of device.

    On a machine with a GPU the cases for the CPU run too.

    Raises:
        UserError: when nothing is left.
    """
    matching = [case for case in cases if not case_patterns or _matches(case.name, case_patterns)]
    if not matching:
        raise UserError(f"no case matches {', '.join(case_patterns)}; `--list` shows the cases")
    chosen = [case for case in matching if case.device in ("cpu", device.type)]
    if not chosen:
        raise UserError(f"all {len(matching)} matching cases need a GPU, and torch finds none here")
    return chosen


def run(
    suite: str,
    cases: Sequence[Case],
    *,
    folder: Path,
    provider_patterns: Sequence[str] = (),
    commit: str | None = None,
    compile_only: bool = False,
    lock: Path | None = None,
) -> list[Path]:
    """Run cases and append their rows.

    Args:
        suite: `"core"` or a paper's name.
        cases: what to run, as `select` returns it.
        folder: rows go to `<folder>/<device>/<date>-<commit>.jsonl`.
        provider_patterns: only providers whose names match one of these.
        commit: recorded instead of what git says, where the sources are no checkout.
        compile_only: prepare and run every step, so that compilers fill their caches on disk, and write nothing.
        lock: a file that is held while a case is gated and timed. Several commands with one new file compile side by
            side, measure in turns, and are one run: their rows have the time at which the first of them measured.

    Returns:
        The files written.
    """
    console = Console()
    written: dict[Path, None] = {}
    environments: dict[str, tuple[Row, Callable[[], Roof]]] = {}
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            providers = [p for p in case.providers if not provider_patterns or _matches(p.name, provider_patterns)]
            device = torch.device(case.device)
            if compile_only:
                for contender in _prepare_all(case, providers, device, console):
                    console.print(f"{case.name}  {contender.name}  {contender.state}", highlight=False)
            else:
                if case.device not in environments:
                    # The roof is measured when the first case is, alone on the device.
                    environments[case.device] = (environment(device, commit), cache(partial(_roof, cases, device)))
                facts, roof = environments[case.device]
                path = row_file(folder, facts)
                for row in run_case(case, providers, roof, console, lock):
                    append_row(path, {**facts, "suite": suite, **row})
                    written[path] = None
                    console.print(summary(row), highlight=False)
            _forget(device)
            progress.advance(task)
    return list(written)


@dataclass
class _Contender:
    """A provider on its way through a case."""

    name: str
    prepared: Prepared = field(default_factory=Prepared)
    gate: Gate | None = None
    state: str = "ok"
    reason: str | None = None
    failed: dict[str, str] = field(default_factory=dict)
    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    host_ms: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float | None] = field(default_factory=dict)

    def modes(self, case: Case) -> list[str]:
        """Modes still in the race."""
        if self.state != "ok":
            return []
        return [mode for mode in case.modes if mode in self.prepared.steps and mode not in self.failed]


def run_case(
    case: Case, providers: Sequence[Provider], roof: Callable[[], Roof], console: Console, lock: Path | None = None
) -> Iterator[Row]:
    """Rows of one case, one for each provider and mode."""
    device = torch.device(case.device)
    contenders = _prepare_all(case, providers, device, console)
    if lock is not None:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for those whose turn it is
        console.print(f"  {case.name} waits for {lock}", style="dim", highlight=False)
    with _held(lock) as shared:
        for row in _measure(case, contenders, device, roof()):
            yield {**row, **shared}


@contextmanager
def _held(lock: Path | None) -> Iterator[Row]:
    """Hold the lock; what its rows share, which the first to hold it leaves in the file."""
    if lock is None:
        yield {}
        return
    with lock.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        time = file.read()
        if not time:
            time = now()
            file.write(time)
            file.flush()
        yield {"time": time}


def _measure(case: Case, contenders: Sequence[_Contender], device: torch.device, roof: Roof) -> Iterator[Row]:
    for contender in contenders:
        _pass_gate(contender, contender.modes(case))
    clock = choose_clock(case.clock, device)
    for mode in case.modes:
        racing = [contender for contender in contenders if mode in contender.modes(case)]
        counts = {contender.name: _warm_up(contender, mode, clock) for contender in racing}
        for turn in range(ROUNDS):
            shift = turn % max(len(racing), 1)
            for contender in racing[shift:] + racing[:shift]:
                _time(contender, mode, clock, counts[contender.name])
        # In a pass of its own: asking for the peak would disturb the timing.
        for contender in racing:
            if mode in contender.modes(case) and not replays(contender.prepared.facts):
                with _failures(contender, mode):
                    contender.peak_mib[mode] = peak_mib(contender.prepared.steps[mode], device)
    for contender in contenders:
        for mode in case.modes:
            yield _row(case, contender, mode, roof)


def _prepare_all(case: Case, providers: Sequence[Provider], device: torch.device, console: Console) -> list[_Contender]:
    """Set every provider up and run each step: whatever compiles or tunes does so now.

    Twice, because what a first call leaves in a network (timm's EfficientViT keeps its gathered biases) can make
    `torch.compile` compile once more for the second.
    """
    contenders = []
    for provider in providers:
        contender = _Contender(provider.name)
        try:
            contender.prepared = provider.prepare(case.problem, device)
        except (Unavailable, BackendUnsupported) as refusal:
            contender.state, contender.reason = "unavailable", str(refusal)
        except torch.OutOfMemoryError as error:
            contender.state, contender.reason = "out of memory", _first_line(error)
        for mode in contender.modes(case):
            console.print(f"  compiling {case.name} {provider.name} {mode}", style="dim", highlight=False)
            with _failures(contender, mode):
                for _ in range(2):
                    contender.prepared.steps[mode]()
        contenders.append(contender)
    return contenders


def _pass_gate(contender: _Contender, modes: Sequence[str]) -> None:
    if not modes or contender.prepared.gate is None:
        return
    try:
        contender.gate = contender.prepared.gate(modes)
    except torch.OutOfMemoryError as error:
        contender.state, contender.reason = "out of memory", f"in the gate: {_first_line(error)}"
        return
    if not contender.gate.passed:
        beyond = [
            f"{name} is off by {contender.gate.errors[name]:.2e} (limit {limit:.2e})"
            for name, limit in contender.gate.limits.items()
            if not contender.gate.errors[name] <= limit
        ]
        contender.state, contender.reason = "wrong", "; ".join(beyond)


def _warm_up(contender: _Contender, mode: str, clock: Clock) -> int:
    """Run a while, and say how many timings fit into a turn."""
    step = contender.prepared.steps[mode]
    with _failures(contender, mode):
        once = clock.samples_ms(step, 1)[0]
        clock.samples_ms(step, max(1, min(_MOST, int(_WARM_UP_MS / max(once, 1e-3)))))
        typical = sorted(clock.samples_ms(step, 3))[1]
        if isinstance(clock, DeviceClock):
            contender.host_ms[mode] = clock.host_ms(step)
        return max(_FEWEST, min(_MOST, int(_TURN_MS / max(typical, 1e-3))))
    return 0


def _time(contender: _Contender, mode: str, clock: Clock, count: int) -> None:
    if mode in contender.failed:
        return
    with _failures(contender, mode):
        contender.samples_ms.setdefault(mode, []).extend(clock.samples_ms(contender.prepared.steps[mode], count))


@contextmanager
def _failures(contender: _Contender, mode: str) -> Iterator[None]:
    """Too large a problem costs a provider this mode, not the others theirs."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        contender.failed[mode] = _first_line(error)
        gc.collect()
        torch.cuda.empty_cache()


def _row(case: Case, contender: _Contender, mode: str, roof: Roof) -> Row:
    prepared = contender.prepared
    state, reason = contender.state, contender.reason
    samples = list(prepared.samples_ms.get(mode, ())) or contender.samples_ms.get(mode, [])
    if state == "ok" and mode in contender.failed:
        state, reason = "out of memory", contender.failed[mode]
    elif state == "ok" and not samples:
        state, reason = "unavailable", prepared.missing.get(mode, f"this provider has no {mode}")
    row: Row = {
        "case": case.name,
        "mark": case.mark,
        "provider": contender.name,
        "ours": contender.name == case.ours,
        "mode": mode,
        "state": state,
        "reason": reason,
        "clock": "wall" if (case.device, case.clock) == ("cpu", "device") else case.clock,
        "goals": [vars(goal) for goal in case.goals if goal.mode == mode],
        "facts": {**case.problem.facts(), **prepared.facts},
        "gate": None,
        "copy_tb_per_s": roof.copy_bytes_per_s / 1e12,
        "matmul_tflop_per_s": {name: rate / 1e12 for name, rate in roof.matmul_flops_per_s.items()},
    }
    if contender.gate is not None:
        gate = contender.gate
        row["gate"] = {"passed": gate.passed, "errors": dict(gate.errors), "limits": dict(gate.limits),
                       "truth": gate.truth}  # fmt: skip
    if state != "ok":
        return row
    p20, p50, p80 = quantiles(samples)
    row |= {"latency_ms_p20": p20, "latency_ms_p50": p50, "latency_ms_p80": p80, "samples": len(samples)}
    row |= {"host_ms": contender.host_ms.get(mode), "peak_mib": contender.peak_mib.get(mode)}
    work = case.problem.work(mode)
    dtype = case.problem.facts().get("dtype")
    if work is not None and dtype is not None:
        floor = roof.milliseconds(work, dtype)
        row |= {"bytes": work.bytes, "flops": work.flops, "roof_ms": floor, "roof_pct": 100 * floor / p50}
    return row


def summary(row: Mapping[str, object]) -> str:
    """One line about a row, for people who watch."""
    head = f"{row['case']}  {row['provider']}  {row['mode']}"
    if row["state"] != "ok":
        return f"{head}  {row['state']}: {row['reason']}"
    latency = row["latency_ms_p50"]
    assert isinstance(latency, float)
    text = f"{head}  {latency:.{max(0, 3 - int(math.log10(max(latency, 1e-3))))}f} ms"
    return f"{text}  {row['roof_pct']:.0f} % of the roof" if "roof_pct" in row else text


def _roof(cases: Sequence[Case], device: torch.device) -> Roof:
    used = {case.problem.facts().get("dtype") for case in cases if case.device == device.type}
    return measure_roof(device, sorted(name for name in used if name is not None))


def _forget(device: torch.device) -> None:
    """Free what a case held, and compiled code with it: past a number of variants Dynamo stops compiling."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
