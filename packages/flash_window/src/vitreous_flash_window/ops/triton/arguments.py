"""Host-side arguments that the launchers share."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vitreous_core.ops.block_sparse_attention.dropout import threshold

NO_ADDEND, NUMBERS, FLAGS = 0, 1, 2
"""As in `tile_math`, which is not imported here so that this module needs no Triton."""

_ALIGNMENTS = (8, 4, 2)


def stride_alignment(*strides: int) -> int:
    """Largest of 8, 4, 2, 1 that divides all strides.

    Triton knows of an integer only whether 16 divides it. Kernels take strides over this number, a constant at
    compile time, and multiply: rows of 24 or 40 elements are then read 16 bytes at a time too.
    """
    return next((number for number in _ALIGNMENTS if all(stride % number == 0 for stride in strides)), 1)


def outer_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of all dimensions but the last; 0 where there is one entry, whose stride may be any number."""
    first, second, third, _ = tensor.shape
    strides = tensor.stride()
    return (
        strides[0] if first > 1 else 0,
        strides[1] if second > 1 else 0,
        strides[2] if third > 1 else 0,
    )


def aligned_strides(*tensors: Tensor) -> tuple[int, list[list[int]]]:
    """Common factor of all strides but the last of each tensor, and each one's strides, those over it."""
    outer = [outer_strides(tensor) for tensor in tensors]
    align = stride_alignment(*(stride for strides in outer for stride in strides))
    return align, [
        [*(stride // align for stride in strides), tensor.stride(3)]
        for strides, tensor in zip(outer, tensors, strict=True)
    ]


def addend_strides(bias: Tensor | None, mask: Tensor | None) -> list[int]:
    """Strides of both, zeros where there is none."""
    return [stride for addend in (bias, mask) for stride in ((0, 0, 0) if addend is None else addend.stride())]


def addend_kind(addend: Tensor | None) -> int:
    """How kernels read a bias or mask."""
    if addend is None:
        return NO_ADDEND
    return FLAGS if addend.dtype == torch.bool else NUMBERS


def addend_pointer(addend: Tensor | None) -> Tensor | None:
    """The tensor as kernels take it: flags as bytes."""
    return addend.view(torch.uint8) if addend is not None and addend.dtype == torch.bool else addend


def padded_head_dim(head_dim: int) -> int:
    """Matrix tiles are powers of two, at least 16 wide."""
    return max(16, 1 << (head_dim - 1).bit_length())


def rows_of_statistics(dtype: torch.dtype) -> int:
    """How many numbers the forward pass keeps of a row of scores: two of fp32 inputs, else one.

    They are its maximum and the inverse sum of `exp2(score - maximum)`, so that the backward pass computes the very
    weights of the forward pass; or the base-2 log-sum-exp, which is rounded at its own size: all weights of a row are
    off by a common factor, below the digits of half precision but several times those of fp32.
    """
    return 2 if dtype == torch.float32 else 1


def new_statistics(like: Tensor, *rows: int) -> Tensor:
    """Room for the statistics `[1 or 2, *rows]` of inputs like this one, fp32."""
    return like.new_empty((rows_of_statistics(like.dtype), *rows), dtype=torch.float32)


def split_statistics(statistics: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is to be subtracted from the scores, and what their `exp2` is to be multiplied by, if by anything.

    The former is +inf for a row that sees nothing, so that all its weights are zero.
    """
    first, *second = statistics
    return first, second[0] if second else None


@lru_cache
def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """Random words below the first number are dropped; the second scales what is kept."""
    return threshold(dropout_p), 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products follow `torch.set_float32_matmul_precision`; half precision has only one way."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"
