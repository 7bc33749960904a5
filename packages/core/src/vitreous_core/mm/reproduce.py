"""Keep the record of a training run: `python -m vitreous_core.mm.reproduce PAPER [CONFIG-NAME ...]`.

Without names it runs the paper's small-data configs. Each run leaves `<out>/<paper>/<config>/<run>/` with the
resolved config, every training and validation record, and who ran it where; weights stay in the work dir.

Several seeds and backends of one config, side by side in processes, show whether a kernel trains as the reference does:

    python -m vitreous_core.mm.reproduce PAPER CONFIG-NAME --seed 0 1 2 --backend torch triton --jobs 6
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console

from .. import __version__
from ..errors import StateMismatch, UserError
from ..papers import Paper
from ..zoo import ModelCard, find_model, find_paper, models
from .train import TrainResult, load_config, parse_options, read_history, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the configs one after the other. Returns 0, 2 for a mistake of the user, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m vitreous_core.mm.reproduce", description=__doc__)
    parser.add_argument("paper", metavar="PAPER", help="e.g. swiftformer")
    parser.add_argument("configs", metavar="CONFIG-NAME", nargs="*", help="default: the small-data configs")
    parser.add_argument("--out", type=Path, default=Path("docs/results/repro"), help="default: %(default)s")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/repro"), help="default: %(default)s")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--seed", type=int, nargs="+", help="a run for each, instead of the config's")
    parser.add_argument("--backend", nargs="+", help="a run for each, instead of the config's backbone.backend")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE",
                        help="settings that differ from the config's")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each in a process (default: 1)")
    parser.add_argument("--commit", metavar="SHA", help="recorded instead of what git says, e.g. 1a2b3c4-dirty")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        cards = choose_configs(find_paper(options.paper), options.configs)
        variants = [Variant(seed, backend) for seed in options.seed or [None] for backend in options.backend or [None]]
        runs = [(card, variant) for card in cards for variant in variants]
        if options.jobs > 1 and len(runs) > 1:
            return _run_side_by_side(runs, options, console)
        for card, variant in runs:
            console.print(f"[bold]{card.name}[/] {variant.label}")
            record = reproduce(
                card, options.out, options.work_dir, variant, amp=options.amp, launcher=options.launcher,
                settings=parse_options(options.cfg_options), commit=options.commit, console=console,
            )  # fmt: skip
            console.print(str(record))
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command on the same commit continues", file=sys.stderr)
        return 130
    except (UserError, StateMismatch) as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
        return 2


@dataclass(frozen=True)
class Variant:
    """What a run changes of its config.

    Args:
        seed: of everything random, or None for the config's.
        backend: of the backbone, or None for the config's.
    """

    seed: int | None = None
    backend: str | None = None

    @property
    def label(self) -> str:
        """For names: `"triton-seed0"`; empty when nothing is changed."""
        seed = None if self.seed is None else f"seed{self.seed}"
        return "-".join(part for part in (self.backend, seed) if part is not None)

    def settings(self) -> dict[str, Any]:
        """As `--cfg-options`."""
        given = {"randomness.seed": self.seed, "model.backbone.backend": self.backend}
        return {key: value for key, value in given.items() if value is not None}


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
    variant: Variant = Variant(),
    *,
    amp: bool = False,
    launcher: str = "none",
    settings: Mapping[str, Any] | None = None,
    commit: str | None = None,
    console: Console | None = None,
) -> Path:
    """Train one config and write its record.

    A run is named by day, commit and variant. One that was interrupted is continued; after a finished one of the same
    name the next gets a number.

    Args:
        card: the config.
        out: records go to `<out>/<paper>/<config>/<run>`.
        work_dir: checkpoints and logs go to `<work_dir>/<config>/<run>`.
        variant: seed and backend.
        amp, launcher: as in `train`.
        settings: further changes of the config, by dotted name.
        commit: recorded instead of what git says, where the sources are no checkout; `-dirty` behind it says that
            files had changed.
        console: where progress is shown.

    Returns:
        The folder of the record.
    """
    card.paper.module("mm")
    config = load_config(card.config, {**(settings or {}), **variant.settings()})
    if commit is None:
        commit, dirty = _describe_source(card.paper)
    else:
        commit, dirty = commit.removesuffix("-dirty"), commit.endswith("-dirty")
    run = _name_run(out / card.paper.name / card.name, commit, variant)
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


def _run_side_by_side(runs: Sequence[tuple[ModelCard, Variant]], options: argparse.Namespace, console: Console) -> int:
    """Each run by a process of its own, which says on its last line where its record is."""
    shared = ["--out", str(options.out), "--work-dir", str(options.work_dir), "--launcher", options.launcher]
    shared += ["--amp"] * options.amp
    shared += ["--commit", options.commit] if options.commit else []
    shared += ["--cfg-options", *options.cfg_options] if options.cfg_options else []

    def run(entry: tuple[ModelCard, Variant]) -> int:
        card, variant = entry
        own = [] if variant.seed is None else ["--seed", str(variant.seed)]
        own += [] if variant.backend is None else ["--backend", variant.backend]
        command = [sys.executable, "-m", "vitreous_core.mm.reproduce", options.paper, card.name, *own, *shared]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        console.print(f"[bold]{card.name}[/] {variant.label}: {''.join(last)}")
        return done.returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        return max(pool.map(run, runs))


def _name_run(folder: Path, commit: str | None, variant: Variant) -> str:
    name = f"{time.strftime('%Y-%m-%d')}-{(commit or 'unknown')[:8]}"
    name = f"{name}-{variant.label}" if variant.label else name
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
        "backend": config.model.backbone.get("backend"),
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
