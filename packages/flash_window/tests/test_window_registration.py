"""The registered operators of cut windows: opcheck, compilation as the first call, autocast, imports without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from vitreous_flash_window import window_attention
from vitreous_flash_window.ops import contracts

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BOTH = [
    pytest.param("interpreter", marks=pytest.mark.interpret),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


def recorded_calls(tokens: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """Arguments with which the public function calls the two operators."""
    calls = {}
    names = ("_window_attention", "_window_attention_backward")

    def record(name, operator, *arguments):
        calls[name] = arguments
        return operator(*arguments)

    with monkeypatch.context() as patched:
        for name in names:
            patched.setattr(contracts, name, partial(record, name, getattr(contracts, name)))
        packed = torch.randn(4, tokens, 3, 2, 16, device=DEVICE, requires_grad=True)
        bias = torch.randn(2, tokens, tokens, device=DEVICE, requires_grad=True) if with_bias else None
        mask = torch.rand(2, tokens, tokens, device=DEVICE) > 0.3 if with_bias else None
        out = window_attention(*packed.permute(2, 0, 3, 1, 4), bias, mask, dropout_p=0.1, backend="triton")
        out.square().sum().backward()
    return calls


@pytest.mark.parametrize(
    ("where", "tokens", "with_bias"),
    [
        pytest.param("interpreter", 4, True, marks=pytest.mark.interpret),
        pytest.param("gpu", 4, True, marks=pytest.mark.gpu),
        pytest.param("gpu", 70, False, marks=pytest.mark.gpu),  # saves output and log-sum-exp
    ],
)
def test_opcheck(where, tokens, with_bias, monkeypatch):
    calls = recorded_calls(tokens, with_bias, monkeypatch)
    for name, arguments in calls.items():
        operator = getattr(contracts, name)
        arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        if name == "_window_attention":
            for tensor in arguments[:4]:
                if tensor is not None:
                    tensor.requires_grad_()
        torch.library.opcheck(operator, arguments)


COMPILED_FIRST = """
import torch
from vitreous_flash_window import window_attention

device = "{device}"

def attend(q, k, v, bias):
    mask = torch.ones(2, 9, 9, dtype=torch.bool, device=device).tril()
    seed = q.new_zeros((), dtype=torch.int64)
    return window_attention(q, k, v, bias, mask, dropout_p=0.1, dropout_seed=seed, backend="triton")

def run(function):
    torch.manual_seed(0)
    leaves = [torch.randn(4, 2, 9, 16, device=device, requires_grad=True) for _ in range(3)]
    leaves.append(torch.randn(2, 9, 9, device=device, requires_grad=True))
    out = function(*leaves)
    return out, *torch.autograd.grad(out.square().sum(), leaves)

compiled = torch.compile(attend, fullgraph=True, backend="{backend}")
first = run(compiled)
for a, b in zip(first, run(attend), strict=True):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
"""


@pytest.mark.compile
@pytest.mark.parametrize("where", BOTH)
def test_fullgraph_compilation_as_the_first_call(where):
    backend = "aot_eager" if DEVICE == "cpu" else "inductor"
    script = COMPILED_FIRST.format(device=DEVICE, backend=backend)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.compile
def test_compiled_functions_see_new_batches():
    bias = torch.randn(2, 49, 49, device=DEVICE, requires_grad=True)
    compiled = torch.compile(lambda q: window_attention(q, q, q, bias, backend="auto"), fullgraph=True)
    for images in (2, 3, 5):
        q = torch.randn(images, 2, 49, 32, device=DEVICE, dtype=torch.float16)
        assert torch.equal(compiled(q), window_attention(q, q, q, bias, backend="triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_the_tensors_and_not_the_bias(dtype):
    q = torch.randn(4, 2, 49, 32, device=DEVICE, requires_grad=True)
    bias = torch.randn(2, 49, 49, device=DEVICE, requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        out = window_attention(q, q.to(dtype), q, bias, backend="triton")
    out.sum().backward()
    assert (out.dtype, q.grad.dtype, bias.grad.dtype) == (dtype, torch.float32, torch.float32)


@pytest.mark.parametrize("where", BOTH)
def test_gradients_have_no_gradients(where):
    q = torch.randn(1, 1, 4, 16, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(window_attention(q, q, q, backend="triton").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_truth_runs_without_triton():
    script = """
import sys
sys.modules["triton"] = None
import torch
from vitreous_flash_window import choose_backend, window_attention
q = torch.randn(1, 1, 9, 8, requires_grad=True)
window_attention(q, q, q, backend="auto").sum().backward()
assert choose_backend("cuda", torch.float16, 49, 32) in ("torch", "triton")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
