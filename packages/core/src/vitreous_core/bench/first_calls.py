"""First calls: what compiling costs whoever calls an operation for the first time, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from .attention import FORWARD, AttentionProblem, draw, ours
from .case import Prepared, Provider, Work
from .host_tables import BUILD, CurveProblem, timed_apart

BACKWARD = "bwd"
_LIMIT_S = 120.0
_COLD_CURVES = 3


@dataclass(frozen=True)
class FirstCallProblem:
    """The first forward and the first backward of a class of shapes, nothing compiled before."""

    attention: AttentionProblem

    def work(self, mode: str) -> Work | None:
        """No roof: compilers set the time."""
        return None

    def facts(self) -> Mapping[str, Any]:
        """For the row; in no plot."""
        return {name: fact for name, fact in self.attention.facts().items() if name not in ("series", "side")}


@dataclass(frozen=True)
class ColdCurveProblem:
    """The first Hilbert order of a process, with an empty Numba cache."""

    curve: CurveProblem

    def work(self, mode: str) -> Work | None:
        """No roof."""
        return None

    def facts(self) -> Mapping[str, Any]:
        """For the row; in no plot."""
        return {"height": self.curve.height, "width": self.curve.width}


def _prepare_first_calls(problem: FirstCallProblem, device: torch.device) -> Prepared:
    forward_ms, backward_ms = timed_apart(_first_calls, (problem.attention, str(device)), _LIMIT_S)
    clock = "wall, empty Triton cache; imports, CUDA context, inputs and layout off the clock"
    return Prepared(samples_ms={FORWARD: [forward_ms], BACKWARD: [backward_ms]}, facts={"clock": clock})


def _first_calls(connection: Connection, problem: AttentionProblem, device: str) -> None:
    import triton

    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        tensors = draw(problem, torch.device(device))
        attend = ours(problem, tensors)
        torch.cuda.synchronize()
        connection.send(None)
        start = time.perf_counter()
        out = attend(tensors.query, tensors.key, tensors.value)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        torch.autograd.grad(out, tensors.leaves, tensors.cotangent)
        torch.cuda.synchronize()
        connection.send([1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)])


def _prepare_cold_curve(problem: ColdCurveProblem, device: torch.device) -> Prepared:
    code = (
        "import time; start = time.perf_counter()\n"
        "from vitreous_core.curves import hilbert_order\n"
        f"hilbert_order({problem.curve.height}, {problem.curve.width})\n"
        "print(1e3 * (time.perf_counter() - start))"
    )
    samples = []
    for _ in range(_COLD_CURVES):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
            )
        samples.append(float(done.stdout))
    return Prepared(samples_ms={BUILD: samples}, facts={"clock": "wall, empty Numba cache, importing it included"})


FIRST_CALL = Provider("triton", _prepare_first_calls)
COLD_CURVE = Provider("numba", _prepare_cold_curve)
