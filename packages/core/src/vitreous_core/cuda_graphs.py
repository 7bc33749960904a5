"""CUDA graphs of a module: one launch instead of hundreds, for batches too small to fill a GPU.

Eager PyTorch takes several microseconds of the host for each kernel, and a small network at batch 1 has hundreds that
take less than that. A captured graph replays them all at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_WARM_UPS = 3
"""Calls before the capture: libraries choose algorithms and kernels compile in the first ones."""

Key = tuple[Any, ...]


class GraphedModule:
    """A module for inference whose forward is captured for each kind of input and then replayed.

    A kind is shape, strides, dtype and device of every input, and autocast's state. Inputs are copied into the memory
    that the graph reads, results out of the memory that it writes, so both are the caller's. The module must do the
    same work for every input of a kind: no choice by values, no transfer to the host, no random numbers.

    A compiled module (`module.compile()`) compiles in the calls before the capture: few kernels, in one launch. Leave
    modes of `torch.compile` with graphs of their own, such as `"reduce-overhead"`, to training.

    Weights are read where they lie. Changes in place, such as `load_state_dict`, show at once; when parameters have
    moved, their graphs are captured anew. After exchanging layers call `reset()`. Not for several threads at once.

    Args:
        module: in evaluation mode, on a GPU.
        max_graphs: kinds of input kept; the one unused longest goes first.

    Raises:
        ValueError: for `max_graphs` below 1.
    """

    def __init__(self, module: nn.Module, max_graphs: int = 8) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1; got {max_graphs}")
        self.module = module
        self.max_graphs = max_graphs
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._parameters: list[nn.Parameter] = []
        self._places: list[int] = []

    def __call__(self, *inputs: Tensor) -> Any:
        """The module's result for `inputs`, without gradients.

        Raises:
            RuntimeError: listing every reason why this cannot be captured.
        """
        if self._places != [parameter.data_ptr() for parameter in self._parameters]:
            self.reset()
        key = graph_key(inputs)
        graph = self._graphs.get(key)
        if graph is None:
            if reasons := unsupported_reasons(self.module, inputs):
                raise RuntimeError(f"this cannot be a CUDA graph: {'; '.join(reasons)}. Call the module itself")
            graph = self._remember(key, _capture(self.module, inputs))
        elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            raise RuntimeError(f"this cannot be a CUDA graph: {_NEEDS_GRADIENT}. Call the module itself")
        self._graphs.move_to_end(key)
        return graph.replay(inputs)

    def reset(self) -> None:
        """Forget all graphs."""
        self._graphs.clear()
        self._parameters = list(self.module.parameters())
        self._places = [parameter.data_ptr() for parameter in self._parameters]

    def __len__(self) -> int:
        """Graphs kept."""
        return len(self._graphs)

    def _remember(self, key: Key, graph: _Graph) -> _Graph:
        if not self._graphs:
            self.reset()
        self._graphs[key] = graph
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
        return graph


_NEEDS_GRADIENT = "an input requires gradients, which a replay does not give"


def graph_key(inputs: tuple[Tensor, ...]) -> Key:
    """What two calls must share to be one graph."""
    kinds = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in inputs)
    autocast = torch.is_autocast_enabled("cuda")
    return (*kinds, autocast and torch.get_autocast_dtype("cuda"))


def unsupported_reasons(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """Why a call cannot be captured; empty when it can, as far as can be told before."""
    reasons = []
    if not inputs:
        reasons.append("there is no input")
    if module.training:
        reasons.append("the module is in training mode; call eval() first")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        reasons.append(_NEEDS_GRADIENT)
    if inputs and inputs[0].device.type != "cuda":
        reasons.append(f"inputs must be on a CUDA device; got {inputs[0].device}")
    elsewhere = {str(tensor.device) for tensor in (*inputs, *module.parameters(), *module.buffers())}
    if inputs and len(elsewhere) > 1:
        reasons.append(f"inputs and weights must be on one device; got {', '.join(sorted(elsewhere))}")
    return reasons


@dataclass(frozen=True)
class _Graph:
    """A captured forward, and the memory that it reads and writes."""

    play: Callable[[], object]
    inputs: tuple[Tensor, ...]
    outputs: Any

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, inputs: tuple[Tensor, ...]) -> Any:
        for place, tensor in zip(self.inputs, inputs, strict=True):
            place.copy_(tensor)
        self.play()
        return tree_map_only(Tensor, Tensor.clone, self.outputs)


# Not in inference mode, whose tensors could not be written from outside it.
@torch.inference_mode(False)
@torch.no_grad()
def _capture(module: nn.Module, inputs: tuple[Tensor, ...]) -> _Graph:
    places = tuple(tensor.detach().clone() for tensor in inputs)
    with torch.cuda.device(inputs[0].device):
        # Not on the default stream, whose pending work a capture may not wait for.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                module(*places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Autocast keeps casts of weights for later calls; those of a capture would lie in the graph's memory.
        torch.clear_autocast_cache()
        with torch.cuda.graph(graph):
            outputs = module(*places)
        torch.clear_autocast_cache()
    return _Graph(graph.replay, places, outputs)
