"""Render README.md's table and the pages of docs/results/ from what is recorded there. Run by `nox -s tables`.

With `--check` nothing is written: it fails where the committed text differs from what would be rendered.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vitreous_core import curves, patterns
from vitreous_core.ablations import Comparison, read_comparison
from vitreous_core.bench.rows import Row, read_rows
from vitreous_core.papers import papers
from vitreous_core.zoo import ModelCard, find_model, models

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
VERDICTS = ("holds", "holds in part", "does not hold", "not reproduced at this scale", "not run here")
UNTRIED = VERDICTS[-1]
SMALL_SCALE = {True: "holds in part", False: "not reproduced at this scale"}
"""Of a comparison on small data: it can support a claim about ImageNet, not prove or refute it."""
MADE_BY = "<!-- Rendered by `nox -s tables`. -->\n"


def main(arguments: Sequence[str]) -> int:
    """Write every rendered file, or with `--check` compare them; the exit code counts the differences."""
    claims = yaml.safe_load((RESULTS / "claims.yml").read_text(encoding="utf-8"))
    readme = ROOT / "README.md"
    rendered = {
        RESULTS / "claims.md": claims_page(claims),
        RESULTS / "runs.md": runs_page(),
        RESULTS / "exports.md": exports_page(),
        readme: between_markers(readme.read_text(encoding="utf-8"), glance_table(claims)),
        **paper_pages(),
        **ablation_pages(claims),
    }
    stale = [path for path, text in rendered.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)} is not what the files give: run `nox -s tables`")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(rendered[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    if "--check" not in arguments:
        for path, draw in paper_figures().items():
            draw().savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
            print(f"drew {path.relative_to(ROOT)}")
    return len(stale) if "--check" in arguments else 0


def paper_pages() -> dict[Path, str]:
    """What papers say for themselves: `pages()` of a module `report`, Markdown by name of the page."""
    return {
        RESULTS / paper.name / f"{name}.md": MADE_BY + text
        for paper in papers()
        if (paper.root / "report.py").is_file()
        for name, text in paper.module("report").pages().items()
    }


def paper_figures() -> dict[Path, Callable[[], Any]]:
    """`figures()` of the same modules: what draws a Matplotlib figure, by its name."""
    return {
        RESULTS / "figures" / f"{paper.name}-{name}.png": draw
        for paper in papers()
        if (paper.root / "report.py").is_file()
        for name, draw in paper.module("report").figures().items()
    }


def ablation_pages(claims: Iterable[dict[str, Any]]) -> dict[Path, str]:
    """docs/results/<paper>/ablations.md: what a part of a network costs and brings, by the claims about `accuracy`."""
    pages = {}
    for paper in claims:
        entries = [entry for entry in paper["claims"] if "accuracy" in (entry.get("ours") or {})]
        runs = [comparison for entry in entries if (comparison := compared(entry["ours"]))]
        if runs:
            names = dict.fromkeys(name for entry in entries for name in entry["ours"]["accuracy"])
            pages[RESULTS / paper["paper"] / "ablations.md"] = ABLATIONS_PAGE.format(
                made_by=MADE_BY,
                command=" \\\n    ".join([f'nox -s "reproduce({paper["paper"]})" --', *names, "--seed 0 1 2 --jobs 3"]),
                data=", ".join(sorted({name.rsplit("_", 1)[1] for name in names})),
                epochs=", ".join(sorted({str(run.facts["epochs"]) for run in runs})),
                seeds=min(run.seeds for run in runs),
                devices=", ".join(sorted({run.facts["device"] for run in runs})),
                table=table(ABLATIONS_HEADER, map(ablation_row, entries)),
            )
    return pages


def ablation_row(entry: dict[str, Any]) -> list[str]:
    """A claim about `accuracy` with its two networks."""
    cards = [find_model(name) for name in entry["ours"]["accuracy"]]
    comparison = compared(entry["ours"])
    return [
        entry["claim"],
        " → ".join(card.name.split("_")[0] for card in cards),
        " → ".join(f"{card.parameters:,}" for card in cards),
        " → ".join(f"{card.macs:,}" for card in cards),
        *((comparison.spread, comparison.interval) if comparison else ("–", "–")),
        f"*{entry['quoted']}*",
        verdict(entry),
    ]


ABLATIONS_HEADER = (
    "claim", "networks", "parameters", "multiply-adds", "top-1 %", "change, points", "quoted", "verdict",
)  # fmt: skip
ABLATIONS_PAGE = """{made_by}
# Ablations

