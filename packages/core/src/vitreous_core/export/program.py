"""One graph of a model, and the changes that some writers need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import UserError

MOST_IMAGES = 64
"""Largest dynamic batch: runtimes that plan their memory ahead need a bound."""

_ATEN = torch.ops.aten


def capture(model: nn.Module, images: Tensor, *, dynamic: bool) -> ExportedProgram:
    """The graph that a model runs on images of this size.

    Args:
        model: a map from images to one tensor, in evaluation mode.
        images: an example `[B, 3, height, width]`; B at least 2 where the batch is to be dynamic.
        dynamic: let the batch be anything from 1 to `MOST_IMAGES`.

    Raises:
        UserError: for a model that depends on values in ways a graph cannot express.
    """
    batch = ({0: Dim("batch", min=1, max=MOST_IMAGES)},) if dynamic else None
    try:
        with torch.no_grad():
            return torch.export.export(model, (images,), dynamic_shapes=batch)
    except Exception as error:  # torch.export fails with exceptions of all kinds
        raise UserError(f"torch.export makes no graph of this model: {first_line(error)}") from error


def simplify(program: ExportedProgram) -> ExportedProgram:
    """An equal graph without operators that ExecuTorch or Core ML stumble over.

    ExecuTorch 1.5 fixes the batch size where a tensor is split: slices stand in. Core ML's converter does not know
    `alias`, which does nothing.
    """
    simple = program.run_decompositions({_ATEN.split_with_sizes.default: _slices, _ATEN.split.Tensor: _equal_slices})
    graph = simple.graph
    for node in list(graph.nodes):
        if node.target == _ATEN.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    simple.graph_module.recompile()
    return simple


def operators(program: ExportedProgram) -> int:
    """How many operators the graph calls."""
    return sum(node.op == "call_function" for node in program.graph.nodes)


def first_line(error: BaseException) -> str:
    """The kind of an error and what its first line says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _slices(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(x.narrow(dim, start, size))
        start += size
    return pieces


def _equal_slices(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    length = x.shape[dim]
    return [x.narrow(dim, start, min(size, length - start)) for start in range(0, length, size)]
