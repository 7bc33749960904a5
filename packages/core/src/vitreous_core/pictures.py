"""Pictures of token orders, attention patterns and training runs (matplotlib, no window system needed)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .curves import Order, inverse_order
from .layout import BlockLayout
from .patterns import Pattern

INK, MUTED, PAPER = "#1f2933", "#7b8794", "#f1f4f8"
BLUE, LIGHT_BLUE = "#1f6feb", "#a9ccf7"
ORANGE, LIGHT_ORANGE = "#e8710a", "#f9c79b"
SERIES = (BLUE, ORANGE, "#1a936f", "#8e44ad", "#c0392b", "#7f6a00")
_LARGEST_CURVE = 512 * 512
_LARGEST_MASK = 4096
_MOST_GRID_LINES = 32
_MOST_MASK_CELLS = 800
_SIDE = 3.5  # inches


def draw_curve(order: Order, height: int, width: int, *, title: str) -> Figure:
    """The path of a token order over the image, coloured from its first cell (dark) to its last (light).

    Raises:
        ValueError: when the image has too many cells to be told apart.
    """
    if height * width > _LARGEST_CURVE:
        raise ValueError(f"size must have at most {_LARGEST_CURVE} cells to be drawn; got {height} x {width}")
    figure, (axes,) = _figure([_image_size(height, width)])
    rows, columns = np.divmod(np.asarray(order), width)
    points = np.stack([columns, rows], axis=1)
    segments = np.stack([points[:-1], points[1:]], axis=1)
    cell = _SIDE * 72 / max(height, width)  # points
    path = LineCollection(
        list(segments), array=np.arange(len(segments)), cmap="viridis", linewidths=min(5.0, cell / 3),
        capstyle="round",
    )  # fmt: skip
    axes.add_collection(path)
    for point, color in ((points[0], INK), (points[-1], ORANGE)):
        axes.scatter(*point, s=max(3.0, min(10.0, 0.7 * cell)) ** 2, color=color, zorder=3)
    _frame_image(axes, height, width, title)
    _legend(axes, [Patch(color=INK), Patch(color=ORANGE)], ["first token", "last token"])
    return figure


def draw_pattern(
    pattern: Pattern,
    height: int,
    width: int,
    order: Order,
    *,
    title: str,
    query_block: int,
    key_block: int,
) -> Figure:
    """What a pattern lets two tokens see, its mask in token order, and the blocks that a kernel must visit.

    The mask is left out where it would be too large to be seen.
    """
    layout = pattern.layout(height, width, order, query_block=query_block, key_block=key_block)
    has_mask = layout.length <= _LARGEST_MASK
    figure, axes = _figure([_image_size(height, width)] + [(_SIDE, _SIDE)] * (1 + has_mask))
    _draw_neighborhoods(axes[0], layout, order, title)
    if has_mask:
        axes[1].imshow(
            pattern.dense(height, width, order), cmap=ListedColormap([PAPER, BLUE]), vmin=0, vmax=1,
            interpolation="nearest",
        )  # fmt: skip
        _frame(axes[1], f"mask in token order, {layout.density:.1%} visible", "key token", "query token")
    _draw_blocks(axes[-1], layout)
    return figure


@dataclass(frozen=True)
class Masked:
    """One column of `draw_masks`.

    Args:
        title: above it.
        layout: the pattern's blocks, on the CPU.
        order: the token order that the layout was built for.
    """

    title: str
    layout: BlockLayout
    order: Order


def draw_masks(columns: Sequence[Masked]) -> Figure:
    """What block sparsity makes of patterns or orders: below, each mask in token order, with what a kernel computes
    in vain; above, on the image, one block of queries and the keys that its row of the mask reads.
    """
    gap, margin = 0.3, 0.8  # inches: between panels, and below them all
    width, height = len(columns) * (_SIDE + gap), 2 * (_SIDE + gap) + margin
    figure = _canvas(width, height)
    axes = figure.subplots(
        2, len(columns), squeeze=False,
        gridspec_kw={"wspace": gap / _SIDE, "hspace": gap / _SIDE, "left": gap / width, "right": 1,
                     "bottom": margin / height, "top": 1 - gap / height},
    )  # fmt: skip
    for column, (above, below) in zip(columns, axes.T, strict=True):
        layout = column.layout
        _draw_one_row(above, layout, column.order)
        _frame_image(above, layout.height, layout.width, column.title)
        _draw_waste(below, layout)
        empty, partial, full = layout.block_ratios
        _frame(below, "", f"{100 * empty:.1f} % empty, {100 * partial:.1f} % partial, {100 * full:.1f} % full", "")
    axes[1, 0].set_ylabel("query token", color=MUTED, fontsize=8)
    marks = [Patch(color=ORANGE), Patch(color=BLUE), Patch(color=LIGHT_BLUE), Patch(color=PAPER)]
    block = f"{columns[0].layout.query_block} x {columns[0].layout.key_block}"
    labels = ["a block of queries", "visible", f"read and masked (blocks of {block} tokens)", "skipped"]
    figure.legend(
        marks, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9, labelcolor=INK, handlelength=1,
        bbox_to_anchor=(0.5, 0),
    )  # fmt: skip
    return figure


def draw_shares(rows: Mapping[str, Mapping[str, float]], *, label: str) -> Figure:
    """Per cents as dots: a line for each row, the series told apart by colour and shape.

    Args:
        rows: by name of the row, per cents by name of the series. Equal values lie on top of each other, the first
            series largest.
        label: of the axis.
    """
    series = list(dict.fromkeys(name for values in rows.values() for name in values))
    figure = _canvas(7.5, 0.34 * len(rows) + 1.3)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for name, color, shape, size in zip(
        series, _cycle(len(series)), "osD^vP" * len(series), np.linspace(90, 24, len(series)), strict=False
    ):
        places = [place for place, values in enumerate(rows.values()) if name in values]
        shares = [values[name] for values in rows.values() if name in values]
        axes.scatter(shares, places, s=size, marker=shape, color=color, label=name, zorder=3, linewidths=0)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9, color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.set_xlabel(label, color=MUTED, fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return figure


@dataclass(frozen=True)
class Curve:
    """One line of `draw_history`.

    Args:
        label: the model's name.
        steps: epochs.
        values: score at each.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]


