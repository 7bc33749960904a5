"""The registered operators: opcheck, fullgraph compilation as the first call, autocast, imports without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous_core.curves import hilbert_order
from vitreous_core.ops.block_sparse_attention import (
    RelativeBias2d,
    block_sparse_attention,
    contracts,
    packed_attention,
)
from vitreous_core.patterns import Neighborhood2d, Window1d
from vitreous_core.testing.attention import Problem

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BOTH = [
    pytest.param("interpreter", marks=pytest.mark.interpret),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


def attend(problem: Problem, is_packed: bool) -> None:
    """Output and every gradient on the kernels."""
    layout, tensors = problem.layout().to(DEVICE), problem.tensors(DEVICE)
    (problem.run_packed if is_packed else problem.run)(tensors, layout, "triton")


def recorded_calls(problem: Problem, is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """Arguments with which the public function calls the two passes."""
    calls = {}
    name = "packed_block_sparse_attention" if is_packed else "block_sparse_attention"
    names = (f"{name}_forward", f"{name}_backward")
    operators = {name: getattr(contracts, name) for name in names}

    def record(name, operator, *arguments):
        calls[name] = arguments
        return operator(*arguments)

    with monkeypatch.context() as patched:
        for name, operator in operators.items():
            patched.setattr(contracts, name, partial(record, name, operator))
        attend(problem, is_packed)
    return calls


@pytest.mark.parametrize("where", BOTH)
@pytest.mark.parametrize(
    ("bias", "is_packed"),
    [("none", False), ("cells", False), ("cells", True)],
    ids=["none", "cells", "cells-packed"],
)
def test_opcheck(where, bias, is_packed, monkeypatch):
    problem = Problem(Window1d(8), 4, 4, None, 1, 1, 1, 16, torch.float32, bias, "transposed", dropout_p=0.1)
    calls = recorded_calls(problem, is_packed, monkeypatch)
    assert len(calls) == 2
    for name, arguments in calls.items():
        arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(getattr(torch.ops.vitreous, name).default, arguments)
        if name.endswith("_forward"):
            # What autograd goes through takes the same.
            operator = getattr(torch.ops.vitreous, name.removesuffix("_forward")).default
            for index in (0, 2) if is_packed else (0, 1, 2, 3):
                if isinstance(arguments[index], torch.Tensor):
                    arguments[index].requires_grad_()
            torch.library.opcheck(operator, arguments)


class CalledOperators(TorchDispatchMode):
    """Writes down what is called from outside of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("where", BOTH)
@pytest.mark.parametrize("is_packed", [False, True], ids=["apart", "packed"])
def test_each_pass_is_one_operator(where, is_packed):
    """Copies and fills around it would cost a launch each."""
    problem = Problem(Window1d(8), 4, 4, None, 1, 1, 1, 16, torch.float32, "cells")
    tensors = problem.tensors(DEVICE)
    table = torch.randn(49, 1, device=DEVICE, requires_grad=True)
    layout, bias = problem.layout().to(DEVICE), RelativeBias2d(table, 4, 4)
    if is_packed:
        leaves = [torch.randn(1, 16, 48, device=DEVICE, requires_grad=True)]
        cotangent, prefix = torch.randn(1, 16, 16, device=DEVICE), "vitreous::packed_block_sparse_attention"
        function = partial(packed_attention, num_heads=1)
    else:
        leaves = [tensors[name].requires_grad_() for name in ("query", "key", "value")]
        cotangent, prefix, function = tensors["cotangent"], "vitreous::block_sparse_attention", block_sparse_attention
    with CalledOperators() as called:
        out = function(*leaves, layout, bias=bias, backend="triton")
        torch.autograd.grad(out, [*leaves, table], cotangent)
    called = [name for name in called.names if "detach" not in name]
    assert called == [f"{prefix}_forward", f"{prefix}_backward"]


COMPILED_FIRST = """
import torch
from vitreous_core.indexing import layout_for, order_tables
from vitreous_core.ops.block_sparse_attention import RelativeBias2d, block_sparse_attention, packed_attention
from vitreous_core.patterns import Neighborhood2d

device = "{device}"

def attend(*inputs):
    *tensors, table = inputs
    layout = layout_for(Neighborhood2d(3), "hilbert", 4, 5, device)
    order, _ = order_tables("hilbert", 4, 5, device)
    bias, seed = RelativeBias2d(table, 4, 5, order), table.new_zeros((), dtype=torch.int64)
    settings = dict(bias=bias, dropout_p=0.1, dropout_seed=seed, backend="triton")
    if len(tensors) == 1:
        return packed_attention(*tensors, layout, num_heads=1, **settings)
    return block_sparse_attention(*tensors, layout, **settings)

def run(function, shapes):
    torch.manual_seed(0)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    leaves.append(torch.randn(63, 1, device=device, requires_grad=True))
    out = function(*leaves)
    return out, *torch.autograd.grad(out.square().sum(), leaves)

compiled = torch.compile(attend, fullgraph=True, backend="{backend}")
for shapes in ([(1, 1, 20, 16)] * 3, [(1, 20, 48)]):
    first = run(compiled, shapes)
    for a, b in zip(first, run(attend, shapes), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
"""


@pytest.mark.parametrize("where", BOTH)
def test_fullgraph_compilation_as_the_first_call(where):
    backend = "aot_eager" if DEVICE == "cpu" else "inductor"
    script = COMPILED_FIRST.format(device=DEVICE, backend=backend)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
def test_compiled_modules_see_new_batches_and_training_steps():
    layout = Neighborhood2d(5).layout(12, 12, hilbert_order(12, 12)).to(DEVICE)
    order = torch.from_numpy(hilbert_order(12, 12)).to(DEVICE)
    table = torch.randn(23 * 23, 2, device=DEVICE, requires_grad=True)

    def attend(q):
        return block_sparse_attention(q, q, q, layout, bias=RelativeBias2d(table, 12, 12, order), backend="triton")

    compiled = torch.compile(attend, fullgraph=True)
    for batch in (2, 3, 5):
        q = torch.randn(batch, 2, 144, 32, device=DEVICE, dtype=torch.float16)
        assert torch.equal(compiled(q), attend(q))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_the_tensors_and_not_the_bias(dtype):
    layout = Window1d(16).layout(8, 8).to(DEVICE)
    q = torch.randn(2, 2, 64, 32, device=DEVICE, requires_grad=True)
    table = torch.randn(225, 2, device=DEVICE, requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        out = block_sparse_attention(q, q.to(dtype), q, layout, bias=RelativeBias2d(table, 8, 8), backend="triton")
    out.sum().backward()
    assert (out.dtype, q.grad.dtype, table.grad.dtype) == (dtype, torch.float32, torch.float32)


def test_the_truth_runs_without_triton():
    script = """
import sys
sys.modules["triton"] = None
import torch
from vitreous_core.ops.block_sparse_attention import block_sparse_attention
from vitreous_core.patterns import Window1d
q = torch.randn(1, 1, 16, 8, requires_grad=True)
block_sparse_attention(q, q, q, Window1d(4).layout(4, 4), backend="torch").sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_function_is_found_under_its_public_name():
    from vitreous_core import ops
    from vitreous_core.ops.block_sparse_attention import RelativeBias2d, block_sparse_attention

    assert ops.block_sparse_attention is block_sparse_attention
    assert ops.RelativeBias2d is RelativeBias2d
