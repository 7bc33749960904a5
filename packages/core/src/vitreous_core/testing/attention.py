"""Problems for `block_sparse_attention`: inputs in awkward layouts, and one run of a backend with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..curves import Order
from ..layout import BlockLayout
from ..ops.block_sparse_attention import (
    Backend,
    Bias,
    RelativeBias1d,
    RelativeBias2d,
    block_sparse_attention,
    packed_attention,
)
from ..patterns import Neighborhood2d, Pattern, Slide2d

BiasKind = Literal["none", "cells", "steps", "distance", "dense"]
Strides = Literal["contiguous", "transposed", "packed", "strided", "expanded"]


@dataclass(frozen=True)
class Problem:
    """One case; `tensors` draws it and `run` computes it.

    Args:
        pattern, height, width, order: who sees whom, under which token order.
        batch, heads, groups, head_dim: `B`, `H`, heads of keys and values, `D`.
        dtype: of query, key, value and cotangent; biases are fp32 at least.
        bias: kind of bias; `steps` is one by cells that counts in steps of the pattern's dilation.
        strides: memory layout of the tensors; `packed` needs `groups == heads`.
        magnitude: standard deviation of queries and keys.
        dropout_p, scale: as the operator takes them.
    """

    pattern: Pattern
    height: int
    width: int
    order: Order | None = None
    batch: int = 2
    heads: int = 2
    groups: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    bias: BiasKind = "none"
    strides: Strides = "contiguous"
    magnitude: float = 1.0
    dropout_p: float = 0.0
    scale: float | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return self.height * self.width

    def layout(self, block: int = 64) -> BlockLayout:
        """The block layout, on the CPU."""
        return self.pattern.layout(self.height, self.width, self.order, query_block=block, key_block=block)

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """Query, key, value, cotangent and (with a bias) table, drawn in their dtype, fresh for each seed."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch, length, head_dim = self.batch, self.length, self.head_dim
        shapes = {"query": self.heads, "key": self.groups, "value": self.groups, "cotangent": self.heads}
        tensors = {name: draw(batch, heads, length, head_dim) for name, heads in shapes.items()}
        tensors["query"] *= self.magnitude
        tensors["key"] *= self.magnitude
        made = {name: tensor.to(self.dtype).to(device) for name, tensor in tensors.items()}
        if self.strides == "packed":
            packed = torch.stack([made[name].transpose(1, 2) for name in ("query", "key", "value")], dim=2)
            made |= dict(zip(("query", "key", "value"), packed.permute(2, 0, 3, 1, 4), strict=True))
        elif self.strides == "expanded":
            made["key"] = made["key"][:1].expand(batch, -1, -1, -1)
            made["cotangent"] = made["cotangent"][..., :1].expand(-1, -1, -1, head_dim)
        elif self.strides != "contiguous":
            restride = _transposed if self.strides == "transposed" else _strided
            made = {name: restride(tensor) for name, tensor in made.items()}
        shape = self._bias_shape()
        if shape is not None:
            made["bias"] = draw(*shape).to(device)
        return made

    def bias_of(self, table: Tensor | None) -> Bias | None:
        """The bias around a table."""
        match self.bias:
            case "none":
                return None
            case "cells" | "steps":
                assert table is not None
                # As numbers: a tensor made at every call would be another table to whoever remembers tables.
                return RelativeBias2d(
                    table, self.height, self.width, self.order, extent=self._extent(), dilation=self._steps()
                )
            case "distance":
                assert table is not None
                return RelativeBias1d(table)
            case "dense":
                return table

    def _bias_shape(self) -> tuple[int, ...] | None:
        match self.bias:
            case "none":
                return None
            case "cells" | "steps":
                rows, columns = self._extent()
                return (2 * rows - 1) * (2 * columns - 1), self.heads
            case "distance":
                return self.heads, 2 * self.length - 1
            case "dense":
                return self.heads, self.length, self.length

    def _steps(self) -> tuple[int, int]:
        if self.bias != "steps":
            return 1, 1
        assert isinstance(self.pattern, Slide2d | Neighborhood2d)
        return self.pattern.dilations()

    def _extent(self) -> tuple[int, int]:
        down, across = self._steps()
        return -(-self.height // down), -(-self.width // across)

    def run(
        self, tensors: dict[str, Tensor], layout: BlockLayout, backend: Backend, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Output and every gradient, by name; `dtype` promotes all inputs first (fp64 for the truth)."""
        cast: Callable[[Tensor], Tensor] = (lambda t: t) if dtype is None else (lambda t: t.to(dtype))
        leaves = {name: cast(t).detach().requires_grad_() for name, t in tensors.items() if name != "cotangent"}
        out = block_sparse_attention(
            leaves["query"], leaves["key"], leaves["value"], layout, bias=self.bias_of(leaves.get("bias")),
            scale=self.scale, dropout_p=self.dropout_p, dropout_seed=0x1234_5678_9ABC, backend=backend,
        )  # fmt: skip
        names = list(leaves)
        gradients = torch.autograd.grad(out, [leaves[name] for name in names], cast(tensors["cotangent"]))
        return {"out": out.detach(), **{f"d{name}": g for name, g in zip(names, gradients, strict=True)}}

    def run_packed(
        self, tensors: dict[str, Tensor], layout: BlockLayout, backend: Backend, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """`run` by `packed_attention`, which needs `groups == heads`; results have the names and shapes of `run`.

        The packed tensor has the memory layout that `strides` says, as far as three sides can have it.
        """
        parts = [tensors[name] for name in ("query", "key", "value")]
        packed = torch.stack([part.transpose(1, 2) for part in parts], dim=2).flatten(2)
        if self.strides == "strided":
            packed = _strided(packed.unsqueeze(1)).squeeze(1)
        elif self.strides == "transposed":
            packed = packed.transpose(0, 1).contiguous().transpose(0, 1)
        cast: Callable[[Tensor], Tensor] = (lambda t: t) if dtype is None else (lambda t: t.to(dtype))
        leaves = {"qkv": packed} | ({"bias": tensors["bias"]} if "bias" in tensors else {})
        leaves = {name: cast(tensor).detach().requires_grad_() for name, tensor in leaves.items()}
        out = packed_attention(
            leaves["qkv"], layout, num_heads=self.heads, bias=self.bias_of(leaves.get("bias")), scale=self.scale,
            dropout_p=self.dropout_p, dropout_seed=0x1234_5678_9ABC, backend=backend,
        )  # fmt: skip
        cotangent = cast(tensors["cotangent"]).transpose(1, 2).flatten(2)
        dqkv, *rest = torch.autograd.grad(out, list(leaves.values()), cotangent)
        gradients = dqkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        results = dict(zip(("dquery", "dkey", "dvalue"), gradients, strict=True))
        if rest:
            results["dbias"] = rest[0]
        return {"out": out.detach().unflatten(2, (self.heads, -1)).transpose(1, 2), **results}

    def with_(self, **changes: object) -> Problem:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _transposed(tensor: Tensor) -> Tensor:
    """The same values as the usual view of `[B, L, H, D]`."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _strided(tensor: Tensor) -> Tensor:
    """The same values with a stride of `2 L` along the head dimension and of 2 along the tokens."""
    wide = torch.full((*tensor.shape[:2], tensor.shape[3], 2 * tensor.shape[2]), torch.nan, dtype=tensor.dtype)
    view = wide.to(tensor.device)[..., ::2].transpose(2, 3)
    return view.copy_(tensor)
