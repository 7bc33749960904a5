"""The plain torch operators against masked softmax attention with masks written out from the definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous_hilbert_attn.sequence_attention import neighborhood_attention, slide_attention, window_attention

# fp64 errors measured over all cases below: outputs 1.4e-15, gradients 3.2e-15.
EXACT = {"rtol": 0, "atol": 1e-13}


def window_mask(length: int, size: int, shift: int) -> Tensor:
    group = (torch.arange(length) + shift) // size
    return group[:, None] == group[None, :]


def slide_mask(length: int, kernel: int) -> Tensor:
    token = torch.arange(length)
    return (token[:, None] - token[None, :]).abs() <= kernel // 2


def neighborhood_mask(length: int, kernel: int) -> Tensor:
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        start = min(max(i - kernel // 2, 0), max(length - kernel, 0))
        mask[i, start : start + kernel] = True
    return mask


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, bias: Tensor) -> Tensor:
    scores = scale * torch.einsum("bhid,bhjd->bhij", q, k) + bias
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


WINDOWS = [
    (1, 1, 0),
    (1, 9, 4),
    (7, 1, 0),
    (13, 4, 0),
    (13, 4, 2),
    (13, 4, 3),
    (35, 49, 24),
    (48, 16, 8),
    (240, 49, 24),
]
SLIDES = [(1, 1), (1, 9), (7, 3), (7, 25), (35, 1), (35, 9), (67, 33), (143, 9)]
NEIGHBORHOODS = [(1, 1), (1, 9), (7, 3), (7, 4), (7, 7), (7, 25), (35, 1), (35, 8), (67, 33), (143, 9), (240, 49)]
CASES = (
    [pytest.param(window_attention, window_mask, case, id=f"window-{case}") for case in WINDOWS]
    + [pytest.param(slide_attention, slide_mask, case, id=f"slide-{case}") for case in SLIDES]
    + [
        pytest.param(neighborhood_attention, neighborhood_mask, case, id=f"neighborhood-{case}")
        for case in NEIGHBORHOODS
    ]
)
each_case = pytest.mark.parametrize(("attend", "mask_of", "case"), CASES)


def make_heads(length: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [heads.requires_grad_() for heads in draw]


@pytest.mark.parametrize("with_bias", [False, True])
@each_case
def test_equals_masked_attention_in_output_and_gradients(
    attend: Callable, mask_of: Callable, case: tuple[int, ...], with_bias: bool
) -> None:
    length, *sizes = case
    q, k, v = make_heads(length)
    table = torch.randn(3, length, length, dtype=torch.float64, requires_grad=True)
    bias = (lambda i, j: table[:, i, j]) if with_bias else None
    weights = torch.randn(2, 3, length, 4, dtype=torch.float64)

    out = attend(q, k, v, *sizes, scale=0.7, bias=bias)
    truth = masked_attention(q, k, v, mask_of(*case), 0.7, table if with_bias else table.detach() * 0)

    torch.testing.assert_close(out, truth, **EXACT)
    inputs = (q, k, v, table) if with_bias else (q, k, v)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    truths = torch.autograd.grad((truth * weights).sum(), inputs)
    for grad, true in zip(grads, truths, strict=True):
        torch.testing.assert_close(grad, true, **EXACT)


@each_case
def test_a_token_outside_the_visible_keys_changes_nothing(
    attend: Callable, mask_of: Callable, case: tuple[int, ...]
) -> None:
    length, *sizes = case
    q, k, v = (heads.detach() for heads in make_heads(length))
    mask = mask_of(*case)
    before = attend(q, k, v, *sizes, scale=0.5, bias=None)
    for token in {0, length // 2, length - 1}:
        key, value = k.clone(), v.clone()
        key[:, :, token], value[:, :, token] = 50.0, 1e6
        changed = (attend(q, key, value, *sizes, scale=0.5, bias=None) != before).any(-1)
        assert not changed[:, :, ~mask[:, token]].any()
        assert changed[:, :, mask[:, token]].all()


@pytest.mark.parametrize(
    ("attend", "sizes"), [(window_attention, (3, 1)), (slide_attention, (3,)), (neighborhood_attention, (4,))]
)
def test_gradcheck(attend: Callable, sizes: tuple[int, ...]) -> None:
    q, k, v = (heads[:1, :1, :, :2].detach().requires_grad_() for heads in make_heads(7))
    table = torch.randn(1, 13, dtype=torch.float64, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attend(q, k, v, *sizes, scale=0.9, bias=lambda i, j: table[:, j - i + 6])

    assert torch.autograd.gradcheck(run, (q, k, v, table))


@pytest.mark.parametrize(
    ("attend", "sizes"), [(window_attention, (16, 8)), (slide_attention, (9,)), (neighborhood_attention, (9,))]
)
def test_strides_batches_and_precisions(attend: Callable, sizes: tuple[int, ...]) -> None:
    packed = torch.randn(2, 53, 3, 2, 4, dtype=torch.float64)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    wide = attend(q, k, v, *sizes, scale=0.5, bias=None)
    copied = attend(q.contiguous(), k.contiguous(), v.contiguous(), *sizes, scale=0.5, bias=None)
    torch.testing.assert_close(wide, copied, **EXACT)

    assert attend(q[:0], k[:0], v[:0], *sizes, scale=0.5, bias=None).shape == (0, 2, 53, 4)
    low = [heads.bfloat16() for heads in (q, k, v)]
    exact = attend(*(heads.double() for heads in low), *sizes, scale=0.5, bias=None)
    out = attend(*low, *sizes, scale=0.5, bias=None)
    assert out.dtype == torch.bfloat16
    # Everything but the rounding of the result is in fp32: half a unit in the last of 8 bits.
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


def test_no_square_of_the_length_is_ever_made() -> None:
    length = 2**14
    q, k, v = (torch.randn(1, 1, length, 2) for _ in range(3))
    for attend, sizes in ((window_attention, (49, 24)), (slide_attention, (49,)), (neighborhood_attention, (49,))):
        with LargestTensor() as seen:
            attend(q, k, v, *sizes, scale=1.0, bias=None)
        # A band's block of 49 queries reads 97 keys.
        assert 48 * length <= seen.elements <= 97 * (length + 49), attend.__name__


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result
