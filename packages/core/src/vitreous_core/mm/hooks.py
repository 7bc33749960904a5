"""Hooks of a training run: compilation, progress on the console, and the mistakes that would waste the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import UserError
from .checkpoints import find_checkpoints

_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of `torch.compile` that use CUDA graphs."""


class NonFiniteLoss(UserError):
    """Training went wrong: the loss or the weights are no longer finite."""


class NonFiniteLossHook(Hook):
    """Stop at the first loss that is NaN or infinite, and never write weights that are.

    MMEngine's `RuntimeInfoHook` fetches the loss in every iteration anyway, so this costs no synchronization.
    """

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        for name, value in (outputs or {}).items():
            if "loss" in name and not _is_finite(value):
                where = f"epoch {runner.epoch + 1}, iteration {runner.iter + 1} of {runner.max_iters}"
                raise NonFiniteLoss(f"{name} became {torch.as_tensor(value).item()} at {where}; {_way_out(runner)}")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        for name, value in checkpoint["state_dict"].items():
            if not _is_finite(value):
                raise NonFiniteLoss(
                    f"{name} holds NaN or infinity at iteration {runner.iter + 1} of {runner.max_iters}; "
                    f"nothing was written. {_way_out(runner)}"
                )


@HOOKS.register_module()
class CompileHook(Hook):
    """Train with the backbone compiled in place by `torch.compile`, for one batch size at a time.

    Checkpoints keep their names. MMEngine's own key `compile` takes the whole training step instead, whose labels and
    logs break it into many graphs.

    Args:
        mode: of `torch.compile`. `"reduce-overhead"` also replays forward and backward as CUDA graphs, for networks
            whose kernels end before the host has launched the next.
        backend: of `torch.compile`.
    """

    def __init__(self, mode: str = "default", backend: str = "inductor") -> None:
        self.mode = mode
        self.backend = backend

    def before_train(self, runner: Runner) -> None:
        steps = getattr(runner.optim_wrapper, "_accumulative_counts", 1)
        if self.mode in _GRAPH_MODES and steps > 1:
            # Gradients lie in the graphs' memory, where the next replay writes over them: PyTorch issue 169545.
            raise UserError(
                f"compiling with mode {self.mode!r} cannot accumulate gradients; got optim_wrapper.accumulative_counts="
                f"{steps}. Use 1, or mode 'default'"
            )
        _unwrapped(runner).backbone.compile(mode=self.mode, backend=self.backend, dynamic=False)


class ClassCountHook(Hook):
    """Refuse to train a head on data with another number of classes, before a CUDA assertion does it."""

    def before_train(self, runner: Runner) -> None:
        model = _unwrapped(runner)
        metainfo = getattr(runner.train_dataloader.dataset, "metainfo", {})
        given = getattr(getattr(model, "head", None), "num_classes", None)
        needed = len(metainfo.get("classes") or ())
        if given is not None and needed and given != needed:
            raise UserError(
                f"model.head.num_classes must be the {needed} classes of the training data; got {given}. "
                f"Set --cfg-options model.head.num_classes={needed}"
            )


class MovedRunHook(Hook):
    """Let a run whose folder was moved or copied keep its hands off the old place.

    Checkpoints store the absolute path of the best one so far, and `CheckpointHook` deletes that file when it
    finds a better one: resuming a copy would delete the original's best checkpoint.
    """

    priority = "HIGH"  # before CheckpointHook reads the path

    def before_train(self, runner: Runner) -> None:
        best = runner.message_hub.runtime_info.get("best_ckpt")
        if best is not None:
            runner.message_hub.update_info("best_ckpt", str(Path(runner.work_dir) / Path(best).name))


class ProgressHook(Hook):
    """Shows where a run is: a bar on a terminal, otherwise one line per validation.

    Args:
        console: where to.
        title: what runs, shown before the bar.
    """

    priority = "VERY_LOW"  # after the hooks that update the scores which are shown

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.loss = float("nan")
        self.bar: Progress | None = None

    def before_train(self, runner: Runner) -> None:
        if not self.console.is_terminal or runner.rank != 0:
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=runner.max_iters, completed=runner.iter, status="")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if outputs and "loss" in outputs:
            self.loss = torch.as_tensor(outputs["loss"]).item()
        if self.bar is not None:
            self.bar.update(self.task, completed=runner.iter + 1, status=self._status(runner))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self.bar is not None:
            self.bar.update(self.task, status=self._status(runner))
        elif runner.rank == 0:
            scores = "  ".join(f"{name} {value:.2f}" for name, value in (metrics or {}).items())
            step = f"iteration {runner.iter}/{runner.max_iters}"
            self.console.print(f"{self.title}  {step}  loss {self.loss:.4f}  {scores}", highlight=False)

    def close(self) -> None:
        """Take the bar off the console, however the run ended."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _status(self, runner: Runner) -> str:
        best = runner.message_hub.runtime_info.get("best_score")
        return f"loss {self.loss:.4f}" + ("" if best is None else f"  best {best:.2f}")


def _unwrapped(runner: Runner) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _is_finite(value: Any) -> bool:
    return bool(torch.isfinite(torch.as_tensor(value)).all())


def _way_out(runner: Runner) -> str:
    kept = find_checkpoints(runner.work_dir)
    last = f"the last good checkpoint is {kept[0]}" if kept else "no checkpoint had been written yet"
    return f"{last}. Try a lower optim_wrapper.optimizer.lr or clip_grad"