```bash
{command}
```

*Trained here* on {data}, all with the same budget: epochs {epochs}, seeds {seeds}, on {devices}. Top-1 is the mean and
standard deviation over the seeds; the change has its 95 % confidence interval. *Quoted* is the paper, on ImageNet-1k. A
claim holds in part when the whole interval lies where it says: a small data set can support it, not prove it. Otherwise
it is not reproduced at this scale, for which the scale alone may be the reason.

{table}"""


def claims_page(claims: Iterable[dict[str, Any]]) -> str:
    """docs/results/claims.md: one table a paper."""
    parts = [
        MADE_BY,
        "# Claims\n",
        "```bash\nnox -s tables      # renders this page from claims.yml and the recorded results\n```\n",
        'What each paper claims, *quoted*, and what we found. "Not run here" means that nobody has run it with this '
        "code yet: most of these claims need ImageNet, a phone or another GPU.\n",
    ]
    for paper in claims:
        rows = [
            [
                entry["claim"],
                f"*{entry['quoted']}*",
                entry["source"],
                our_figure(entry.get("ours")),
                hardware(entry.get("ours")),
                verdict(entry),
                entry.get("note", ""),
            ]
            for entry in paper["claims"]
        ]
        header = ["claim", "quoted", "where", "ours", "hardware", "verdict", "note"]
        parts += [f"## {paper['title']}\n", table(header, rows)]
    return "\n".join(parts)


def our_figure(origin: dict[str, Any] | None) -> str:
    """The figure that `ours` of a claim points to; see the head of claims.yml."""
    match origin:
        case None:
            return "–"
        case {"metafile": name, "field": "Parameters"}:
            return f"{imagenet_model(name).parameters:,}"
        case {"metafile": name, "field": "FLOPs"}:
            return f"{imagenet_model(name).macs:,}"
        case {"empty_blocks": sides, "image": [height, width], "block": block}:
            shares = [empty_share(*side, height=height, width=width, block=block) for side in sides]
            return " → ".join(f"{100 * share:.1f} %" for share in shares)
        case {"empty_range": groups, "block": block}:
            ranges = [[empty_share(*side, height=n, width=n, block=block) for *side, n in group] for group in groups]
            return " → ".join(f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %" for shares in ranges)
        case {"bench": _, "speed_up": [slow, ours]}:
            runs = measured(origin, [slow, ours])
            return " / ".join(f"{run[slow]['latency_ms_p50'] / run[ours]['latency_ms_p50']:.3g}×" for run in runs)
        case {"bench": _, "ms": providers}:
            return side_by_side(measured(origin, providers), providers, "latency_ms_p50", "ms")
        case {"bench": _, "mib": providers}:
            return side_by_side(measured(origin, providers), providers, "peak_mib", "MiB")
        case {"bench": _, "images_per_second": providers}:
            return " → ".join(
                " / ".join(f"{images_per_second(run[name]):,.0f}" for run in measured(origin, providers))
                for name in providers
            )
        case {"accuracy": [_, second], "expected": _}:
            comparison = compared(origin)
            return f"{comparison.spread} % on {second.rsplit('_', 1)[1]}" if comparison else "–"
        case _:
            raise ValueError(f"`ours` must be one of the forms that the head of claims.yml lists; got {origin}")


def hardware(origin: dict[str, Any] | None) -> str:
    """What our figure was found on: counts and layouts are the same on any machine."""
    match origin:
        case None:
            return "–"
        case {"bench": _}:
            providers = next(origin[form] for form in ("speed_up", "ms", "mib", "images_per_second") if form in origin)
            return ", ".join(sorted({row["device"] for run in measured(origin, providers) for row in run.values()}))
        case {"accuracy": _}:
            comparison = compared(origin)
            return comparison.facts["device"] if comparison else "–"
    return "any (counted)"


def measured(origin: dict[str, Any], providers: Sequence[str]) -> list[dict[str, Row]]:
    """For each case of a claim, the rows of these providers, all of the newest run that has them all.

    Raises:
        ValueError: when no run has them; the claim then has no figure of ours to show.
    """
    found = []
    for case in origin["cases"]:
        runs: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in recorded_rows():
            named = (row["suite"], row["case"], row["mode"]) == (origin["bench"], case, origin["mode"])
            if named and row["state"] == "ok" and origin.get("device", row["device"]) == row["device"]:
                runs[row["time"]][row["provider"]] = row
        complete = [time for time, rows in runs.items() if set(providers) <= set(rows)]
        if not complete:
            raise ValueError(f"no run of {origin['bench']} {case} {origin['mode']} has all of {list(providers)}")
        newest = runs[max(complete)]
        found.append({provider: newest[provider] for provider in providers})
    return found


def compared(origin: dict[str, Any]) -> Comparison | None:
    """The recorded runs of the two configs of an `accuracy` claim; None when there are none."""
    first, second = (find_model(name) for name in origin["accuracy"])
    return read_comparison(RESULTS / "repro" / first.paper.name, first.name, second.name)


def side_by_side(runs: Sequence[dict[str, Row]], providers: Sequence[str], field: str, unit: str) -> str:
    """A field of the rows: cases apart by strokes, providers by arrows."""
    return " → ".join(" / ".join(three_digits(run[name][field]) for run in runs) for name in providers) + f" {unit}"


def images_per_second(row: Row) -> float:
    """Of a network's row, to three significant digits."""
    return float(f"{1000 * row['facts']['batch'] / row['latency_ms_p50']:.3g}")


