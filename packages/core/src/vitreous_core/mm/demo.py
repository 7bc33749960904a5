"""The main job: `python -m vitreous_core.mm.demo` trains every paper's small model on real images.

One process, one model after the other, through MMEngine's Runner from the packaged `*_digits` configs. It ends
with a table and one HTML page. Stopped and started again, it continues; finished models are not trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmpretrain.registry import DATASETS
from rich.console import Console
from rich.table import Table
from torch import nn

from ..errors import UserError
from ..zoo import ModelCard, models
from .models import build_model
from .page import Run, Sample, write_page
from .train import load_config, read_history, train

GOAL = 93.0
"""Top-1 accuracy in per cent that every model must reach on the held-back digits."""

_BATCH = 64


@dataclass(frozen=True)
class Progress:
    """What is kept beside a model's checkpoints, so that the job can be taken up again.

    Args:
        digest: of the resolved config; another config is another run.
        seconds: spent on training, over all attempts.
        finished: whether all epochs are done.
        epochs: epochs done when it finished.
        best: best top-1 in per cent.
        checkpoint: file name of the best checkpoint.
    """

    digest: str
    seconds: float = 0.0
    finished: bool = False
    epochs: int = 0
    best: float = 0.0
    checkpoint: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job. Returns 0 when every model reached the goal, 1 when one did not, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m vitreous_core.mm.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/demo"), help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="train everything again")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    threads = torch.get_num_threads()
    # For models this small a second thread gains next to nothing, and when another process wants its core,
    # waiting for it at every operation made training up to ten times slower.
    torch.set_num_threads(1)
    try:
        return _run(options.out, options.fresh, console)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


def demo_models() -> list[ModelCard]:
    """The digits models of all papers; of each model family its first.

    Raises:
        UserError: when no paper is importable.
    """
    first: dict[tuple[str, str], ModelCard] = {}
    for card in models():
        if card.is_digits:
            first.setdefault((card.paper.name, card.family), card)
    if not first:
        raise UserError("no paper is installed, so there is nothing to train; install one, e.g. vitreous-swiftformer")
    return list(first.values())


def _run(out: Path, fresh: bool, console: Console) -> int:
    start = time.perf_counter()
    cards = demo_models()
    runs = []
    for number, card in enumerate(cards, start=1):
        console.print(f"[bold]\\[{number}/{len(cards)}] {card.name}[/]")
        folder = out / card.name
        if fresh and folder.exists():
            shutil.rmtree(folder)
        runs.append(_train_one(card, folder, console))
    page = write_page(out / "index.html", runs, goal=GOAL, machine=_machine())

    console.print(_table(runs))
    console.print(f"{time.perf_counter() - start:.0f} s for this call")
    missed = [run.name for run in runs if run.best < GOAL]
    if missed:
        console.print(f"[red]below {GOAL:g} %: {', '.join(missed)}[/]")
    console.print(str(page.resolve()))
    return 1 if missed else 0


def _train_one(card: ModelCard, folder: Path, console: Console) -> Run:
    card.paper.module("mm")
    config = load_config(card.config)
    digest = hashlib.sha256(config.pretty_text.encode()).hexdigest()
    progress = _read_progress(folder)
    if progress is not None and progress.digest != digest:
        console.print("its config changed since the last run: training it again")
        shutil.rmtree(folder)
        progress = None
    progress = progress or Progress(digest)
    if progress.finished:
        console.print(f"done before: {progress.best:.2f} % in {progress.epochs} epochs")
    else:
        progress = _train_on(config, folder, progress, console)

    model = build_model(config, folder / progress.checkpoint)
    training, validation = read_history(folder)
    return Run(
        name=card.name,
        family=card.family,
        paper=card.paper_title,
        url=card.paper_url,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        backend=_backend(model),
        epochs=progress.epochs,
        seconds=progress.seconds,
        best=progress.best,
        losses=[(record["epoch"], record["loss"]) for record in training if "epoch" in record],
        scores=[(record["step"], record["accuracy/top1"]) for record in validation],
        samples=_predict_held_back(model, config),
    )


def _train_on(config: Config, folder: Path, progress: Progress, console: Console) -> Progress:
    folder.mkdir(parents=True, exist_ok=True)
    _write_progress(folder, progress)
    start = time.perf_counter()
    try:
        result = train(config, work_dir=folder, resume=_has_begun(folder), console=console)
    finally:
        progress = replace(progress, seconds=progress.seconds + time.perf_counter() - start)
        _write_progress(folder, progress)
    assert result.best is not None
    assert result.best_checkpoint is not None
    progress = replace(
        progress, finished=True, epochs=result.epochs, best=result.best, checkpoint=result.best_checkpoint.name
    )
    _write_progress(folder, progress)
    console.print(f"{progress.best:.2f} % in {progress.epochs} epochs, {progress.seconds:.0f} s")
    return progress


def _has_begun(folder: Path) -> bool:
    return any(folder.glob("epoch_*.pth"))


def _read_progress(folder: Path) -> Progress | None:
    path = folder / "demo.json"
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # cut off while it was written
        return Progress(digest="")


def _write_progress(folder: Path, progress: Progress) -> None:
    (folder / "demo.json").write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")


def _backend(model: nn.Module) -> str:
    """The attention backends of a model; `auto` is the torch backend wherever there is no GPU."""
    found = {str(module.backend) for module in model.modules() if isinstance(getattr(module, "backend", None), str)}
    if not found or (found == {"auto"} and not torch.cuda.is_available()):
        return "torch"
    return ", ".join(sorted(found))


@torch.no_grad()
def _predict_held_back(model: Any, config: Config) -> list[Sample]:
    """Predictions of all held-back digits, in order."""
    dataset = DATASETS.build(config.val_dataloader.dataset)
    samples = []
    for first in range(0, len(dataset), _BATCH):
        items = [dataset[i] for i in range(first, min(first + _BATCH, len(dataset)))]
        for index, answer in enumerate(model.val_step(pseudo_collate(items)), start=first):
            scan = dataset.get_data_info(index)["img"][:, :, 0]
            samples.append(Sample(scan, int(answer.gt_label), int(answer.pred_label)))
    return samples


def _table(runs: Sequence[Run]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("params", justify="right")
    table.add_column("backend")
    for column in ("epochs", "seconds", "top-1 %"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(
            run.name, f"{run.parameters:,}", run.backend, str(run.epochs), f"{run.seconds:.0f}", f"{run.best:.2f}"
        )
    return table


def _machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread"
    return {
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


if __name__ == "__main__":
    sys.exit(main())
