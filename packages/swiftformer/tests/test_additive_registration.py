"""The registered operators: contract, opcheck, compilation as the first call, autocast, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous_core import triton_support
from vitreous_core.deploy import switch_to_deploy
from vitreous_core.errors import BackendUnsupported
from vitreous_swiftformer import EfficientAdditiveAttention
from vitreous_swiftformer.ops import additive_attention, additive_attention_packed, choose_backend, contracts
from vitreous_swiftformer.ops.backends import resolve

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BOTH = [
    pytest.param("interpreter", marks=pytest.mark.interpret),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


def draw(*shape: int, **options: object) -> Tensor:
    return torch.randn(*shape, device=DEVICE, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("where", BOTH)
def test_opcheck(where: str) -> None:
    # Queries, keys and their gradients are halves of one tensor, as a stacked projection has them.
    query, key = (half.detach() for half in draw(2, 5, 32).chunk(2, -1))
    dunit, dmixed = draw(2, 5, 32).chunk(2, -1)
    w_g = draw(16)
    _, _, statistics = contracts._additive_attention(query, key, w_g, 0.25)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, w_g)]
    torch.library.opcheck(contracts._additive_attention, (*leaves, 0.25))
    torch.library.opcheck(
        contracts._additive_attention_backward, (dunit, dmixed, query, key, w_g, statistics, 0.25)
    )  # fmt: skip
    torch.library.opcheck(contracts._additive_attention_packed, (draw(2, 5, 32), w_g, 0.25))


COMPILED_FIRST = """
import torch
from vitreous_swiftformer import EfficientAdditiveAttention
from vitreous_swiftformer.model import ConvEncoder

torch.manual_seed(0)
module = EfficientAdditiveAttention(16, backend="triton").to("{device}")
folded = module.folded(torch.ones(16)).eval().requires_grad_(False)
tokens = torch.randn(2, 9, 16, device="{device}")

def run(function):
    leaf = tokens.clone().requires_grad_()
    out = function(leaf)
    return out, *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])

compiled = torch.compile(module, fullgraph=True, backend="{backend}")
first = run(compiled)
for a, b in zip(first, run(module), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
image = tokens.mT.reshape(2, 16, 3, 3).to(memory_format=torch.channels_last)
compiled = torch.compile(folded, fullgraph=True, backend="{backend}")
with torch.no_grad():
    torch.testing.assert_close(compiled(image).flatten(2).mT, first[0], rtol=1e-4, atol=1e-5)

block = ConvEncoder(16, 32, backend="triton").to("{device}").eval()
block.fold()
block = block.half().requires_grad_(False)
compiled = torch.compile(block, fullgraph=True, backend="{backend}")
assert torch.equal(compiled(image.half()), block(image.half()))
"""


@pytest.mark.compile
@pytest.mark.parametrize("where", BOTH)
def test_fullgraph_compilation_as_the_first_call(where: str) -> None:
    script = COMPILED_FIRST.format(device=DEVICE, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("where", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_decides_the_dtype(where: str, dtype: torch.dtype) -> None:
    query, w_g = draw(2, 5, 16, requires_grad=True), draw(16, requires_grad=True)
    with torch.autocast(DEVICE, dtype):
        unit, mixed = additive_attention(query, query.to(dtype), w_g, backend="triton")
        packed = additive_attention_packed(torch.cat([query, query], -1), w_g.detach(), backend="triton")
    (unit.float() + mixed.float()).sum().backward()
    assert (unit.dtype, mixed.dtype, packed.dtype) == (dtype, dtype, dtype)
    assert query.grad is not None
    assert w_g.grad is not None
    assert (query.grad.dtype, w_g.grad.dtype) == (torch.float32, torch.float32)


class Names(TorchDispatchMode):
    """Collects the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.names.add(function.name())
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("where", BOTH)
def test_zeros_stand_only_for_gradients_that_are_missing(where: str) -> None:
    query, key, w_g = (draw(*shape, requires_grad=True) for shape in ((2, 5, 16), (2, 5, 16), (16,)))
    fills = {"aten::zeros", "aten::zero_", "aten::zeros_like"}
    for used in ((0, 1), (0,), (1,)):
        results = []
        for backend in ("torch", "triton"):
            outputs = additive_attention(query, key, w_g, backend=backend)
            total = sum(outputs[i].square().sum() * (i + 1) for i in used) + 0 * (key.sum() + w_g.sum())
            with Names() as ran:
                results.append(torch.autograd.grad(total, (query, key, w_g)))
        assert bool(fills & ran.names) == (len(used) == 1)
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", BOTH)
def test_gradients_have_no_gradients(where: str) -> None:
    query = draw(1, 4, 16, requires_grad=True)
    unit, mixed = additive_attention(query, query, draw(16), backend="triton")
    (gradient,) = torch.autograd.grad((unit + mixed).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("where", BOTH)
def test_a_module_is_the_same_by_either_backend(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions round to it by default
    torch.manual_seed(0)
    plain = EfficientAdditiveAttention(24).to(DEVICE)
    fast = EfficientAdditiveAttention(24, backend="triton").to(DEVICE)
    fast.load_state_dict(plain.state_dict())
    maps = draw(2, 24, 5, 7)
    tokens = maps.flatten(2).mT
    results = []
    for module in (plain, fast):
        leaf = tokens.clone().requires_grad_()
        out = module(leaf)
        results.append((out, *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])))
    for a, b in zip(*results, strict=True):
        # Measured: 2e-6 of the largest entry at most.
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    for layout in (torch.contiguous_format, torch.channels_last):
        image = maps.contiguous(memory_format=layout)
        folded = fast.folded(torch.full((24,), 2.0)).eval().requires_grad_(False)
        actual = folded(image)
        assert actual.is_contiguous(memory_format=layout)
        assert (actual.flatten(2).mT - 2 * results[0][0]).abs().max() <= 1e-5 * actual.abs().max()


def test_auto_is_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU the answer is for a current one.
    monkeypatch.setattr(triton_support, "_read_capability", lambda index: (9, 0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert choose_backend("cuda", dtype, 3136, 48) == "triton"
        assert choose_backend("cuda", dtype, 49, 512) == "triton"
        assert choose_backend("cuda", dtype, 49, 513) == "torch"
        assert choose_backend("cpu", dtype, 3136, 48) == "torch"
    assert choose_backend("cuda", torch.float64, 3136, 48) == "torch"
    device = torch.device("cuda")
    assert resolve("auto", device, torch.float16, torch.float32, 49, 48) == "triton"
    assert resolve("auto", device, torch.float16, torch.float64, 49, 48) == "torch"
    monkeypatch.setattr(triton_support, "_read_capability", lambda index: (7, 5))
    assert choose_backend("cuda", torch.float16, 3136, 48) == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-2), (torch.float32, 1e-4)])
