"""`python -m vitreous_core.export.record`: export packaged models to every format, and keep what was found as rows.

Weights are random ones away from zeros and ones (`golden_state`), behind which initial ones would hide whole branches.
`docs/tables.py` renders the rows as docs/results/exports.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..bench.rows import Row, append_row, environment, row_file, version_of
from ..errors import UserError
from ..testing.golden import golden_state
from ..zoo import ModelCard, find_model, models
from .api import Exported, export_model
from .formats import FORMATS, Format

_THREADS = 1
"""Of the timed calls: one core is what machines have in common."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Export and append a row for each file. Returns 0, or 2 where a format is missing or cannot take a model."""
    parser = argparse.ArgumentParser(prog="python -m vitreous_core.export.record", description=__doc__)
    parser.add_argument("names", metavar="PAPER|NAME", nargs="+", help="a model, or a paper: its ImageNet-1k models")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/results/exports"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        cards = [card for name in options.names for card in _cards(name)]
        kinds = [FORMATS[name] for name in options.format]
        for kind in kinds:
            kind.require()
        _record(cards, kinds, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _cards(name: str) -> list[ModelCard]:
    return [card for card in models() if card.paper.name == name and "_in1k" in card.name] or [find_model(name)]


def _record(cards: Sequence[ModelCard], kinds: Sequence[Format], out: Path) -> None:
    from rich.progress import Progress

    found = environment(torch.device("cpu"))
    with Progress() as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=len(cards) * len(kinds))
        for card in cards:
            for kind in kinds:
                progress.update(task, description=f"{card.name} to {kind.name}")
                exported = _export(card, kind, Path(folder))
                row = {**found, "threads": _THREADS, **_facts(card, kind, exported)}
                append_row(row_file(out, row), row)
                progress.advance(task)


def _export(card: ModelCard, kind: Format, folder: Path) -> Exported:
    from ..mm.models import Logits, build_model, input_size
    from ..mm.train import load_config

    config = load_config(card.config)
    model = Logits(build_model(config)).eval()
    model.load_state_dict(golden_state(model.state_dict()))
    path = folder / f"model{kind.suffix}"
    return export_model(model, path, kind.name, size=input_size(config), threads=_THREADS)


def _facts(card: ModelCard, kind: Format, exported: Exported) -> Row:
    return {
        "paper": card.paper.name, "model": card.name, "format": kind.name, "runtime": kind.runtime,
        "packages": {name: version_of(name) for name in kind.modules}, "folded": exported.folded,
        "bytes": exported.bytes, "batch": exported.batch, "size": list(exported.size), "facts": dict(exported.facts),
        "runners": [
            {"name": runner.name, "error": runner.error, "latency_ms": list(runner.latency_ms)}
            for runner in exported.runners
        ],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
