"""Training and testing from configs through MMEngine's Runner, with errors that a person can act on."""

from __future__ import annotations

import argparse
import copy
import errno
import itertools
import json
import logging
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from rich.console import Console
from rich.logging import RichHandler

from ..errors import UserError
from .checkpoints import ResumePoint, find_checkpoints, find_resume_point, load_weights, read_resume_point
from .hooks import ClassCountHook, CompileHook, MovedRunHook, NonFiniteLossHook, ProgressHook

_LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
_AMP_ON_GPU = {"OptimWrapper": "AmpOptimWrapper", "AGCOptimWrapper": "AGCAmpOptimWrapper"}
_AMP_ON_CPU = {"OptimWrapper": "CPUAmpOptimWrapper", "AGCOptimWrapper": "AGCCPUAmpOptimWrapper"}
_BEST_NAME = re.compile(r"best_(.+)_(?:epoch|iter)_(\d+)\.pth")
_run_numbers = itertools.count(1)


@dataclass(frozen=True)
class TrainResult:
    """How a training run ended.

    Args:
        work_dir: where its checkpoints and logs are.
        epochs: epochs done in all.
        seconds: wall time of this call, without the time before an interruption.
        metric: name of the validation score, e.g. `"accuracy/top1"`, or None when nothing was validated.
        best: best score, or None.
        best_checkpoint: the checkpoint that reached it; the last one when no best one is kept.
        was_finished: whether the run had been finished before and nothing was trained.
    """

    work_dir: Path
    epochs: int
    seconds: float
    metric: str | None
    best: float | None
    best_checkpoint: Path | None
    was_finished: bool


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config and apply `--cfg-options`.

    Raises:
        UserError: when the file, one of its bases or a module that it imports is missing or malformed.
    """
    try:
        config = Config.fromfile(str(path))
    except (OSError, ImportError, SyntaxError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"config {path} cannot be read: {reason}") from error
    if options:
        config.merge_from_dict(dict(options))
    # Every checkpoint stores the config's text, and formatting it with yapf each time adds up to seconds.
    return Config(config.to_dict(), config.text, config.filename, format_python_code=False)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """The `KEY=VALUE` pairs of `--cfg-options`, as MMEngine reads them.

    Raises:
        UserError: for a pair without `=`.
    """
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--cfg-options takes KEY=VALUE pairs; got {pair!r}")
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cfg-options", nargs="*", action=DictAction, default={})
    return dict(parser.parse_args(["--cfg-options", *pairs]).cfg_options) if pairs else {}


def train(
    config: Config,
    *,
    work_dir: str | Path | None = None,
    resume: bool | str = False,
    amp: bool = False,
    compile_mode: str | None = None,
    launcher: str = "none",
    console: Console | None = None,
) -> TrainResult:
    """Train what a config describes, as MMPretrain's own tool does, or take an interrupted run up again.

    Args:
        config: the config; it is not changed.
        work_dir: where checkpoints and logs go; default the config's own, or `work_dirs/<config name>`.
        resume: True continues the run in `work_dir` from its last whole checkpoint, or starts it when there is
            none yet; a path continues from that checkpoint.
        amp: mixed precision; on a CPU it is bfloat16 autocast.
        compile_mode: compile the backbone in this mode of `torch.compile` (see `CompileHook`); default not at all.
        launcher: how processes were started: `"none"`, `"pytorch"`, `"slurm"` or `"mpi"`.
        console: where progress is shown; default standard output.

    Raises:
        UserError: for everything that the caller can put right. Subclasses: `CheckpointError`, `NonFiniteLoss`.
    """
    console = console or Console()
    config, folder = _prepare(config, work_dir, launcher)
    if amp:
        _use_amp(config)
    point = _choose_start(folder, resume, console)
    if point is not None and _is_finished(config, point):
        console.print(f"{folder} holds a finished run of {point.epoch} epochs; nothing to train")
        return _result(folder, epochs=point.epoch, seconds=0.0, best=point.best, was_finished=True)
    config.resume = point is not None
    if point is not None:
        config.load_from = str(point.path)
    _require_writable(folder)

    start = time.perf_counter()
    progress = ProgressHook(console, title=_stem(config))
    with _errors_of_configs(config), _errors_of_disks(folder):
        runner = build_runner(config, console)
        for hook in (MovedRunHook(), ClassCountHook(), NonFiniteLossHook(), progress):
            runner.register_hook(hook)
        if compile_mode is not None:
            runner.register_hook(CompileHook(compile_mode))
        try:
            with _interruptible():
                runner.train()
        finally:
            progress.close()
            _close_log(runner)
    best = runner.message_hub.runtime_info.get("best_score")
    seconds = time.perf_counter() - start
    return _result(folder, epochs=runner.epoch, seconds=seconds, best=best, was_finished=False)


def evaluate(
    config: Config,
    checkpoint: str | Path,
    *,
    work_dir: str | Path | None = None,
    launcher: str = "none",
    console: Console | None = None,
) -> dict[str, float]:
    """Metrics of a checkpoint on the config's test data.

    Raises:
        UserError: as `train`.
        vitreous_core.errors.StateMismatch: when the checkpoint does not fit the config's model.
    """
    config, folder = _prepare(config, work_dir, launcher)
    _require_writable(folder)
    with _errors_of_configs(config), _errors_of_disks(folder):
        runner = build_runner(config, console or Console())
        model = runner.model.module if hasattr(runner.model, "module") else runner.model
        load_weights(model, checkpoint)
        try:
            metrics = runner.test()
        finally:
            _close_log(runner)
    return {name: float(value) for name, value in metrics.items()}


def read_history(work_dir: str | Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Training and validation records of a run, each sorted by its `step`, across interruptions.

    A step that was done twice, because the run resumed before it, counts once: the later record.
    """
    train_records: dict[float, dict[str, float]] = {}
    val_records: dict[float, dict[str, float]] = {}
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a process that died while it wrote
                continue
            kept = train_records if "loss" in record else val_records
            kept[record["step"]] = record
    return [train_records[step] for step in sorted(train_records)], [val_records[step] for step in sorted(val_records)]


