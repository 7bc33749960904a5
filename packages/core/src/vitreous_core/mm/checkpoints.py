"""Reading checkpoints that somebody else may have written, or that a dying process left behind."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..state import check_state, unwrap_state

_NUMBERED = re.compile(r"(?:epoch|iter)_(\d+)\.pth")
_REFUSED = re.compile(r"GLOBAL (\S+)|asks for (attribute .*?), which")
_RESUME_KEYS = ("meta", "state_dict", "message_hub", "optimizer")


class CheckpointError(UserError):
    """A checkpoint that is missing, broken or refused. Nothing in it has been executed."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU with `weights_only=True`.

    Raises:
        CheckpointError: when it is missing, truncated, no checkpoint at all, or asks for code to be run.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no checkpoint is at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails anywhere in the reader, with any exception
        refused = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise CheckpointError(f"{path} is not whole, or no PyTorch checkpoint: {_reason(error)}") from error
        raise CheckpointError(
            f"{path} was refused: it asks for {refused[1] or refused[2]} while loading, which weights never need. "
            "Nothing in it was executed"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} must hold a dictionary; it holds a {type(checkpoint).__name__}")
    return checkpoint


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint's weights into a model that they must fit exactly.

    MMEngine's own loader drops what does not fit and goes on, so a checkpoint of another class count would leave
    a random head behind.

    Args:
        model: a whole classifier.
        path: the checkpoint; its state under `state_dict`, `model` or bare.

    Returns:
        The checkpoint's `meta`, empty when it has none.

    Raises:
        CheckpointError: as `load_checkpoint`.
        vitreous_core.errors.StateMismatch: naming the keys and shapes that differ.
    """
    checkpoint = load_checkpoint(path)
    state = {name.removeprefix("module."): value for name, value in unwrap_state(checkpoint).items()}
    check_state(model.state_dict(), state)
    model.load_state_dict(state)
    meta = checkpoint.get("meta")
    return meta if isinstance(meta, dict) else {}


@dataclass(frozen=True)
class ResumePoint:
    """Where a run can be taken up again.

    Args:
        path: the newest whole checkpoint.
        epoch: epochs done when it was written.
        iteration: iterations done when it was written.
        best: best validation score so far, or None.
        skipped: why newer checkpoints were passed over, one sentence each.
    """

    path: Path
    epoch: int
    iteration: int
    best: float | None
    skipped: tuple[str, ...]


def find_checkpoints(work_dir: str | Path) -> list[Path]:
    """Checkpoints that a run left in its folder, newest first; `best_*` copies do not count."""
    numbered = [
        (int(match[1]), path)
        for path in Path(work_dir).glob("*.pth")
        if (match := _NUMBERED.fullmatch(path.name)) is not None
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def find_resume_point(work_dir: str | Path) -> ResumePoint | None:
    """The newest whole checkpoint of a run, or None when the run has written none yet.

    A process that dies while it writes leaves a truncated file; the one before is whole, and resuming from it
    costs one epoch instead of the run.

    Raises:
        CheckpointError: when there are checkpoints but none is whole.
    """
    work_dir = Path(work_dir)
    skipped = []
    pointer = work_dir / "last_checkpoint"
    if pointer.is_file():
        named = Path(pointer.read_text(encoding="utf-8").strip())
        if not (work_dir / named.name).is_file():
            skipped.append(f"{pointer.name} names {named.name}, which is missing")
    candidates = find_checkpoints(work_dir)
    for path in candidates:
        try:
            return read_resume_point(path, skipped=tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {work_dir} is whole ({'; '.join(skipped)}); start again in another --work-dir"
        )
    return None


def read_resume_point(path: str | Path, skipped: tuple[str, ...] = ()) -> ResumePoint:
    """What a training checkpoint says about its run.

    Raises:
        CheckpointError: when it cannot be loaded, or holds weights only and so cannot be resumed from.
    """
    checkpoint = load_checkpoint(path)
    missing = [key for key in _RESUME_KEYS if key not in checkpoint]
    if missing:
        raise CheckpointError(f"{path} cannot be resumed from: it holds no {', '.join(missing)}")
    best = checkpoint["message_hub"].get("runtime_info", {}).get("best_score")
    return ResumePoint(
        path=Path(path),
        epoch=int(checkpoint["meta"]["epoch"]),
        iteration=int(checkpoint["meta"]["iter"]),
        best=None if best is None else float(best),
        skipped=skipped,
    )


def _reason(error: Exception) -> str:
    first_sentence = str(error).strip().split(". ")[0].split("\n")[0]
    return f"{type(error).__name__}: {first_sentence}"
