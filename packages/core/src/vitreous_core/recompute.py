"""Gradient checkpointing that leaves batch norms' running statistics as they would be without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, its inner activations made again in the backward pass instead of kept.

    Args:
        module: maps one tensor to one tensor.
        x: its input, any shape.

    Returns:
        The same output, gradients, random draws and running statistics as `module(x)`.
    """
    y: Tensor
    if torch.compiler.is_compiling():  # compiled graphs apply updates of buffers once, and take no contexts
        y = checkpoint(module, x, use_reentrant=False)
    else:
        y = checkpoint(module, x, use_reentrant=False, context_fn=partial(_contexts, module))
    return y


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _running_statistics_kept(module)


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    # Momentum 0 leaves the statistics as they are. Switching tracking off would do so too, but then the second
    # forward saves fewer tensors than the first, which `checkpoint` takes for a mistake.
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