def quiet_log() -> None:
    """Let MMEngine's log outside of runs say warnings only; models tell it about their ordinary settings."""
    if not MMLogger.check_instance_created("vitreous"):
        MMLogger.get_instance("vitreous", log_level="WARNING")


class QuietRunner(Runner):
    """MMEngine's Runner with its log in the work dir's file, and only warnings and errors on the console."""

    console: Console

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _raise_log_error  # type: ignore[method-assign]
            elif handler.level <= logging.WARNING:  # rank 0; the other ranks show errors only
                logger.handlers.remove(handler)
                quiet = RichHandler(logging.WARNING, self.console, show_time=False, show_path=False)
                logger.handlers.append(quiet)
        return logger


def build_runner(config: Config, console: Console) -> Runner:
    """The config's runner, quiet unless the config brings a runner type of its own."""
    if "runner_type" in config:
        return RUNNERS.build(config)
    # MMEngine keeps loggers, message hubs and visualizers by name; two runs of one process need two names.
    config.experiment_name = f"{_stem(config)}-{next(_run_numbers)}"
    runner_class: Any = type("ConsoleRunner", (QuietRunner,), {"console": console})
    return runner_class.from_cfg(config)


def _prepare(config: Config, work_dir: str | Path | None, launcher: str) -> tuple[Config, Path]:
    if launcher not in _LAUNCHERS:
        raise ValueError(f"launcher must be one of {_LAUNCHERS}; got {launcher!r}")
    if launcher != "none" and not torch.cuda.is_available():
        raise UserError(f"--launcher {launcher} needs GPUs, and PyTorch finds none here; leave it out")
    config = copy.deepcopy(config)
    config.launcher = launcher
    config.work_dir = str(find_work_dir(config, work_dir))
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(name) is not None:
            config[name].setdefault("pin_memory", torch.cuda.is_available())
            config[name].setdefault("persistent_workers", config[name].get("num_workers", 0) > 0)
            config[name].setdefault("collate_fn", {"type": "default_collate"})
    return config, Path(config.work_dir)


def find_work_dir(config: Config, work_dir: str | Path | None = None) -> Path:
    """Where a run of this config goes: the given folder, else the config's own, else `work_dirs/<config name>`."""
    return Path(work_dir or config.get("work_dir") or Path("work_dirs") / _stem(config))


