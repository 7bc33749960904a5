"""What `nox -s tables` renders about this paper: the page and the pictures of its block statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vitreous_core.indexing import build_order

from . import block_statistics as statistics
from .block_statistics import BLOCK, Arrangement, Shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWN_WINDOWS = ((64, 8), (56, 7))
_DRAWN_KERNELS = ((56, 7), (128, 17))
_COMPARED = ((14, 7), (56, 7), (64, 7), (96, 17))
_BOXED = ((56, 7), (64, 8), (96, 16), (128, 16))


def pages() -> Mapping[str, str]:
    """Markdown by name of the page."""
    return {"block_statistics": block_statistics_page()}


def figures() -> Mapping[str, Callable[[], Figure]]:
    """What draws each figure, by its name."""
    drawn: dict[str, Callable[[], Figure]] = {
        "empty-windows": partial(_empty_figure, statistics.WINDOW_COUNTS, statistics.windows, "w"),
        "empty-kernels": partial(_empty_figure, statistics.KERNEL_COUNTS, _neighborhoods, "k"),
    }
    for side, window in _DRAWN_WINDOWS:
        drawn[f"windows-{side}-{window}"] = partial(_masks_figure, side, statistics.windows(window)[:5])
    for side, kernel in _DRAWN_KERNELS:
        drawn[f"kernels-{side}-{kernel}"] = partial(_masks_figure, side, _neighborhoods(kernel))
    return drawn


def block_statistics_page() -> str:
    """Shares of the blocks for every setting of the paper's tables, with what they do and do not say."""
    windows = _rows(statistics.WINDOW_COUNTS, statistics.windows)
    kernels = _rows(statistics.KERNEL_COUNTS, statistics.kernels)
    runs = _rows(statistics.RUN_COUNTS, statistics.runs)
    counted = [cell for _, cells in (*windows, *kernels, *runs) for cell in cells if cell is not None]
    kept = [_kept(side, kernel) for side, kernel in _COMPARED]
    boxes = [_boxes(side, window) for side, window in _BOXED]
    return _PAGE.format(
        block=BLOCK,
        equal=sum(statistics.agrees(ours, expected) for ours, expected in counted),
        counted=len(counted),
        windows=_table(["image, w", *(each.title for each in statistics.windows(7))], windows),
        kernels=_table(["image, k", *(each.title for each in statistics.kernels(7))], kernels),
        runs=_table(["block, image, w or k", *(each.title for each in statistics.runs(7))], runs),
        kept=_plain_table(["image, k", "NA2D's pairs that HNA has too", "touching cells that HNA connects"], kept),
        boxes=_plain_table(["image, w", "HWA windows that are squares", "mean bounding box over w²"], boxes),
        empty_windows=_image("empty-windows"),
        empty_kernels=_image("empty-kernels"),
        drawn_windows="\n".join(_image(f"windows-{side}-{window}") for side, window in _DRAWN_WINDOWS),
        drawn_kernels="\n".join(_image(f"kernels-{side}-{kernel}") for side, kernel in _DRAWN_KERNELS),
    )


