"""Keep the record of a training run: `python -m vitreous_core.mm.reproduce PAPER [CONFIG-NAME ...]`.

Without names it runs the paper's small-data configs. Each run leaves `<out>/<paper>/<config>/<run>/` with the
resolved config, every training and validation record, and who ran it where; weights stay in the work dir.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console

from .. import __version__
from ..errors import StateMismatch, UserError
from ..papers import Paper
from ..zoo import ModelCard, find_model, find_paper, models
from .train import TrainResult, load_config, read_history, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the configs one after the other. Returns 0, 2 for a mistake of the user, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m vitreous_core.mm.reproduce", description=__doc__)
    parser.add_argument("paper", metavar="PAPER", help="e.g. swiftformer")
    parser.add_argument("configs", metavar="CONFIG-NAME", nargs="*", help="default: the small-data configs")
    parser.add_argument("--out", type=Path, default=Path("docs/results/repro"), help="default: %(default)s")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/repro"), help="default: %(default)s")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        for card in choose_configs(find_paper(options.paper), options.configs):
            console.print(f"[bold]{card.name}[/]")
            record = reproduce(
                card, options.out, options.work_dir, amp=options.amp, launcher=options.launcher, console=console
            )
            console.print(str(record))
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command on the same commit continues", file=sys.stderr)
        return 130
    except (UserError, StateMismatch) as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
        return 2


def choose_configs(paper: Paper, names: Sequence[str]) -> list[ModelCard]:
    """The named configs of a paper, or its small-data ones when none is named.

    Raises:
        UserError: for a name that is unknown or another paper's.
    """
    if not names:
        return [card for card in models() if card.paper == paper and card.is_digits]
    cards = [find_model(name) for name in names]
    foreign = [card.name for card in cards if card.paper != paper]
    if foreign:
        raise UserError(f"{', '.join(foreign)} belongs to another paper than {paper.name}")
    return cards


def reproduce(
    card: ModelCard,
    out: Path,
    work_dir: Path,
    *,
    amp: bool = False,
    launcher: str = "none",
    console: Console | None = None,
) -> Path:
    """Train one config and write its record.

    A run is named by day and commit. One that was interrupted is continued; after a finished one of the same
    name the next gets a number.

    Returns:
        The folder of the record.
    """
    card.paper.module("mm")
    config = load_config(card.config)
    commit, dirty = _describe_source(card.paper)
    run = _name_run(out / card.paper.name / card.name, commit)
    record = out / card.paper.name / card.name / run
    result = train(
        config, work_dir=work_dir / card.name / run, resume=True, amp=amp, launcher=launcher, console=console
    )
    record.mkdir(parents=True, exist_ok=True)
    resolved = load_config(result.work_dir / Path(config.filename).name)
    (record / "config.py").write_text(_portable(resolved, result.work_dir).pretty_text, encoding="utf-8")
    _write_metrics(record / "metrics.jsonl", result)
    details = _describe(resolved, result) | {"commit": commit, "dirty": dirty}
    (record / "run.json").write_text(json.dumps(details, indent=2) + "\n", encoding="utf-8")
    return record


def _name_run(folder: Path, commit: str | None) -> str:
    name = f"{time.strftime('%Y-%m-%d')}-{(commit or 'unknown')[:8]}"
    number = 1
    while (folder / _numbered(name, number) / "run.json").exists():
        number += 1
    return _numbered(name, number)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _portable(config: Config, work_dir: Path) -> Config:
    """The config without what belongs to this machine or this attempt."""
    config.work_dir = work_dir.name
    config.load_from, config.resume = None, False
    config.pop("experiment_name", None)
    return config


def _write_metrics(path: Path, result: TrainResult) -> None:
    training, validation = read_history(result.work_dir)
    rows = [{"split": "train", **row} for row in training] + [{"split": "val", **row} for row in validation]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _describe(config: Config, result: TrainResult) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "seed": config.get("randomness", {}).get("seed"),
        "epochs": result.epochs,
        "metric": result.metric,
        "best": result.best,
        "seconds": round(result.seconds, 1),
        "vitreous": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "devices": torch.cuda.device_count() if on_gpu else os.cpu_count(),
    }


def _describe_source(paper: Paper) -> tuple[str | None, bool | None]:
    """Commit of the checkout that holds the paper's package, and whether it has changes; None for a wheel."""
    if _git(paper, "ls-files", "--error-unmatch", "__init__.py") is None:  # no checkout, or not of this package
        return None, None
    commit = _git(paper, "rev-parse", "HEAD")
    return commit, bool(_git(paper, "status", "--porcelain", "--untracked-files=no", "--", ":/packages"))


def _git(paper: Paper, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=paper.root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
