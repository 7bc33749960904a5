"""Speeds that others published, beside our newest rows: the file `quoted.yml` of a folder of results.

They were measured on other machines, so they are set side by side and not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .rows import Row


@dataclass(frozen=True)
class Quote:
    """One published figure.

    Args:
        network: as the case of ours names it.
        figure: as published, e.g. `27644` or `"2.26 to 2.63"`.
        unit: `"images/s"`, or `"ms"` of one image.
        source, hardware, setting: where it stands and what it was measured on.
        suite, case: of our rows.
        provider: the one of them; None for the case's own.
    """

    network: str
    figure: float | str
    unit: str
    source: str
    hardware: str
    setting: str
    suite: str
    case: str
    provider: str | None = None


def read_quotes(path: Path) -> list[Quote]:
    """Every figure of a file whose head explains it; none where there is no file.

    Raises:
        ValueError: for another unit.
    """
    if not path.is_file():
        return []
    import yaml

    quotes = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        figures, case = entry.pop("figures"), entry.pop("case")
        if entry["unit"] not in ("images/s", "ms"):
            raise ValueError(f"unit in {path} must be images/s or ms; got {entry['unit']!r}")
        quotes += [Quote(network, figure, case=case.format(network), **entry) for network, figure in figures.items()]
    return quotes


QUOTED_HEADER = ("network", "quoted", "on", "setting", "source", "ours", "on", "case")


def quoted_rows(quotes: Sequence[Quote], rows: Iterable[Row]) -> list[list[str]]:
    """A line of the table for each quote, with our newest row of inference if there is one."""
    newest: dict[tuple[str, str, str | None], Row] = {}
    for row in rows:
        if row["state"] == "ok" and row["mode"] == "infer":
            for provider in (row["provider"], *([None] if row["ours"] else [])):
                key = row["suite"], row["case"], provider
                if key not in newest or row["time"] >= newest[key]["time"]:
                    newest[key] = row
    lines = []
    for quote in quotes:
        published = quote.figure if isinstance(quote.figure, str) else f"{quote.figure:,}"
        found = newest.get((quote.suite, quote.case, quote.provider))
        ours = ["–", "–", quote.case]
        if found is not None:
            figure = f"{_in_unit(found, quote.unit)} {quote.unit}"
            ours = [figure, found["device"], f"{quote.case}, {found['provider']}"]
        named = [f"{quote.suite} {quote.network}", f"*{published} {quote.unit}*"]
        lines.append([*named, quote.hardware, quote.setting, quote.source, *ours])
    return lines


def _in_unit(row: Row, unit: str) -> str:
    """Milliseconds of one image or images a second, with three significant digits."""
    of_one = row["latency_ms_p50"] / row["facts"]["batch"]
    rounded = f"{of_one if unit == 'ms' else 1000 / of_one:.3g}"
    return f"{float(rounded):,.0f}" if float(rounded) >= 100 else rounded