_PAGE = """\
# Blocks that Hilbert attention skips

```bash
vitreous show pattern window1d 64x64 --size 64 --order hilbert --block 128    # any of these as a picture
```

A block-sparse kernel cuts the mask into blocks, here of {block} x {block} tokens unless said otherwise. It skips empty
blocks, computes partial ones and masks them, and computes full ones without a mask. Each cell is **empty / partial /
full** in per cent, counted on the block lists that `vitreous_core.patterns` makes. An independent count on dense masks
was made before this code existed: {equal} of {counted} cells equal it to the printed digit (where one does not, that
count follows in italics). What the paper itself publishes of this stands in the [claims](../claims.md).

## Windows

{windows}
WSA are true square windows, HWA and HSWA runs of w² tokens on the Hilbert curve.

{empty_windows}
**What this says.** Window order, which is nothing but the windows one after the other, is exactly as sparse as HWA,
*with true square windows*. What HWA gains over window attention in FlexAttention it gains by leaving row-major order;
the Hilbert curve itself adds nothing to the sparsity of windows. Square windows in Hilbert order are that sparse only
where the curve fills a window before it leaves it, which takes powers of two; 56 with 7 comes out the same because a
block spans several windows anyway.

{drawn_windows}
Above, on the image: one block of queries, what they see, and what the kernel must read besides. Below: the mask in
token order.

## Slides and neighbourhoods

{kernels}
SA and NA are the square slide and neighbourhood, exact under every order. HSA and HNA are bands of k² tokens on the
curve.

{empty_kernels}
**What this says.** HSA and HNA are sparse because they are bands on a line: another pattern, not the same one made
cheap. The exact square neighbourhood in Hilbert order is *less* sparse than in row-major order at k = 7, and becomes
sparser only for kernels of 11 cells and more. Rectangular tiles do as well as the curve there, with simpler addresses.

{drawn_kernels}
## Other block sizes

{runs}
At w = 7 no block of {block} tokens is ever full, and smaller blocks waste less.

## What the curve keeps of the image

{kept}
{boxes}
Across a major fold of the curve, cells that touch do not see each other.
"""


Cell = tuple[Shares, Shares] | None
Row = tuple[str, Sequence[Cell]]
Arrange = Callable[[int], tuple[Arrangement, ...]]


def _rows(table: str, arrange: Arrange) -> list[Row]:
    """Ours and the independent count, for every line of a table."""
    rows: list[Row] = []
    for (*blocks, side, size), counted in statistics.parse_counts(table):
        cells: list[Cell] = []
        for arrangement, expected in zip(arrange(size), counted, strict=True):
            cells.append(None if expected is None else (arrangement.shares(side, *blocks), expected))
        rows.append((", ".join([*map(str, blocks), f"{side}²", str(size)]), cells))
    return rows


def _table(header: Sequence[str], rows: Sequence[Row]) -> str:
    return _plain_table(header, [[name, *map(_cell, cells)] for name, cells in rows])


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    ours, counted = cell
    return _printed(ours) + ("" if statistics.agrees(ours, counted) else f" *{_printed(counted)}*")


def _printed(shares: Shares) -> str:
    return " / ".join(f"{share:.1f}" for share in shares)


def _kept(side: int, kernel: int) -> list[str]:
    kept = statistics.kept_by_band(side, kernel)
    return [f"{side}², {kernel}", f"{kept.pairs:.0f} %", f"{kept.adjacent:.0f} %"]


def _boxes(side: int, window: int) -> list[str]:
    squares, area = statistics.window_boxes(side, window)
    return [f"{side}², {window}", f"{squares:.0f} %", f"{area:.2f}"]


def _plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _neighborhoods(kernel: int) -> tuple[Arrangement, ...]:
    """Without the slides, which look the same but for the border."""
    return tuple(each for each in statistics.kernels(kernel) if each.title.startswith(("NA", "HNA")))


def _image(name: str) -> str:
    return f"![{name}](../figures/hilbert_attn-{name}.png)\n"


def _masks_figure(side: int, arrangements: Sequence[Arrangement]) -> Figure:
    from vitreous_core.pictures import Masked, draw_masks

    return draw_masks(
        [Masked(each.title, each.layout(side), build_order(each.order, side, side, each.tile)) for each in arrangements]
    )


def _empty_figure(table: str, arrange: Arrange, letter: str) -> Figure:
    from vitreous_core.pictures import draw_shares

    rows = {
        f"{side}², {letter} = {size}": {each.title: each.shares(side)[0] for each in arrange(size)}
        for (side, size), _ in statistics.parse_counts(table)
    }
    return draw_shares(rows, label=f"empty blocks of {BLOCK} x {BLOCK} tokens, %")