@torch.no_grad()
def test_a_network_takes_the_kernels_by_itself(
    build: Any, tiny: dict[str, Any], dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training mode and in deploy mode, with the results of the named backend."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = draw(2, 3, 40, 24).to(dtype).to(memory_format=torch.channels_last)
    for deploy in (False, True):
        results = {}
        for backend in ("auto", "torch"):
            model = build(tiny, backend=backend).to(DEVICE, dtype, memory_format=torch.channels_last)
            if deploy:
                switch_to_deploy(model)
            with torch.profiler.profile() as profile:
                results[backend] = model(images)
            names = {event.name for event in profile.events()}
            assert any("_additive_fwd_kernel" in name for name in names) == (backend == "auto")
        torch.testing.assert_close(results["auto"], results["torch"], rtol=limit, atol=limit)


def test_the_truth_side_by_side() -> None:
    query_key, w_g = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    unit, mixed = additive_attention(*query_key.chunk(2, -1), w_g, backend="torch")
    assert torch.equal(additive_attention_packed(query_key, w_g, backend="auto"), torch.cat([unit, mixed], -1))
    # The factor cancels.
    again = additive_attention(*query_key.chunk(2, -1), w_g, scale=3.0, backend="torch")
    torch.testing.assert_close((unit, mixed), again, rtol=1e-12, atol=1e-14)


def test_bad_input_is_named() -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"query must be \[B, L, D\]"):
        additive_attention(x[0], x[0], w, backend="torch")
    with pytest.raises(TypeError, match="key must have the dtype of query"):
        additive_attention(x, x.double(), w, backend="torch")
    with pytest.raises(ValueError, match="key must have the shape of query"):
        additive_attention(x, x[:1], w, backend="torch")
    with pytest.raises(ValueError, match=r"w_g must have shape \(8,\)"):
        additive_attention(x, x, w[:, None], backend="torch")
    with pytest.raises(TypeError, match="w_g must be a floating tensor"):
        additive_attention(x, x, w.long(), backend="torch")
    with pytest.raises(ValueError, match="w_g must be on the device of query"):
        additive_attention(x, x, w.to("meta"), backend="torch")
    with pytest.raises(ValueError, match="scale must be positive"):
        additive_attention(x, x, w, scale=0.0, backend="torch")
    with pytest.raises(TypeError, match=r"query must be a torch\.Tensor"):
        additive_attention([1.0], x, w, backend="torch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"query_key must be \[B, L, 2 \* D\]"):
        additive_attention_packed(x[..., :7], w, backend="torch")
    with pytest.raises(ValueError, match="backend must be one of"):
        additive_attention(x, x, w, backend="flex")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        EfficientAdditiveAttention(8, backend="flex")  # type: ignore[arg-type]


def test_a_named_backend_gives_every_reason() -> None:
    x = torch.randn(2, 3, 4096, dtype=torch.float64)
    with pytest.raises(BackendUnsupported) as refusal:
        additive_attention(x, x, x[0, 0], backend="triton")
    message = str(refusal.value)
    for reason in ("query and key must be float16", "w_g must be float16", "channels must be from 1 to 2048; got 4096"):
        assert reason in message


def test_the_truth_runs_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from vitreous_swiftformer import EfficientAdditiveAttention
from vitreous_core.errors import BackendUnsupported
x = torch.randn(1, 9, 8, requires_grad=True)
EfficientAdditiveAttention(8)(x).sum().backward()
try:
    EfficientAdditiveAttention(8, backend="triton")(x)
except BackendUnsupported:
    pass
else:
    raise SystemExit("no refusal")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
