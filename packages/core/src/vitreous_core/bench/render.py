"""`python -m vitreous_core.bench.render`: tables and plots from the rows, the newest run of each case on each device.

Ratios compare rows of one run only. A provider that the newest run left out keeps its row of an older one, marked as
such, and what is compared with it comes from the newest run that has both. What a reader must know about a run stands
in a file `<run>.txt` beside its rows. Nothing here measures anything.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .quoted import QUOTED_HEADER, Quote, quoted_rows, read_quotes
from .rows import Row, read_rows, replays, row_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MADE_BY = "<!-- Rendered by `python -m vitreous_core.bench.render` from the rows in bench/. -->\n"
_MOST_PANELS = 9
_INCHES_PER_BAR = 0.3


@dataclass(frozen=True)
class Sheet:
    """Everything one device has to say about one suite.

    Args:
        suite: `"core"` or a paper.
        device: its name as the rows have it.
        rows: of the newest run of each case, and of older ones for providers that it left out.
        notes: what was noted about a run, by its time.
    """

    suite: str
    device: str
    rows: Sequence[Row]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.suite}-{re.sub(r'[^a-z0-9]+', '-', self.device.lower()).strip('-')}"

    def runs(self) -> dict[str, int]:
        """Numbers of the runs, by their time."""
        return {time: number for number, time in enumerate(sorted({row["time"] for row in self.rows}), start=1)}

    def marks(self) -> list[str]:
        """Marks in order of their first row."""
        return list(dict.fromkeys(row["mark"] for row in self.rows))

    def of(self, mark: str) -> list[Row]:
        """The rows of a mark."""
        return [row for row in self.rows if row["mark"] == mark]


def main(arguments: Sequence[str] | None = None) -> int:
    """Render; with `--check` only compare the text. Returns how many files are stale then, else 0."""
    parser = argparse.ArgumentParser(prog="python -m vitreous_core.bench.render", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("docs/results"),
                        help="folder with bench/ in it; the pages go beside that (default: docs/results)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the text would change")
    options = parser.parse_args(arguments)
    folder = options.results / "bench"
    sheets = [replace(sheet, notes=read_notes(folder, sheet.rows)) for sheet in newest_sheets(read_rows(folder))]
    pages = {options.results / "tables" / f"{sheet.name}.md": page(sheet) for sheet in sheets}
    pages[options.results / "speed.md"] = index_page(sheets, read_quotes(options.results / "quoted.yml"))
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if options.check:
        for path in stale:
            print(f"{path} is not what the rows give: run `nox -s tables`")
        return len(stale)
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages[path], encoding="utf-8")
        print(f"wrote {path}")
    for sheet in sheets:
        for name, draw in figures(sheet):
            path = options.results / "figures" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure = draw()
            figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
            print(f"drew {path}")
    return 0


def newest_sheets(rows: Iterable[Row]) -> list[Sheet]:
    """The newest row of every case, mode and provider, by suite and device, in the order of the cases' names.

    Rows of ours get `"pairs"`: by the name of each provider that their goals compare with, our row and its row of every
    run that has both, the newest first.
    """
    newest: dict[tuple[str, str], dict[tuple[str, str, str], Row]] = defaultdict(dict)
    runs: dict[tuple[str, ...], dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        kept, key = newest[row["suite"], row["device"]], (row["case"], row["mode"], row["provider"])
        if key not in kept or row["time"] >= kept[key]["time"]:
            kept[key] = row
        runs[row["suite"], row["device"], row["case"], row["mode"]][row["time"]][row["provider"]] = row
    for sheet, kept in newest.items():
        for key, row in kept.items():
            if row["ours"]:
                kept[key] = {**row, "pairs": _pairs(row, runs[*sheet, row["case"], row["mode"]])}
    return [
        Sheet(suite, device, sorted(kept.values(), key=lambda row: _natural(row["case"])))
        for (suite, device), kept in sorted(newest.items())
    ]


def _natural(name: str) -> list[list[str | int]]:
    """A key by which a mark comes before those that begin like it, and 2 before 10."""
    return [[int(p) if p.isdigit() else p for p in re.split(r"(\d+)", part)] for part in name.split("/")]


def _pairs(ours: Row, runs: Mapping[str, Mapping[str, Row]]) -> dict[str, list[tuple[Row, Row]]]:
    pairs = defaultdict(list)
    for over in {goal["over"] for goal in ours["goals"] if goal.get("over")}:
        for _, run in sorted(runs.items(), reverse=True):
            mine = our_row(list(run.values()))
            if mine is not None and over in run:
                pairs[over].append((mine, run[over]))
    return dict(pairs)


def read_notes(folder: Path, rows: Iterable[Row]) -> dict[str, str]:
    """What stands in the files `<run>.txt` beside the rows, by the time of the run."""
    notes = {}
    for row in rows:
        path = row_file(folder, row).with_suffix(".txt")
        if path.is_file():
            notes[row["time"]] = path.read_text(encoding="utf-8").strip()
    return notes


# Goals.


@dataclass(frozen=True)
class Verdict:
    """What came of a goal.

    Args:
        met: None when a row that it needs has no figure.
        figure: the ratio, milliseconds or per cent measured.
        text: for the table.
    """

    met: bool | None
    figure: float | None
    text: str


def judge(goal: Row, ours: Row, rivals: dict[str, Row]) -> Verdict:
    """Compare a goal with the rows of one case, mode and run."""
    if ours["state"] != "ok":
        return Verdict(None, None, f"{ours['provider']}: {ours['state']}")
    bound = goal["bound"]
    match goal["kind"]:
        case "speed-up":
            rival = rivals.get(goal["over"])
            if rival is None or rival["state"] != "ok":
                return Verdict(
                    None, None, f"{goal['over']}: {'no row in this run' if rival is None else rival['state']}"
                )
            figure = rival["latency_ms_p50"] / ours["latency_ms_p50"]
            met, text = figure >= bound, f"{_significant(figure)}× {goal['over']} (asked {bound:g}×)"
        case "milliseconds":
            figure = ours["latency_ms_p50"]
            met, text = figure <= bound, f"{_significant(figure)} ms (asked {bound:g} ms)"
        case "roof":
            figure = ours["roof_pct"]
            met, text = figure >= bound, f"{figure:.0f} % of the roof (asked {bound:g} %)"
        case "memory":
            rival = rivals.get(goal["over"])
            peaks = [None if row is None else peak(row) for row in (ours, rival)]
            if peaks[0] is None or not peaks[1]:
                return Verdict(None, None, f"{goal['over']}: no peak memory in this run")
            figure = peaks[0] / peaks[1]
            met, text = figure <= bound, f"{figure:.2f}× the memory of {goal['over']} (asked {bound:g}×)"
        case kind:
            raise ValueError(
                f"goal kind must be speed-up, milliseconds, roof or memory; got {kind!r} for {ours['case']}"
            )
    return Verdict(met, figure, f"{'met' if met else '**not met**'}: {text}")


def peak(row: Row) -> float | None:
    """Peak MiB of a row, with the weights or inputs that lie there all the time where the row knows their size.

    None of CUDA graphs (older rows have what a replay allocates beside the graph's memory).
    """
    beyond = row.get("peak_mib")
    return None if beyond is None or replays(row["facts"]) else beyond + row["facts"].get("standing_mib", 0.0)


def peak_without_graph(row: Row, rows: Mapping[str, Row]) -> float | None:
    """`peak`, of a CUDA graph that of the same network without one: the memory that its graph has to hold.

    Args:
        row: whose peak.
        rows: of the same case and mode, by provider.
    """
    name = row["provider"].removesuffix("-graph").replace("-reduce-overhead", "-compiled")
    found = rows.get(name)
    return None if found is None else peak(found)


def verdicts(rows: Sequence[Row]) -> list[tuple[Row, Row, Verdict]]:
    """Our row, the goal and the verdict, for every goal of these rows."""
    found = []
    for (_, _), group in _by_case_and_mode(rows):
        ours = our_row(group)
        if ours is not None:
            for goal in ours["goals"]:
                pairs = ours["pairs"].get(goal["over"])
                found.append((ours, goal, _judge_runs(goal, ours, pairs) if pairs else judge(goal, ours, {})))
    return found


def _judge_runs(goal: Row, ours: Row, pairs: Sequence[tuple[Row, Row]]) -> Verdict:
    """The verdict of the newest run; where the goal was not met, with the newest run that met it: machines differ."""
    found = [(judge(goal, mine, {goal["over"]: rival}), (mine["commit"] or "unknown")[:7]) for mine, rival in pairs]
    verdict, commit = found[0]
    text = verdict.text if pairs[0][0]["time"] == ours["time"] else f"{verdict.text}, both at {commit}"
    if verdict.met is False:
        met = ((was.figure, commit) for was, commit in found if was.met and was.figure is not None)
        text += next((f"; met at {commit}: {_significant(figure)}×" for figure, commit in met), "")
    return replace(verdict, text=text)


def our_row(rows: Sequence[Row]) -> Row | None:
    """Of one case and mode: the newest row of ours. Which provider that is can change from run to run."""
    return max((row for row in rows if row["ours"]), key=lambda row: row["time"], default=None)


def mean_verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for every geometric mean that goals ask for."""
    ratios: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    lacking: dict[tuple[str, str, float], int] = defaultdict(int)
    for ours, goal, verdict in verdicts(rows):
        if goal["mean"] is None:
            continue
        key = (ours["mode"], goal["over"], goal["mean"])
        if verdict.figure is None:
            lacking[key] += 1
        else:
            ratios[key].append(verdict.figure)
    sentences = []
    for (mode, over, asked), figures_ in ratios.items():
        mean = math.exp(sum(math.log(figure) for figure in figures_) / len(figures_))
        missing = lacking[mode, over, asked]
        sentences.append(
            f"Geometric mean of the {len(figures_)} speed-ups over {over}, {mode}: {_significant(mean)}× "
            f"(asked {asked:g}×): {'met' if mean >= asked else '**not met**'}."
            + (f" {missing} without a figure." if missing else "")
        )
    return sentences


# Pages.


def index_page(sheets: Sequence[Sheet], quotes: Sequence[Quote] = ()) -> str:
    """speed.md: what was measured where, how many goals were met, and what others published beside ours."""
    parts = [
        MADE_BY,
        "# Speed\n",
        "```bash\nvitreous bench core      # on your machine; `nox -s tables` renders these pages\n```\n",
        "Every figure is the median of a row in `docs/results/bench/`, taken after the provider's output and gradients "
        "were compared with dense attention in higher precision. Caches are cold, providers take turns, compiling is "
        "off the clock. The roof is the larger of two times: moving every tensor once at the speed of a large copy, "
        "and doing the matrix products at the speed of a large one, both measured in the same run. Peak memory is that "
        "of a step with its weights or inputs; of a CUDA graph, that of the same network run without one.\n",
    ]
    if not sheets:
        return "\n".join([*parts, "No rows have been recorded yet.\n"])
    rows = []
    for sheet in sheets:
        for mark in sheet.marks():
            judged = [verdict.met for _, _, verdict in verdicts(sheet.of(mark))]
            goals = f"{sum(met is True for met in judged)} of {len(judged)}" if judged else "none set"
            if open_ := sum(met is None for met in judged):
                goals += f", {open_} not judged"
            cases = len({row["case"] for row in sheet.of(mark)})
            rows.append(
                [f"[{sheet.suite}, {mark}](tables/{sheet.name}.md#{mark.lower()})", sheet.device, str(cases), goals]
            )
    parts.append(markdown_table(["marks", "device", "cases", "goals met"], rows))
    if quotes:
        lines = quoted_rows(quotes, (row for sheet in sheets for row in sheet.rows))
        parts += [
            "## Published by others\n",
            "*Quoted* figures stand beside our newest row of the same network. Machines, batches and clocks differ, so "
            "they are no comparison. Times are of one image; ours on a CPU are for one core, the processor time of all "
            "threads.\n",
            markdown_table(QUOTED_HEADER, lines),
        ]
    return "\n".join(parts)


def page(sheet: Sheet) -> str:
    """One sheet: of each mark the speed-ups, the table and other figures; where it was measured at the end."""
    parts = [MADE_BY, f"# {sheet.suite} on {sheet.device}\n"]
    drawn = [name for name, _ in figures(sheet)]
    parts += [_picture(name) for name in drawn if name == f"{sheet.name}-roofline"]
    for mark in sheet.marks():
        rows = sheet.of(mark)
        of_mark = [name for name in drawn if _mark_of(name, sheet) == mark]
        parts += [
            f"## {mark}\n",
            *[_picture(name) for name in of_mark if name.endswith("-speed-up")],
            mark_table(rows, sheet.runs()),
            *[f"{sentence}\n" for sentence in mean_verdicts(rows)],
            *_reasons(rows),
            *[_picture(name) for name in of_mark if not name.endswith("-speed-up")],
        ]
    parts += ["## Runs\n", _machine(sheet)]
    return "\n".join(parts)


def _picture(name: str) -> str:
    return f"![{name}](../figures/{name}.png)\n"


def _mark_of(figure: str, sheet: Sheet) -> str | None:
    """Whose figure it is: E1-layers has figures too that begin with E1."""
    named = [mark for mark in sheet.marks() if figure.startswith(f"{sheet.name}-{mark.lower()}-")]
    return max(named, key=len, default=None)


def mark_table(rows: Sequence[Row], runs: Mapping[str, int]) -> str:
    """The verdicts, milliseconds by provider and our share of the roof; with the run where there are several."""
    providers = list(dict.fromkeys(row["provider"] for row in sorted(rows, key=lambda row: not row["ours"])))
    has_roof = any("roof_pct" in row for row in rows)
    has_memory = any(peak(row) for row in rows)
    rivals = list(dict.fromkeys(goal["over"] for row in rows for goal in row["goals"] if goal["over"]))
    rivals = rivals[:1] if has_memory else []
    has_goals = any(row["goals"] for row in rows)
    header = ["case", "mode"] + ["mark"] * has_goals + [f"{provider} ms" for provider in providers]
    header += ["roof"] * has_roof + ["peak MiB"] * has_memory
    header += [f"{rival} peak MiB" for rival in rivals] + ["run"] * (len(runs) > 1)
    lines = []
    for (case, mode), group in _by_case_and_mode(rows):
        by_provider = {row["provider"]: row for row in group}
        ours = our_row(group)
        time = (group[0] if ours is None else ours)["time"]
        cells = [case.partition("/")[2], mode]
        if has_goals:
            # Unbroken lines keep the rows of a wide table low.
            texts = (verdict.text.replace(" ", "\N{NO-BREAK SPACE}") for _, _, verdict in verdicts(group))
            cells.append("<br>".join(texts))
        for provider in providers:
            row = by_provider.get(provider)
            other = "" if row is None or row["time"] == time else f" (run {runs[row['time']]})"
            cells.append(_latency(row) + other)
        if has_roof:
            cells.append("" if ours is None or "roof_pct" not in ours else f"{ours['roof_pct']:.0f} %")
        if has_memory:
            measured = (ours, *(by_provider.get(rival) for rival in rivals))
            peaks = (None if row is None else peak_without_graph(row, by_provider) for row in measured)
            cells += ["" if most is None else f"{most:.0f}" for most in peaks]
        if len(runs) > 1:
            cells.append(str(runs[time]))
        lines.append(cells)
    return markdown_table(header, lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _machine(sheet: Sheet) -> str:
    """A line for each run; a note that several share stands at the first."""
    any_row = {row["time"]: row for row in sheet.rows}
    lines, noted = [], set()
    for time, number in sheet.runs().items():
        row = any_row[time]
        software = [f"{name} {row[name]}" for name in ("driver", "torch", "triton", "numba", "python") if row[name]]
        rates = ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in row["matmul_tflop_per_s"].items())
        commit = f"{(row['commit'] or 'unknown')[:7]}{' with changes' if row['dirty'] else ''}"
        note = sheet.notes.get(time)
        is_new = note is not None and note not in noted
        noted.add(note)
        lines.append(
            f"{number}. {time}, commit {commit}: {', '.join(software)}; copy {row['copy_tb_per_s']:.2f} TB/s"
            + (f", products {rates}" if rates else "")
            + (f". {note}" if is_new else "")
        )
    return "\n".join(lines) + "\n"


def _reasons(rows: Sequence[Row]) -> list[str]:
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["state"] != "ok":
            found[f"{row['provider']}, {row['state']}: {row['reason']}"].append(f"{row['case']} {row['mode']}")
    return [f"{reason} ({len(cases)} rows)\n" for reason, cases in found.items()]


def _latency(row: Row | None) -> str:
    if row is None:
        return ""
    return _significant(row["latency_ms_p50"]) if row["state"] == "ok" else str(row["state"])


def _significant(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _by_case_and_mode(rows: Sequence[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["case"], row["mode"]].append(row)
    return list(groups.items())


# Figures.

Draw = Callable[[], "Figure"]


def figures(sheet: Sheet) -> list[tuple[str, Draw]]:
    """Names and drawers of the figures that a sheet has the rows for."""
    found: list[tuple[str, Draw]] = []
    placed = [row for row in sheet.rows if row["ours"] and row["state"] == "ok" and row.get("flops")]
    if placed:
        found.append((f"{sheet.name}-roofline", lambda: roofline_figure(placed, f"{sheet.suite} on {sheet.device}")))
    for mark in sheet.marks():
        rows = [row for row in sheet.of(mark) if row["state"] == "ok"]
        prefix = f"{sheet.name}-{mark.lower()}"
        for mode in dict.fromkeys(row["mode"] for row in rows):
            of_mode = [row for row in rows if row["mode"] == mode]
            axis = next(iter(of_mode))["facts"].get("axis", "side")
            lines = {"time": _series(of_mode, axis, lambda row: row["latency_ms_p50"])}
            if axis != "side":
                lines["memory"] = _series(of_mode, axis, peak)
            for kind, series in lines.items():
                if series:
                    unit = "ms" if kind == "time" else "peak MiB"
                    name = f"{prefix}-{kind}-{mode.replace('+', '-')}"
                    labels = (f"{mark}, {mode}", "image side" if axis == "side" else axis, unit)
                    found.append((name, lambda s=series, l=labels: line_figure(s, *l)))  # type: ignore[misc]
        shares = [row for row in rows if row["ours"] and "roof_pct" in row]
        if shares:
            found.append((f"{prefix}-roof", lambda r=shares, k=mark: roof_figure(r, k)))  # type: ignore[misc]
        ratios = [entry for entry in verdicts(sheet.of(mark)) if entry[1]["kind"] == "speed-up" and entry[2].figure]
        if ratios:
            found.append((f"{prefix}-speed-up", lambda r=ratios, k=mark: speed_up_figure(r, k)))  # type: ignore[misc]
    return found


Series = dict[str, dict[str, dict[int, float]]]


def _series(rows: Sequence[Row], axis: str, value: Callable[[Row], float | None]) -> Series:
    """A figure by series, provider and place on the axis; only series with several places, or none if unclear."""
    points: Series = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        facts, figure = row["facts"], value(row)
        if "series" not in facts or axis not in facts or figure is None:
            continue
        line = points[facts["series"]][row["provider"]]
        if facts[axis] in line:
            return {}
        line[facts[axis]] = figure
    several = {name: lines for name, lines in points.items() if max(map(len, lines.values())) > 1}
    return several if len(several) <= _MOST_PANELS else {}


def line_figure(series: Series, title: str, axis: str, unit: str) -> Figure:
    """Time or memory against image side or another size, a panel for each series and a line for each provider."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    columns = min(3, len(series))
    down = -(-len(series) // columns)
    figure = Figure(figsize=(4.0 * columns, 3.2 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, columns, squeeze=False, sharex=True, sharey=True)
    colours = _colours(provider for lines in series.values() for provider in lines)
    points = [point for lines in series.values() for line in lines.values() for point in line.items()]
    sides, latencies = sorted({side for side, _ in points}), [latency for _, latency in points]
    for panel, (name, lines) in zip(panels.flat, series.items(), strict=False):
        for provider, line in lines.items():
            xs = sorted(line)
            panel.plot(xs, [line[x] for x in xs], marker="o", color=colours[provider], label=provider)
        panel.set(title=name, xscale="log", yscale="log")
        panel.set_xticks(sides, [str(side) for side in sides], fontsize=8, rotation=45)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(latencies) < 1000 * min(latencies) else (1,)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in list(panels.flat)[len(series) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel(unit)
    for column in panels.T:
        lowest = [panel for panel in column if panel.get_visible()][-1]
        lowest.set_xlabel(axis)
        lowest.tick_params(labelbottom=True)
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    return figure


def roofline_figure(rows: Sequence[Row], title: str) -> Figure:
    """What our rows reach beside what their operations per byte allow: bandwidth on the left, products on the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8.5, 5.0), layout="constrained")
    panel = figure.subplots()
    colours = _colours(row["mark"] for row in rows)
    markers = dict(zip(dict.fromkeys(row["mode"] for row in rows), "os^v", strict=False))
    for row in rows:
        reached = row["flops"] / row["latency_ms_p50"] / 1e9
        label = f"{row['mark']}, {row['mode']}"
        panel.plot(row["flops"] / row["bytes"], reached, markers[row["mode"]], color=colours[row["mark"]], label=label,
                   markersize=5, alpha=0.7, linestyle="none")  # fmt: skip
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ends = [min(intensities) / 2, max(intensities) * 2]
    newest = max(rows, key=lambda row: row["time"])
    roofs: dict[str, float] = {}
    for dtype in dict.fromkeys(row["facts"]["dtype"] for row in rows):
        known = [row for row in rows if dtype in row["matmul_tflop_per_s"]]
        bandwidth, rate = known[-1]["copy_tb_per_s"], known[-1]["matmul_tflop_per_s"][dtype]
        knee = min(max(rate / bandwidth, ends[0]), ends[1])
        corners = [ends[0], knee, ends[1]]
        panel.plot(corners, [min(bandwidth * x, rate) for x in corners], color="black", linewidth=1)
        roofs[dtype] = min(bandwidth * ends[1], rate)
    for height, dtypes in _close_together(roofs):
        panel.annotate(", ".join(dtypes), (ends[1], height), ha="right", va="bottom", fontsize=8)
    panel.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.margins(y=0.08)
    panel.set_title(f"{title}: copy {newest['copy_tb_per_s']:.2f} TB/s")
    panel.grid(alpha=0.3)
    handles, labels = panel.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _close_together(roofs: Mapping[str, float]) -> list[tuple[float, list[str]]]:
    """Names of roofs that lie too close for labels of their own, with the height of the highest."""
    groups: list[tuple[float, list[str]]] = []
    for name, height in sorted(roofs.items(), key=lambda item: -item[1]):
        if groups and groups[-1][0] < 1.15 * height:
            groups[-1][1].append(name)
        else:
            groups.append((height, [name]))
    return groups


def roof_figure(rows: Sequence[Row], mark: str) -> Figure:
    """Our share of the roof, a bar for each case and mode."""
    bars = [(row["case"].partition("/")[2], row["mode"], row["roof_pct"], None) for row in rows]
    figure, panel = _bar_figure(bars)
    panel.axvline(100, color="black", linewidth=1)
    panel.set(xlabel="% of the roof measured in the same run", title=f"{mark}: share of the roof")
    return figure


def speed_up_figure(entries: Sequence[tuple[Row, Row, Verdict]], mark: str) -> Figure:
    """Our speed-ups with what was asked, a bar for each goal."""
    bars = []
    for ours, goal, verdict in entries:
        assert verdict.figure is not None
        bars.append((f"{ours['case'].partition('/')[2]} / {goal['over']}", ours["mode"], verdict.figure, goal["bound"]))
    figure, panel = _bar_figure(bars)
    largest, least = max(bar[2] for bar in bars), min(bar[2] for bar in bars)
    if largest > 30 * min(least, 1):
        panel.set_xscale("log")
    panel.axvline(1, color="black", linewidth=1)
    panel.set(xlabel="times as fast as the baseline; the black tick is what was asked", title=f"{mark}: speed-up")
    return figure


def _bar_figure(bars: Sequence[tuple[str, str, float, float | None]]) -> tuple[Figure, Axes]:
    """Horizontal bars: label, mode (the colour), length, and where a tick goes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, _INCHES_PER_BAR * len(bars) + 1.3), layout="constrained")
    panel = figure.subplots()
    colours = _colours(mode for _, mode, _, _ in bars)
    for place, (_, mode, length, tick) in enumerate(bars):
        panel.barh(place, length, color=colours[mode], height=0.75, label=mode)
        # On white, as a bar may end at the line of what was asked.
        label = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        panel.annotate(_significant(length), (length, place), (4, 0), textcoords="offset points", va="center",
                       fontsize=8, bbox=label, zorder=3)  # fmt: skip
        if tick is not None:
            panel.plot([tick, tick], [place - 0.42, place + 0.42], color="black", linewidth=2)
    panel.set_yticks(range(len(bars)), [label for label, _, _, _ in bars], fontsize=8)
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.margins(x=0.12)
    panel.grid(axis="x", alpha=0.3)
    handles, labels = panel.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if len(unique) > 1:
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique), frameon=False)
    return figure, panel


def _colours(names: Iterable[str]) -> dict[str, str]:
    return {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(names))}


if __name__ == "__main__":
    sys.exit(main())