def three_digits(number: float) -> str:
    """Three significant digits, and all of an integral part that has more."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


@cache
def recorded_rows() -> list[Row]:
    """Every row of the benchmarks."""
    return list(read_rows(RESULTS / "bench"))


def verdict(entry: dict[str, Any]) -> str:
    """The verdict of a claim, which a figure must back; of an `accuracy` claim the runs give it."""
    if "accuracy" in (entry.get("ours") or {}):
        if "verdict" in entry:
            raise ValueError(f"the runs give the verdict of an accuracy claim: {entry['claim']!r}")
        comparison = compared(entry["ours"])
        return SMALL_SCALE[comparison.confirms(entry["ours"]["expected"])] if comparison else UNTRIED
    given = entry.get("verdict", UNTRIED)
    if given not in VERDICTS:
        raise ValueError(f"verdict must be one of {VERDICTS}; got {given!r} for {entry['claim']!r}")
    if (given == UNTRIED) != ("ours" not in entry):
        raise ValueError(f"a verdict needs a figure of ours and a figure a verdict: {entry['claim']!r}")
    return given


def imagenet_model(name: str) -> ModelCard:
    """The packaged model of that name, or the one 1,000-class config of that variant."""
    found = [card for card in models() if name in (card.name, card.name.split("_")[0]) and "_in1k" in card.name]
    if len(found) != 1:
        raise ValueError(f"{name!r} must name one ImageNet-1k config; it fits {[card.name for card in found]}")
    return found[0]


def empty_share(pattern: str, options: dict[str, Any], order: str, *, height: int, width: int, block: int) -> float:
    """Share of the block pairs in which no token sees any other."""
    token_order = getattr(curves, f"{order}_order")(height, width)
    layout = getattr(patterns, pattern)(**options).layout(
        height, width, token_order, query_block=block, key_block=block
    )
    return layout.block_ratios[0]


def recorded_runs() -> list[dict[str, Any]]:
    """What `nox -s reproduce` wrote, with the paper, config and run that its folder is named for."""
    found = []
    for file in sorted(RESULTS.glob("repro/*/*/*/run.json")):
        paper, config, run, _ = file.relative_to(RESULTS / "repro").parts
        found.append({"paper": paper, "config": config, "run": run} | json.loads(file.read_text(encoding="utf-8")))
    return found


def runs_page() -> str:
    """docs/results/runs.md: every training recorded by `nox -s reproduce`."""
    rows = [
        [
            run["paper"],
            run["config"],
            run["run"],
            f"{run['best']:.2f}",
            str(run["epochs"]),
            f"{run['seconds']:.0f}",
            str(run["seed"]),
            run.get("backend") or "–",
            f"{run['devices']} x {run['device']}",
            run["torch"],
            commit(run),
        ]
        for run in recorded_runs()
    ]
    header = ["paper", "config", "run", "top-1 %", "epochs", "seconds", "seed", "backend", "machine", "torch", "commit"]
    body = table(header, rows) if rows else "No run is recorded yet.\n"
    lead = "Trainings *trained here*, each with its resolved config and metrics beside it in docs/results/repro.\n"
    command = '```bash\nnox -s "reproduce(swiftformer)"      # adds rows; nox -s tables renders them\n```\n'
    return "\n".join([MADE_BY, "# Runs\n", command, lead, body])


def exports_page() -> str:
    """docs/results/exports.md: the newest row of every model, format and machine that `nox -s record_exports` wrote."""
    newest = {(row["device"], row["model"], row["format"]): row for row in read_rows(RESULTS / "exports")}
    parts = [EXPORTS_LEAD.format(made_by=MADE_BY)]
    for device in sorted({device for device, _, _ in newest}):
        rows = [row for (where, _, _), row in newest.items() if where == device]
        commits = sorted({commit({**row, "vitreous": ""}) for row in rows})
        versions = {f"{name} {number}" for row in rows for name, number in row["packages"].items()}
        versions |= {f"torch {row['torch']}" for row in rows}
        threads = ", ".join(sorted({str(row["threads"]) for row in rows}))
        facts = f"Threads: {threads}. {', '.join(sorted(versions))}. Commit {', '.join(commits)}.\n"
        parts += [f"## {device}\n", table(EXPORTS_HEADER, map(export_row, rows)), facts]
    return "\n".join(parts)


def export_row(row: Row) -> list[str]:
    """One file: errors and milliseconds of the model as trained, folded, and of the runtime where it ran."""
    runners = {runner["name"]: runner for runner in row["runners"]}
    ran = [runners.get(name) for name in ("PyTorch, as trained", "PyTorch, deploy mode", row["runtime"])]
    errors = ["not run here" if runner is None else f"{runner['error']:.1e}" for runner in ran]
    times = ["" if runner is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*runner["latency_ms"]) for runner in ran]
    return [row["model"].split("_")[0], row["runtime"], f"{row['bytes'] / 1e6:.1f}", *errors, *times]


EXPORTS_HEADER = (
    "model", "file for", "MB", "error as trained", "error in deploy mode", "error of the file", "ms as trained",
    "ms in deploy mode", "ms of the file",
)  # fmt: skip
EXPORTS_LEAD = """{made_by}
# Exports