def draw_history(curves: Sequence[Curve], *, label: str, goal: float | None = None) -> Figure:
    """A score or loss over epochs, one line per run, with a dashed line at the goal."""
    figure, (axes,) = _figure([(5.0, 3.4)])
    for curve, color in zip(curves, _cycle(len(curves)), strict=True):
        axes.plot(curve.steps, curve.values, color=color, linewidth=2, label=curve.label)
        axes.scatter(curve.steps[-1], curve.values[-1], s=26, color=color, zorder=3)
    if goal is not None:
        axes.axhline(goal, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(
            0.01, goal, f"goal {goal:g} %", color=MUTED, fontsize=8, va="bottom", ha="left",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch", color=MUTED, fontsize=9)
    axes.set_ylabel(label, color=MUTED, fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="best", labelcolor=INK)
    return figure


def save_png(figure: Figure, path: str | Path | None = None, *, dpi: int = 144) -> bytes:
    """The figure as PNG bytes, also written to `path` when one is given."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    if path is not None:
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _draw_neighborhoods(axes: Axes, layout: BlockLayout, order: Order, title: str) -> None:
    height, width = layout.height, layout.width
    position = inverse_order(order)
    cells = [(height // 2, width // 2), (0, width - 1)]
    picture = np.zeros((height, width), dtype=np.uint8)
    keys = torch.arange(layout.length)
    for value, (row, column) in enumerate(cells, start=1):
        query = torch.tensor(int(position[row * width + column]))
        visible = layout.rule.allows(query, keys).numpy()
        picture.reshape(-1)[np.asarray(order)[visible]] = value
    for value, cell in enumerate(cells, start=3):
        picture[cell] = value
    axes.imshow(picture, cmap=ListedColormap([PAPER, LIGHT_BLUE, LIGHT_ORANGE, BLUE, ORANGE]), vmin=0, vmax=4)
    if max(height, width) <= _MOST_GRID_LINES:
        axes.set_xticks(np.arange(-0.5, width), minor=True)
        axes.set_yticks(np.arange(-0.5, height), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    _frame_image(axes, height, width, title)
    marks = [Patch(color=BLUE), Patch(color=ORANGE)]
    _legend(axes, marks, ["a middle token and what it sees", "a corner token"])


def _draw_blocks(axes: Axes, layout: BlockLayout) -> None:
    states = np.zeros((len(layout.counts), len(layout.key_counts)), dtype=np.uint8)
    for row, count in enumerate(layout.counts.tolist()):
        states[row, layout.indices[row, :count].numpy()] = np.where(layout.partial[row, :count].numpy(), 1, 2)
    axes.imshow(
        states, cmap=ListedColormap([PAPER, LIGHT_BLUE, BLUE]), vmin=0, vmax=2, interpolation="nearest",
        aspect="auto",
    )  # fmt: skip
    axes.set_box_aspect(1)
    blocks = f"{layout.query_block} x {layout.key_block}"
    _frame(axes, f"blocks of {blocks} tokens", "key block", "query block")
    shares = zip(("empty", "partial", "full"), layout.block_ratios, strict=True)
    marks = [Patch(facecolor=PAPER, edgecolor="#cbd2d9"), Patch(color=LIGHT_BLUE), Patch(color=BLUE)]
    _legend(axes, marks, [f"{name} {share:.0%}" for name, share in shares])


def _draw_one_row(axes: Axes, layout: BlockLayout, order: Order) -> None:
    """The image: a block of queries in its middle, what they see, and what their key blocks hold besides."""
    block = int(inverse_order(order)[(layout.height // 2) * layout.width + layout.width // 2]) // layout.query_block
    token = torch.arange(layout.length)
    queries = token[block * layout.query_block : (block + 1) * layout.query_block]
    read = torch.isin(token // layout.key_block, layout.indices[block, : layout.counts[block]])
    seen = layout.rule.allows(queries[:, None], token[None, :]).any(0)
    states = read.to(torch.uint8) + (seen & read)
    states[queries] = 3
    picture = np.zeros(layout.length, dtype=np.uint8)
    picture[np.asarray(order)] = states.numpy()
    axes.imshow(
        picture.reshape(layout.height, layout.width), cmap=ListedColormap([PAPER, LIGHT_BLUE, BLUE, ORANGE]),
        vmin=0, vmax=3, interpolation="nearest",
    )  # fmt: skip


def _draw_waste(axes: Axes, layout: BlockLayout) -> None:
    """The mask: visible pairs, pairs computed besides, pairs skipped; cells of a large one are averages."""
    step = -(-layout.length // _MOST_MASK_CELLS)
    cells = -(-layout.length // step)
    token = torch.arange(layout.length)
    shade = np.empty((cells, cells, 3))
    paper, light, dark = (np.array(to_rgb(color)) for color in (PAPER, LIGHT_BLUE, BLUE))
    listed = torch.zeros(len(layout.counts), len(layout.key_counts), dtype=torch.bool)
    for block, count in enumerate(layout.counts.tolist()):
        listed[block, layout.indices[block, :count].long()] = True
    for cell in range(cells):
        query = token[cell * step : (cell + 1) * step, None]
        seen = layout.rule.allows(query, token[None, :])
        read = listed[query // layout.query_block, token[None, :] // layout.key_block]
        visible, computed = (_pooled(mask, step) for mask in (seen & read, read))
        shade[cell] = paper * (1 - computed) + light * (computed - visible) + dark * visible
    axes.imshow(shade, interpolation="nearest")


def _pooled(mask: torch.Tensor, step: int) -> NDArray[np.float64]:
    """Share of true cells by group of `step` columns, `[groups, 1]`."""
    share = mask.double().mean(0).numpy()
    first = np.arange(0, len(share), step)
    return (np.add.reduceat(share, first) / np.diff([*first, len(share)]))[:, None]


def _figure(sizes: Sequence[tuple[float, float]]) -> tuple[Figure, NDArray[np.object_]]:
    widths = [width for width, _ in sizes]
    figure = _canvas(sum(widths) + 0.8 * (len(sizes) - 1), max(h for _, h in sizes) + 0.7)
    axes = figure.subplots(1, len(sizes), squeeze=False, gridspec_kw={"width_ratios": widths, "wspace": 0.22})
    return figure, axes[0]


def _canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _image_size(height: int, width: int) -> tuple[float, float]:
    side = _SIDE / max(height, width)
    return max(1.6, width * side), max(1.2, height * side)


def _frame_image(axes: Axes, height: int, width: int, title: str) -> None:
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_aspect("equal")
    _frame(axes, title, "", "")


def _frame(axes: Axes, title: str, below: str, left: str) -> None:
    axes.set_title(title, color=INK, fontsize=10, loc="left", pad=8)
    axes.set_xlabel(below, color=MUTED, fontsize=8)
    axes.set_ylabel(left, color=MUTED, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_anchor("N")
    for spine in axes.spines.values():
        spine.set_color("#cbd2d9")


def _legend(axes: Axes, marks: Sequence[Artist], labels: Sequence[str]) -> None:
    axes.legend(
        marks, labels, loc="upper left", bbox_to_anchor=(0, -0.06), ncols=len(labels), frameon=False, fontsize=8,
        labelcolor=INK, handlelength=1, borderaxespad=0, columnspacing=1.4,
    )  # fmt: skip


def _cycle(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]