def _stem(config: Config) -> str:
    return Path(config.filename).stem if config.filename else "config"


def _use_amp(config: Config) -> None:
    known = _AMP_ON_GPU if torch.cuda.is_available() else _AMP_ON_CPU
    wrapper = config.optim_wrapper
    kind = wrapper.get("type", "OptimWrapper")
    if kind in known.values():
        return
    if kind not in known:
        raise UserError(f"--amp knows the optim_wrapper types {', '.join(known)}; the config has {kind}")
    wrapper.type = known[kind]
    if torch.cuda.is_available():
        wrapper.setdefault("loss_scale", "dynamic")


def _choose_start(work_dir: Path, resume: bool | str, console: Console) -> ResumePoint | None:
    if isinstance(resume, str):
        return read_resume_point(resume)
    if not resume:
        kept = find_checkpoints(work_dir)
        if kept:
            raise UserError(
                f"work dir {work_dir} already holds a run ({kept[0].name}); continue it with --resume, or choose "
                "another --work-dir"
            )
        return None
    point = find_resume_point(work_dir)
    if point is None:
        console.print(f"{work_dir} holds no checkpoint yet; starting from the beginning")
        return None
    for reason in point.skipped:
        console.print(f"[yellow]warning:[/] {reason}", soft_wrap=True, highlight=False)
    console.print(f"resuming from {point.path} ({point.epoch} epochs done)", soft_wrap=True, highlight=False)
    return point


def _is_finished(config: Config, point: ResumePoint) -> bool:
    if config.train_cfg.get("by_epoch", True):
        return point.epoch >= config.train_cfg.max_epochs
    return point.iteration >= config.train_cfg.max_iters


def _result(work_dir: Path, *, epochs: int, seconds: float, best: float | None, was_finished: bool) -> TrainResult:
    kept = [(path.stat().st_mtime, path) for path in work_dir.glob("best_*.pth")]
    checkpoint = max(kept)[1] if kept else next(iter(find_checkpoints(work_dir)), None)
    _, validations = read_history(work_dir)
    metric = next((name for record in validations for name in record if "/" in name), None)
    if best is None and metric is not None:
        best = max(record[metric] for record in validations if metric in record)
    return TrainResult(work_dir, epochs, seconds, metric, best, checkpoint, was_finished)


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"work dir {folder} cannot be written: {error.strerror}; choose another with --work-dir"
        ) from error


@contextmanager
def _errors_of_configs(config: Config) -> Iterator[None]:
    """Turns what MMEngine raises for a wrong name in a config, or for absent data, into one line."""
    try:
        yield
    except FileNotFoundError as error:
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            root = config.get(name, {}).get("dataset", {}).get("data_root")
            if root and str(error.filename).startswith(str(root)):
                raise UserError(
                    f"the data is not at {error.filename}; put it there, or name its place with --cfg-options "
                    f"{name}.dataset.data_root=FOLDER and the same for the other two dataloaders"
                ) from error
        raise
    except KeyError as error:
        unknown = re.search(r"(\w+) is not in the (\S+) registry", str(error))
        if unknown is None:
            raise
        raise UserError(
            f"the config names {unknown[1]!r}, which no imported package registers in {unknown[2]}; is the module "
            "that registers it in custom_imports?"
        ) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"the config sets something that does not exist: {error}") from error


@contextmanager
def _errors_of_disks(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        kept = find_checkpoints(folder)
        where = f" to {error.filename}" if error.filename else ""
        raise UserError(
            f"cannot write{where}: {error.strerror}. "
            + (f"Checkpoints are in {folder}; make room and continue with --resume" if kept else "Make room first")
        ) from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ends a run on SIGTERM as on Ctrl-C, and lets neither be turned into another error on its way up.

    MMEngine formats a config inside a bare `except`, which would report Ctrl-C as a syntax error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception:
        if received:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise_log_error(record: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    assert error is not None
    raise error


def _close_log(runner: Runner) -> None:
    for handler in list(runner.logger.handlers):
        if isinstance(handler, logging.FileHandler):
            runner.logger.handlers.remove(handler)
            handler.close()
