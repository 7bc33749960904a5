"""Relative-position biases of `block_sparse_attention`: small tables that each pair of tokens indexes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...curves import Order, check_order
from ...layout import BlockLayout

DENSE_BIAS_LIMIT = 4096
"""Longest sequence for which a dense bias `[H, L, L]` is accepted; above it the bias alone outweighs the rest."""


@dataclass(frozen=True, eq=False)
class RelativeBias2d:
    """Bias by the offset of two cells in the image (Swin's table; HWT uses one for the whole image).

    Entry for query and key: `((yq - yk) / e + a - 1) * (2 * b - 1) + ((xq - xk) / f + b - 1)` with
    `(a, b) = extent` and `(e, f) = dilation`.

    Args:
        table: `[(2 * a - 1) * (2 * b - 1), H]`, any floating dtype; receives a gradient.
        height, width: sides of the image.
        order: the token order, int `[L]`, a CPU array or a tensor (on the table's device it saves a copy and
            compiles); None is row-major.
        extent: `(a, b)`, offsets below which the table reaches, in steps of the dilation; None is `(height, width)`.
        dilation: step between cells that the table knows, for patterns with that dilation (or a multiple); or
            (rows, columns).

    Raises:
        ValueError: when the table does not have that many rows or the order is no permutation.
    """

    table: Tensor
    height: int
    width: int
    order: Order | Tensor | None = None
    extent: tuple[int, int] | None = None
    dilation: int | tuple[int, int] = 1

    def __post_init__(self) -> None:
        if min(self.steps) < 1:
            raise ValueError(f"bias.dilation must be at least 1; got {self.dilation}")
        rows, columns = self.offsets
        if self.table.ndim != 2 or self.table.shape[0] != rows * columns:
            raise ValueError(
                f"bias.table must have shape ({rows * columns}, heads) for an extent of {self.reach}; "
                f"got {tuple(self.table.shape)}"
            )
        if isinstance(self.order, Tensor):
            if self.order.shape != (self.length,):
                raise ValueError(f"bias.order must have shape ({self.length},); got {tuple(self.order.shape)}")
        elif self.order is not None:
            check_order(self.order, self.length)

    @property
    def length(self) -> int:
        """Tokens."""
        return self.height * self.width

    @property
    def reach(self) -> tuple[int, int]:
        """`extent`, or the sides of the image."""
        return self.extent or (self.height, self.width)

    @property
    def steps(self) -> tuple[int, int]:
        """`dilation` as (rows, columns)."""
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation, self.dilation)

    @property
    def offsets(self) -> tuple[int, int]:
        """Numbers of row and of column offsets."""
        return 2 * self.reach[0] - 1, 2 * self.reach[1] - 1

    @property
    def heads(self) -> int:
        """Columns of the table."""
        return self.table.shape[1]

    def cells(self, device: torch.device) -> Tensor | None:
        """Row-major cell of every token, integer `[L]`, on a device; None for row-major order.

        An order that lives elsewhere is copied once and remembered by its content.
        """
        if self.order is None:
            return None
        if isinstance(self.order, Tensor) and self.order.device == device:
            return self.order
        order = self.order.cpu().numpy() if isinstance(self.order, Tensor) else np.asarray(self.order)
        return _cells_on(order.astype(np.int32).tobytes(), device)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Residue-major row and column of every token, int64 `[L]`, on the table's device."""
        device = self.table.device
        if self.order is None:
            cell = torch.arange(self.length, device=device)
        else:
            cell = torch.as_tensor(self.order).to(device=device, dtype=torch.int64)
        down, across = self.steps
        return (
            residue_major(cell // self.width, self.height, down),
            residue_major(cell % self.width, self.width, across),
        )

    def dense(self) -> Tensor:
        """The bias `[H, L, L]`; offsets beyond the extent are clamped (the checks make them invisible pairs)."""
        y, x = self.coordinates()
        a, b = self.reach
        rows = (y[:, None] - y[None, :]).clamp(1 - a, a - 1) + a - 1
        columns = (x[:, None] - x[None, :]).clamp(1 - b, b - 1) + b - 1
        return self.table[rows * (2 * b - 1) + columns].permute(2, 0, 1)

    def problems(self, layout: BlockLayout) -> list[str]:
        """Why this bias does not fit that layout."""
        found = []
        if (self.height, self.width) != (layout.height, layout.width):
            found.append(
                f"bias must be for the layout's {layout.height} x {layout.width} grid; got {self.height} x {self.width}"
            )
        elif any(step % own for step, own in zip(layout.step, self.steps, strict=True)):
            found.append(f"bias.dilation must divide the pattern's dilation {layout.step}; got {self.steps}")
        elif any(far // own >= reach for far, own, reach in zip(layout.reach, self.steps, self.reach, strict=True)):
            found.append(
                f"bias.extent times bias.dilation must exceed the layout's largest visible offset {layout.reach} in "
                f"rows and columns; got {self.reach} times {self.steps}. Leave extent out to cover the whole image"
            )
        return found


def residue_major(cell: Tensor, cells: int, dilation: int) -> Tensor:
    """Coordinates along an axis counted residue by residue: 0, d, 2d, ... come first, then 1, d + 1, ...

    Args:
        cell: integer coordinates, `0 <= cell < cells`.
        cells: length of the axis.
        dilation: `d`. Two cells of one residue are then as far apart as their distance over `d`.
    """
    if dilation == 1:
        return cell
    residue = cell % dilation
    return residue * (cells // dilation) + residue.clamp(max=cells % dilation) + cell // dilation


@lru_cache(32)
def _cells_on(order: bytes, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(np.frombuffer(order, dtype=np.int32).copy()).to(device)


@dataclass(frozen=True, eq=False)
class RelativeBias1d:
    """Bias by the distance of two tokens in the sequence (NAT's `rpb` on a curve). Entry: `k - q + K - 1`.

    Args:
        table: `[H, 2 * K - 1]`, any floating dtype; receives a gradient.

    Raises:
        ValueError: when the table is no matrix with an odd number of columns.
    """

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.table.shape[1] % 2 == 0:
            raise ValueError(f"bias.table must have shape (heads, 2 * K - 1); got {tuple(self.table.shape)}")

    @property
    def kernel(self) -> int:
        """`K`."""
        return (self.table.shape[1] + 1) // 2

    @property
    def heads(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]

    def dense(self, length: int) -> Tensor:
        """The bias `[H, L, L]`; distances beyond the table are clamped (the checks make them invisible pairs)."""
        token = torch.arange(length, device=self.table.device)
        offset = (token[None, :] - token[:, None]).clamp(1 - self.kernel, self.kernel - 1)
        return self.table[:, offset + self.kernel - 1]

    def problems(self, layout: BlockLayout) -> list[str]:
        """Why this bias does not fit that layout."""
        if layout.token_reach < self.kernel:
            return []
        return [
            f"bias.table must reach the layout's largest visible distance {layout.token_reach} "
            f"(2 * {layout.token_reach + 1} - 1 columns); got {self.table.shape[1]} columns"
        ]


Bias = RelativeBias2d | RelativeBias1d | Tensor