```bash
nox -s record_exports      # adds rows; nox -s tables renders them
```

Each network folded, written and run on the spot, with random weights. The error is relative, against the network as
it was trained in float64: the largest over one, two and three images. PyTorch computes in float32 beside it, and a
file may be off by ten times as much as the network as trained (1e-5 at least). Times are of one image on one thread,
but ExecuTorch's, which uses a pool of its own: median, 20th to 80th percentile. Core ML runs on Apple devices only:
its files were written and their programs read back.
"""


def commit(run: dict[str, Any]) -> str:
    """The code of a run, as far as it is known."""
    if run["commit"] is None:
        return f"release {run['vitreous']}"
    return run["commit"][:8] + (" and local changes" if run["dirty"] else "")


def glance_table(claims: Iterable[dict[str, Any]]) -> str:
    """README.md's table: one row a paper."""
    best: dict[str, float] = {}
    for run in recorded_runs():
        if run["config"].endswith("_digits"):
            best[run["paper"]] = max(run["best"], best.get(run["paper"], 0.0))
    claims_of = {paper["paper"]: Counter(verdict(entry) for entry in paper["claims"]) for paper in claims}
    rows = []
    for paper in papers():
        counted = claims_of.get(paper.name, Counter())
        variants = {card.name.split("_")[0] for card in models() if card.paper == paper and "_in1k" in card.name}
        digits = f"{best[paper.name]:.1f} %" if paper.name in best else "no run recorded"
        card = f"[{paper.name}](packages/{paper.name}/README.md)"
        rows.append([card, str(len(variants)), *(str(counted[given]) for given in VERDICTS), digits])
    return table(["paper", "variants", *(f"claims: {given}" for given in VERDICTS), "digits top-1, trained here"], rows)


def between_markers(text: str, content: str) -> str:
    """`text` with what stands between the result markers replaced."""
    start, end = "<!-- results:start -->\n", "<!-- results:end -->"
    return text[: text.index(start) + len(start)] + "\n" + content + "\n" + text[text.index(end) :]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
