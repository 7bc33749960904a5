"""Exported networks as providers: the same network in another runtime, beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..deploy import switch_to_deploy
from ..errors import UserError
from ..export.formats import FORMATS, quiet
from ..export.program import capture
from .attention import relative_error
from .case import Gate, Prepared, Provider, Unavailable
from .models import INFER, Adopt, Build, ModelProblem, State, draw, load_weights, reference_of, truth_of

_ALLOWANCE = 5.0
"""On top of PyTorch's own: runtimes choose faster convolutions and rougher exponentials."""


def folded(module: nn.Module, state: State) -> None:
    """Take the reference's weights and switch to deploy mode: an `adopt` for providers that only infer."""
    load_weights(module, state)
    switch_to_deploy(module.eval())


def runtime_provider(name: str, build: Build, format: str, *, adopt: Adopt = folded) -> Provider:
    """A provider that exports a network, for the batch of the problem, and runs the file on the CPU.

    Args:
        name: of the provider.
        build: builds the classifier. Raises `Unavailable` where a library is missing.
        format: a name in `vitreous_core.export.formats.FORMATS` whose runtime runs here.
        adopt: gives it the reference's weights; `folded` also switches it to deploy mode.
    """
    return Provider(name, partial(_prepare, build=build, format=format, adopt=adopt))


def _prepare(problem: ModelProblem, device: torch.device, *, build: Build, format: str, adopt: Adopt) -> Prepared:
    kind = FORMATS[format]
    try:
        kind.require()
    except UserError as error:
        raise Unavailable(str(error)) from None
    module = build()
    adopt(module, reference_of(problem, device).state_dict())
    images = draw(problem, device)
    assert kind.open is not None
    with quiet(), TemporaryDirectory() as folder:
        path = Path(folder) / f"model{kind.suffix}"
        kind.write(capture(module.eval(), images, dynamic=False), path, {})
        run = kind.open(path, torch.get_num_threads())
        facts = {"format": format, "file_mb": path.stat().st_size / 1e6, "threads": torch.get_num_threads()}
        if format == "executorch":
            facts["threads"] = "the runtime's own pool"

    def infer() -> Tensor:
        with torch.no_grad():
            return run(images)

    return Prepared({INFER: infer}, partial(_gate, problem, infer), facts=facts)


def _gate(problem: ModelProblem, infer: Callable[[], Tensor], modes: Collection[str]) -> Gate:
    truth, limits = truth_of(problem, torch.device("cpu"))
    error = relative_error(infer()[: len(truth["scores"])], truth["scores"])
    return Gate({"scores": error}, {"scores": _ALLOWANCE * limits["scores"]}, "the reference network in float64")
