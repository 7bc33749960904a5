"""Token orders and layouts as benchmark problems: what the host builds before a kernel can run."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from .. import curves
from ..curves import Order, _reference
from ..indexing import build_order
from ..layout import BlockLayout
from ..patterns import DEFAULT_BLOCK, Pattern
from .attention import FLEX_BLOCK
from .case import Gate, Prepared, Provider, Step, Unavailable, Work

BUILD = "build"
_CHECKED_SIDES = (24, 20)
"""Image on which a layout is compared with its dense mask."""


@dataclass(frozen=True)
class CurveProblem:
    """The Hilbert order of a grid, as flat row-major indices."""

    height: int
    width: int

    def work(self, mode: str) -> Work | None:
        """No roof: one write of the result is far below what any walk needs."""
        return None

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {"series": "Hilbert order", "side": self.height, "height": self.height, "width": self.width}


@dataclass(frozen=True)
class LayoutProblem:
    """The block layout of a pattern under an order, a name of `indexing.ORDERS` or `"random"`."""

    pattern: Pattern
    height: int
    width: int
    order: str

    def token_order(self, height: int, width: int) -> Order:
        """`order` on a grid; a random permutation is the worst there is for blocks."""
        if self.order == "random":
            return np.random.default_rng(0).permutation(height * width).astype(np.int32)
        return build_order(self.order, height, width)

    def work(self, mode: str) -> Work | None:
        """No roof."""
        return None

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {"series": self.order, "side": self.height, "pattern": repr(self.pattern), "height": self.height,
                "width": self.width, "order": self.order, "block": DEFAULT_BLOCK}  # fmt: skip


def _prepare_curve(problem: CurveProblem, device: torch.device, *, make: Callable[[CurveProblem], Step]) -> Prepared:
    step = make(problem)
    return Prepared({BUILD: step}, lambda modes: _compare_curves(step(), problem))


def _numba_curve(problem: CurveProblem) -> Step:
    return partial(curves.hilbert_order, problem.height, problem.width)


def _python_curve(problem: CurveProblem) -> Step:
    return lambda: _walked(problem.height, problem.width)


def _hilbertsfc_curve(problem: CurveProblem, *, parallel: bool) -> Step:
    if importlib.util.find_spec("hilbertsfc") is None:
        raise Unavailable("the package hilbertsfc is not installed (it needs Python 3.12)")
    side, bits = problem.height, problem.height.bit_length() - 1
    if problem.width != side or side != 2**bits or bits == 0:
        raise Unavailable("hilbertsfc walks squares of side 2^k only")
    from hilbertsfc import hilbert_decode_2d  # type: ignore[import-not-found]

    def decode() -> Order:
        index = np.arange(side * side, dtype=np.uint32)
        x, y = hilbert_decode_2d(index, nbits=bits, parallel=parallel)
        # Its x and y change places with every bit; the sum below is the cheapest way to a flat index in int32.
        first, second = (y, x) if bits % 2 == 0 else (x, y)
        flat: Order = first.astype(np.int32) * np.int32(side) + second
        return flat

    return decode


def _walked(height: int, width: int) -> Order:
    return np.fromiter((y * width + x for x, y in _reference.walk(height, width)), np.int32, height * width)


_reference_order = lru_cache(1)(_walked)


def _compare_curves(got: object, problem: CurveProblem) -> Gate:
    wrong = float((got != _reference_order(problem.height, problem.width)).mean())
    return Gate({"cells": wrong}, {"cells": 0.0}, "the recursion written out in Python, share of other cells")


def _prepare_layout(problem: LayoutProblem, device: torch.device) -> Prepared:
    order = problem.token_order(problem.height, problem.width)

    def gate(modes: Collection[str]) -> Gate:
        height, width = _CHECKED_SIDES
        small = problem.token_order(height, width)
        built = problem.pattern.layout(height, width, small).to_dense().numpy()
        wrong = float((built != problem.pattern.dense(height, width, small)).mean())
        return Gate({"pairs": wrong}, {"pairs": 0.0}, f"the dense mask of {height} x {width}, share of other pairs")

    return Prepared({BUILD: lambda: problem.pattern.layout(problem.height, problem.width, order)}, gate)


def _prepare_block_mask(problem: LayoutProblem, device: torch.device, *, limit_s: float) -> Prepared:
    """FlexAttention's own builder, in a process that can be ended when it takes too long."""
    samples = timed_apart(_build_block_masks, (problem, str(device)), limit_s)
    return Prepared(samples_ms={BUILD: samples}, facts={"block": FLEX_BLOCK, "clock": "wall, first call of the size"})


def timed_apart(target: Callable[..., None], arguments: tuple[Any, ...], limit_s: float) -> list[float]:
    """Timings that `target(connection, *arguments)` takes in a process of its own.

    The target sends None when it is ready (importing and starting a device is not on the clock), then its samples.

    Raises:
        Unavailable: when it takes longer than `limit_s` from there, or ends without an answer.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    try:
        here.recv()
        if not here.poll(limit_s):
            raise Unavailable(f"not done after {limit_s:g} s")
        samples: list[float] = here.recv()
        return samples
    except EOFError:
        process.join()
        raise Unavailable(f"its process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _build_block_masks(connection: Connection, problem: LayoutProblem, device: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    layout = problem.pattern.layout(problem.height, problem.width, problem.token_order(problem.height, problem.width))
    rule = _rule_on(layout, device)
    torch.zeros(1, device=device)
    connection.send(None)
    start = time.perf_counter()
    # A whole tensor comes back, so the device is done when this is.
    mask = create_block_mask(
        lambda batch, head, query, key: rule(query, key), None, None, layout.length, layout.length, device=device
    )
    mask.kv_num_blocks.sum().item()
    connection.send([1e3 * (time.perf_counter() - start)])


def _rule_on(layout: BlockLayout, device: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return layout.to(device).rule.allows


NUMBA_CURVE = Provider("numba", partial(_prepare_curve, make=_numba_curve))
PYTHON_CURVE = Provider("python", partial(_prepare_curve, make=_python_curve))
HILBERTSFC = Provider("hilbertsfc", partial(_prepare_curve, make=partial(_hilbertsfc_curve, parallel=False)))
HILBERTSFC_PARALLEL = Provider(
    "hilbertsfc-parallel", partial(_prepare_curve, make=partial(_hilbertsfc_curve, parallel=True))
)
NUMBA_LAYOUT = Provider("numba", _prepare_layout)
CREATE_BLOCK_MASK = Provider("create_block_mask", partial(_prepare_block_mask, limit_s=20.0))
