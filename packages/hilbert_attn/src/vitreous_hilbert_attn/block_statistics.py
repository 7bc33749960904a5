"""How many blocks of a mask are empty, partly visible or full, by pattern and token order.

Paper: arXiv 2511.05832 argues with these shares: a block-sparse kernel skips empty blocks and need not mask full ones.
`WINDOW_COUNTS`, `KERNEL_COUNTS` and `RUN_COUNTS` were counted on dense masks by a script that shares no code with
this repository, under FlexAttention's convention that blocks reaching past the last token are filled up with invisible
pairs. The paper's own figures among them stand in the claims of docs/results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vitreous_core.indexing import build_order
from vitreous_core.layout import BlockLayout
from vitreous_core.patterns import Neighborhood1d, Neighborhood2d, Pattern, Slide1d, Slide2d, Window1d, Window2d

BLOCK = 128
"""FlexAttention's block, which the paper's figures are for."""

Shares = tuple[float, float, float]
"""Empty, partial and full blocks in per cent of all."""


@dataclass(frozen=True)
class Arrangement:
    """A pattern under a token order.

    Args:
        title: column of a table.
        pattern: who sees whom.
        order, tile: as `vitreous_core.indexing.build_order` takes them.
    """

    title: str
    pattern: Pattern
    order: str = "hilbert"
    tile: int | tuple[int, int] | None = None

    def layout(self, side: int, block: int = BLOCK) -> BlockLayout:
        """The block lists on a square image."""
        order = build_order(self.order, side, side, self.tile)
        return self.pattern.layout(side, side, order, query_block=block, key_block=block)

    def shares(self, side: int, block: int = BLOCK) -> Shares:
        """Shares of the blocks on a square image."""
        empty, partial, full = self.layout(side, block).block_ratios
        return 100 * empty, 100 * partial, 100 * full


def windows(window: int) -> tuple[Arrangement, ...]:
    """Square windows under four orders, and runs of as many tokens on the curve, plain and shifted."""
    area = window**2
    return (
        Arrangement("WSA, row-major", Window2d(window), "row_major"),
        Arrangement("WSA, Hilbert", Window2d(window)),
        Arrangement("WSA, Morton", Window2d(window), "morton"),
        Arrangement("WSA, window order", Window2d(window), "window", window),
        Arrangement("HWA", Window1d(area)),
        Arrangement("HSWA", Window1d(area, area // 2)),
    )


def kernels(kernel: int) -> tuple[Arrangement, ...]:
    """Slides and neighbourhoods of the image under several orders, and bands of as many tokens on the curve."""
    slide, neighborhood, area = Slide2d(kernel), Neighborhood2d(kernel), kernel**2
    return (
        Arrangement("SA, row-major", slide, "row_major"),
        Arrangement("SA, Hilbert", slide),
        Arrangement("SA, Morton", slide, "morton"),
        Arrangement("SA, 8 x 16 tiles", slide, "tile", (8, 16)),
        Arrangement("NA, row-major", neighborhood, "row_major"),
        Arrangement("NA, Hilbert", neighborhood),
        Arrangement("NA, 8 x 16 tiles", neighborhood, "tile", (8, 16)),
        Arrangement("HSA", Slide1d(area)),
        Arrangement("HNA", Neighborhood1d(area)),
    )


def runs(size: int) -> tuple[Arrangement, ...]:
    """Windows and neighbourhoods of `size^2` tokens on the curve."""
    return Arrangement("HWA", Window1d(size**2)), Arrangement("HNA", Neighborhood1d(size**2))


# Side and window, then a column of `windows` each.
WINDOW_COUNTS = """
56 7 | 80.6/19.4/0.0 | 88.3/11.7/0.0 | 73.0/27.0/0.0 | 88.3/11.7/0.0 | 88.3/11.7/0.0 | 88.6/11.4/0.0
56 8 | 82.6/17.4/0.0 | 73.9/26.1/0.0 | 96.0/4.0/0.0 | 96.0/4.0/0.0 | 96.0/4.0/0.0 | 88.3/11.7/0.0
64 8 | 87.5/12.5/0.0 | 96.9/3.1/0.0 | 96.9/3.1/0.0 | 96.9/3.1/0.0 | 96.9/3.1/0.0 | 90.8/9.2/0.0
64 16 | 75.0/25.0/0.0 | 93.8/0.0/6.2 | 93.8/0.0/6.2 | 93.8/0.0/6.2 | 93.8/0.0/6.2 | 93.9/0.0/6.1
96 8 | 91.7/8.3/0.0 | 94.3/5.7/0.0 | 98.6/1.4/0.0 | 98.6/1.4/0.0 | 98.6/1.4/0.0 | 95.9/4.1/0.0
96 16 | 83.3/16.7/0.0 | 87.5/12.3/0.2 | 97.2/0.0/2.8 | 97.2/0.0/2.8 | 97.2/0.0/2.8 | 97.3/0.0/2.7
128 8 | 93.8/6.2/0.0 | 99.2/0.8/0.0 | 99.2/0.8/0.0 | 99.2/0.8/0.0 | 99.2/0.8/0.0 | 97.7/2.3/0.0
128 16 | 87.5/12.5/0.0 | 98.4/0.0/1.6 | 98.4/0.0/1.6 | 98.4/0.0/1.6 | 98.4/0.0/1.6 | 98.4/0.0/1.6
"""

# Side and kernel, then a column of `kernels` each.
KERNEL_COUNTS = """
56 7 | 81.0/19.0/0 | 75.5/24.5/0 | 73.0/27.0/0 | 71.0/29.0/0 | 80.6/19.4/0 | 75.5/24.5/0 | 71.0/29.0/0 | 88.3/11.7/0 | 88.3/11.7/0
64 7 | 85.0/15.0/0 | 79.5/20.5/0 | 78.5/21.5/0 | 78.5/21.5/0 | 84.8/15.2/0 | 79.5/20.5/0 | 78.5/21.5/0 | 90.8/9.2/0 | 90.8/9.2/0
64 11 | 79.3/20.7/0 | 79.5/20.5/0 | 78.5/21.5/0 | 78.5/21.5/0 | 78.7/21.3/0 | 79.5/20.5/0 | 78.5/21.5/0 | 90.8/9.2/0 | 90.8/9.2/0
96 7 | 90.5/9.5/0 | 89.9/10.1/0 | 89.5/10.5/0 | 89.5/10.5/0 | 90.4/9.6/0 | 89.9/10.1/0 | 89.5/10.5/0 | 95.9/4.1/0 | 95.9/4.1/0
96 11 | 87.9/12.1/0 | 88.3/11.7/0 | 89.5/10.5/0 | 89.5/10.5/0 | 87.5/12.5/0 | 88.3/11.7/0 | 89.5/10.5/0 | 95.9/4.1/0 | 95.9/4.1/0
96 17 | 81.1/18.9/0 | 83.5/16.5/0 | 89.5/10.5/0 | 89.5/10.5/0 | 80.4/19.6/0 | 83.5/16.5/0 | 88.9/11.1/0 | 93.2/5.4/1.4 | 93.2/5.4/1.4
128 7 | 94.6/5.4/0 | 94.1/5.9/0 | 93.8/6.2/0 | 93.8/6.2/0 | 94.5/5.5/0 | 94.1/5.9/0 | 93.8/6.2/0 | 97.7/2.3/0 | 97.7/2.3/0
128 17 | 87.2/12.8/0 | 94.1/5.9/0 | 93.8/6.2/0 | 93.8/6.2/0 | 86.7/13.3/0 | 93.8/6.2/0 | 93.6/6.4/0 | 96.1/3.1/0.8 | 96.1/3.1/0.8
"""  # noqa: E501

# Block, side and window or kernel side, then a column of `runs` each; a stroke where nobody counted.
RUN_COUNTS = """
32 56 7 | 96.3/3.3/0.4 | 97.0/3.0/0
64 56 7 | 94.0/6.0/0 | 94.0/6.0/0
64 64 8 | 98.4/0/1.6 | -
256 56 7 | 78.1/21.9/0 | -
"""


def parse_counts(table: str) -> list[tuple[tuple[int, ...], list[Shares | None]]]:
    """The lines of a table above: its leading numbers, and the shares by column (None where nobody counted)."""
    parsed = []
    for line in table.strip().splitlines():
        head, *cells = line.split("|")
        shares: list[Shares | None] = []
        for cell in cells:
            if cell.strip() == "-":
                shares.append(None)
            else:
                empty, partial, full = map(float, cell.split("/"))
                shares.append((empty, partial, full))
        parsed.append((tuple(map(int, head.split())), shares))
    return parsed


def agrees(ours: Shares, counted: Shares) -> bool:
    """Whether two shares are equal to the digit that was printed."""
    return all(abs(a - b) <= 0.05 + 1e-9 for a, b in zip(ours, counted, strict=True))


# What the pattern on the curve keeps of its namesake on the image.


@dataclass(frozen=True)
class Kept:
    """How a pattern along the Hilbert curve compares with the one on the image.

    Args:
        pairs: per cent of the neighbourhood's pairs that the `k^2` nearest tokens on the curve hold too.
        adjacent: per cent of the pairs of touching cells (4 per cell, fewer at the border) visible along the curve.
    """

    pairs: float
    adjacent: float


def kept_by_band(side: int, kernel: int) -> Kept:
    """Compare HNA of `kernel^2` tokens with NA2D of `kernel x kernel` cells; the image holds the kernel."""
    order = torch.from_numpy(build_order("hilbert", side, side)).long()
    position = torch.empty_like(order)
    position[order] = torch.arange(side * side)
    band = Neighborhood1d(kernel**2).layout(side, side).rule
    start = (torch.arange(side) - kernel // 2).clamp(0, side - kernel)
    run = start[:, None] + torch.arange(kernel)  # [side, kernel]
    visible = run[:, None, :, None] * side + run[None, :, None, :]  # [side, side, kernel, kernel], cells
    shared = band.allows(position.view(side, side, 1, 1), position[visible])
    grid = position.view(side, side)
    touching = [
        (grid[:, :-1], grid[:, 1:]), (grid[:, 1:], grid[:, :-1]), (grid[:-1], grid[1:]), (grid[1:], grid[:-1])
    ]  # fmt: skip
    seen = torch.cat([band.allows(a, b).flatten() for a, b in touching])
    return Kept(100 * float(shared.double().mean()), 100 * float(seen.double().mean()))


def window_boxes(side: int, window: int) -> tuple[float, float]:
    """How square the windows on the curve are.

    Returns:
        Per cent of the windows of `window^2` tokens that are exact squares, and the mean area of a window's bounding
        box over `window^2`.
    """
    order = torch.from_numpy(build_order("hilbert", side, side)).long()
    areas = []
    for tokens in order.split(window**2):
        rows, columns = tokens // side, tokens % side
        box = (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1)
        areas.append(box)
    squares = sum(box == (window, window) for box in areas) / len(areas)
    return 100 * squares, sum(a * b for a, b in areas) / len(areas) / window**2
