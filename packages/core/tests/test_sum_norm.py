"""The sum and its norm: plain path against torch's own modules, kernels against fp64, contract."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous_core.errors import BackendUnsupported
from vitreous_core.ops.sum_norm import SumNorm, add_branch, sum_norm
from vitreous_core.testing.budget import assert_within_budget

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# Shape, dtypes of shortcut, branch and result (None: no branch), factor.
SMALL = {
    "no-branch": ((2, 5, 24), SINGLE, None, SINGLE, False),
    "half-result": ((2, 7, 16), SINGLE, HALF, HALF, True),
    "one-row": ((1, 1, 8), SINGLE, SINGLE, SINGLE, True),
    "map": ((3, 2, 3, 40), HALF, HALF, HALF, False),
}
LARGE = {
    "stage-one": ((8, 56 * 56, 96), SINGLE, BRAIN, BRAIN, True),
    "no-branch-64": ((8, 3137, 64), SINGLE, None, BRAIN, False),
    "merged": ((8, 14 * 14, 1536), SINGLE, None, BRAIN, False),
    "ragged": ((3, 1001, 200), HALF, HALF, HALF, True),
    "single": ((4, 49, 768), SINGLE, SINGLE, SINGLE, False),
}
Case = tuple[tuple[int, ...], torch.dtype, torch.dtype | None, torch.dtype, bool]


def run(case: Case, backend: str, wide: bool = False) -> dict[str, Tensor]:
    """Both results and all gradients; `wide` in fp64 throughout."""
    shape, dtype, branch_dtype, result, has_factor = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    leaves = {"shortcut": (2 * draw(*shape) + 1).to(dtype), "weight": draw(shape[-1]), "bias": draw(shape[-1])}
    if branch_dtype is not None:
        leaves["branch"] = draw(*shape).to(branch_dtype)
    factor = torch.rand(shape[0], generator=generator).to(DEVICE) if has_factor else None
    cotangents = draw(*shape).to(dtype), draw(*shape).to(result)
    if wide:
        factor = None if factor is None else factor.double()
    leaves = {k: (v.double() if wide else v).to(DEVICE).requires_grad_() for k, v in leaves.items()}
    weight, bias = leaves["weight"], leaves["bias"]
    cast = torch.autocast(DEVICE, result, enabled=not wide and result != dtype)
    with cast:
        outputs = sum_norm(leaves["shortcut"], leaves.get("branch"), weight, bias, factor=factor, backend=backend)
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [c.to(DEVICE, o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    )
    named = dict(zip(leaves, gradients, strict=True))
    return {"tokens": outputs[0].detach(), "normed": outputs[1].detach(), **{f"d{k}": v for k, v in named.items()}}


def check(case: Case) -> None:
    actual, truth = run(case, "triton"), run(case, "torch", wide=True)
    plain = run(case, "torch")
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in plain.items()}
    # Gradients of the fp32 parameters are made of the result's dtype.
    assert_within_budget(actual, truth, plain, precision=case[3])
    again = run(case, "triton")
    assert all(torch.equal(again[name], actual[name]) for name in actual)


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name: str) -> None:
    check(SMALL[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_on_gpu(name: str) -> None:
    check(LARGE[name])


@pytest.mark.gpu
def test_auto_is_triton_on_gpu_and_plain_under_compilation() -> None:
    norm = SumNorm(32).cuda()
    shortcut, branch = torch.randn(2, 5, 32, device="cuda"), torch.randn(2, 5, 32, device="cuda")
    eager = norm(shortcut, branch)
    assert "SumNorm" in type(eager[1].grad_fn).__name__
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)(shortcut, branch)
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_plain_path_is_torchs_own_norm_of_the_sum() -> None:
    norm, reference = SumNorm(12).double(), nn.LayerNorm(12).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    reference.load_state_dict(norm.state_dict())
    shortcut, branch = (torch.randn(3, 4, 12, dtype=torch.float64) for _ in range(2))
    factor = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    tokens, normed = norm(shortcut, branch, factor)
    torch.testing.assert_close(tokens, shortcut + factor[:, None, None] * branch, rtol=0, atol=0)
    torch.testing.assert_close(normed, reference(tokens), rtol=0, atol=0)
    assert sum_norm(shortcut, None, norm.weight, norm.bias, dtype=torch.float32)[1].dtype == torch.float32
    tokens, normed = norm(shortcut)
    assert tokens is shortcut
    torch.testing.assert_close(normed, F.layer_norm(shortcut, (12,), norm.weight, norm.bias), rtol=0, atol=0)
    leaves = [t.requires_grad_() for t in (shortcut, branch, norm.weight.detach(), norm.bias.detach())]
    assert torch.autograd.gradcheck(lambda *t: sum_norm(*t, factor=factor), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: sum_norm(*t, factor=factor)[1], leaves)


def test_autocast_decides_the_dtype_of_the_norm_alone() -> None:
    norm = SumNorm(12)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, normed = norm(torch.randn(2, 12), torch.randn(2, 12).bfloat16())
        assert (tokens.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
        assert norm.double()(torch.randn(2, 12).double())[1].dtype == torch.float64


def test_shapes_alone_are_enough() -> None:
    shortcut, weight = torch.empty(2, 3, 8, device="meta"), torch.empty(8, device="meta")
    tokens, normed = sum_norm(shortcut, shortcut, weight, weight)
    assert tokens.shape == normed.shape == shortcut.shape


def test_bad_input_is_named() -> None:
    x, w = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight and bias must have shape \(8,\)"):
        sum_norm(x, None, torch.ones(7), w)
    with pytest.raises(ValueError, match="branch must have the shape of shortcut"):
        sum_norm(x, x[:1], w, w)
    with pytest.raises(ValueError, match=r"factor must have shape \(2,\)"):
        sum_norm(x, x, w, w, factor=torch.ones(3))
    with pytest.raises(ValueError, match="without a branch"):
        sum_norm(x, None, w, w, factor=torch.ones(2))
    with pytest.raises(ValueError, match="backend must be"):
        sum_norm(x, None, w, w, backend="flex")  # type: ignore[arg-type]
    with pytest.raises(BackendUnsupported, match="float64"):
        sum_norm(x.double(), None, w.double(), w.double(), backend="triton")


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (SINGLE, BRAIN), (BRAIN, SINGLE)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_sum_without_a_norm(dtypes: tuple[torch.dtype, torch.dtype], compiled: bool) -> None:
    check_sum("cpu", dtypes, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(SINGLE, BRAIN), (BRAIN, BRAIN), (SINGLE, SINGLE)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_sum_without_a_norm_on_gpu(dtypes: tuple[torch.dtype, torch.dtype], compiled: bool) -> None:
    check_sum("cuda", dtypes, compiled)


def check_sum(device: str, dtypes: tuple[torch.dtype, torch.dtype], compiled: bool) -> None:
    """Sum and gradients, inside other operations: there compiled code has lost them (PyTorch 2.11)."""
    shortcut, branch = (
        torch.randn(3, 5, 8, device=device).to(dtype).double().requires_grad_() for dtype in dtypes
    )  # fmt: skip
    factor = torch.tensor([0.0, 1.25, 2.0], device=device)

    def total(shortcut: Tensor, branch: Tensor) -> Tensor:
        return add_branch((2 * shortcut).to(dtypes[0]), (2 * branch).to(dtypes[1]), factor)

    function = torch.compile(total, backend="aot_eager", fullgraph=True) if compiled else total
    got = function(shortcut, branch)
    truth = 2 * shortcut + factor.double().view(-1, 1, 1) * 2 * branch
    assert got.dtype == torch.promote_types(*dtypes)
    weights = torch.randn_like(truth)
    gradients = [torch.autograd.grad((sum_ * weights).sum(), (shortcut, branch)) for sum_ in (got, truth)]
    for found, expected in zip((got, *gradients[0]), (truth, *gradients[1]), strict=True):
        # One rounding of the result, or of each gradient to its input's dtype.
        tolerance = max(torch.finfo(dtype).eps for dtype in dtypes)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
