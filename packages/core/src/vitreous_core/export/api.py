"""Fold, capture, write, run, compare, time."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bench.measure import WallClock, quantiles
from ..deploy import switch_to_deploy
from ..errors import UserError
from .formats import FORMATS, Run, quiet
from .program import capture, first_line

_TIMED_MS, _FEWEST, _MOST = 1000.0, 5, 100
_ALLOWANCE, _ROUNDING = 10.0, 1e-6
_INPUT = "float32, normalized, [batch, channel, height, width]"


@dataclass(frozen=True)
class Runner:
    """Somebody who ran the model.

    Args:
        name: e.g. `"ONNX Runtime"`.
        error: `norm(got - truth) / norm(truth)`, the truth being the model as it was trained, in fp64.
        latency_ms: p20, p50 and p80 of one call.
    """

    name: str
    error: float
    latency_ms: tuple[float, float, float]


@dataclass(frozen=True)
class Exported:
    """A file, and what was found out about it.

    Args:
        path: the file, or the folder where the format is one.
        bytes: its size.
        folded: whether the model had a deploy mode to switch to.
        batch: images of a timed call.
        size: (height, width).
        runners: PyTorch as trained, PyTorch in deploy mode, and the runtime where it runs here.
        facts: what the file says about itself, and what else a reader must know.
    """

    path: Path
    bytes: int
    folded: bool
    batch: int
    size: tuple[int, int]
    runners: tuple[Runner, ...]
    facts: Mapping[str, str] = field(default_factory=dict)


def export_model(
    model: nn.Module,
    path: Path,
    format: str,
    *,
    size: tuple[int, int],
    batch: int | None = None,
    threads: int = 1,
    about: Mapping[str, str] | None = None,
) -> Exported:
    """Write a model to a file of some format, and compare what runs there with the model.

    The truth is the model as it came, in fp64, on random images; a runtime may be off by ten times what PyTorch is
    off by in fp32 (but 1e-5 at least), because runtimes choose faster convolutions and rougher exponentials. The file
    gets its name when it has passed.

    Args:
        model: a map from images to logits, in evaluation mode, fp32, on the CPU; it stays as it is.
        path: what to write; an existing file is replaced.
        format: a name in `FORMATS`.
        size: (height, width) of the images.
        batch: images in a call, or None for any number from 1 to `MOST_IMAGES`.
        threads: for PyTorch and for runtimes that can be told.
        about: facts to store in the file.

    Raises:
        UserError: for an unknown format, a missing extra or folder, a model that the format cannot take, wrong results.
    """
    if format not in FORMATS:
        raise UserError(f"no format is named {format!r}; there are {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"no folder is at {path.parent}")
    kind = FORMATS[format]
    kind.require()
    images = _images(3 if batch is None else batch, size)
    with _threads(threads), torch.no_grad():
        truth = copy.deepcopy(model).double()(images.double())
        one_call = images[:1] if batch is None else images
        plain = Runner("PyTorch, as trained", *_try(model, images, one_call, truth, dynamic=batch is None))
        deployed = copy.deepcopy(model)
        folded = switch_to_deploy(deployed)
        runners = [plain]
        if folded:
            figures = _try(deployed, images, one_call, truth, dynamic=batch is None)
            runners.append(Runner("PyTorch, deploy mode", *figures))
        with quiet(), _finished_file(path) as partial:
            program = capture(deployed, images[:2] if batch is None else images, dynamic=batch is None)
            stored = {**(about or {}), "input": f"{_INPUT}, {size[0]} x {size[1]}"}
            with _refusals(f"--format {kind.name} cannot take this model"):
                kind.write(program, partial, stored)
            facts = dict(kind.inspect(partial))
            if kind.open is None:
                facts["parity"] = f"not run here: {kind.runtime} is on Apple devices only. Its program was inspected"
            else:
                with _refusals(f"{kind.runtime} cannot run this model"):
                    run = kind.open(partial, threads)
                    runner = Runner(kind.runtime, *_try(run, images, one_call, truth, dynamic=batch is None))
                _require_parity(runner, plain)
                runners.append(runner)
    return Exported(path, _bytes_of(path), folded, len(one_call), size, tuple(runners), facts)


def _images(count: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def _try(
    run: Run | nn.Module, images: Tensor, one_call: Tensor, truth: Tensor, *, dynamic: bool
) -> tuple[float, tuple[float, float, float]]:
    """The largest error over the batch sizes, and the latency of one call."""
    counts = range(1, len(images) + 1) if dynamic else (len(images),)
    errors = []
    for count in counts:
        got = run(images[:count]).double()
        if got.shape != truth[:count].shape:
            raise UserError(
                f"the exported model answers {tuple(got.shape)} where {tuple(truth[:count].shape)} is right"
            )
        errors.append(((got - truth[:count]).norm() / truth[:count].norm()).item())
    clock = WallClock(torch.device("cpu"))
    once = max(clock.samples_ms(lambda: run(one_call), 2))
    count = max(_FEWEST, min(_MOST, int(_TIMED_MS / max(once, 1e-3))))
    return max(errors), quantiles(clock.samples_ms(lambda: run(one_call), count))


def _require_parity(runner: Runner, plain: Runner) -> None:
    limit = _ALLOWANCE * max(plain.error, _ROUNDING)
    if not runner.error <= limit:
        raise UserError(
            f"{runner.name} disagrees with the model: relative error {runner.error:.1e}, allowed {limit:.1e} "
            "(ten times PyTorch's own). Nothing was written"
        )


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """What an exporter or a runtime does not support it says with exceptions of all kinds."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)}") from error


@contextmanager
def _finished_file(path: Path) -> Iterator[Path]:
    """A path to write to; what is there takes the place of `path` only when the block ends without an error."""
    partial = path.with_name(f"partial.{path.name}")
    _remove(partial)
    try:
        yield partial
        _remove(path)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
