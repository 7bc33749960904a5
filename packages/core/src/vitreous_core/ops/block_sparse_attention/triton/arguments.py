"""Host-side arguments that the launchers share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..contracts import DENSE_BIAS, DISTANCE_BIAS, NO_BIAS, Facts
from ..dropout import threshold

_LOG2E = 1.4426950408889634


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current, as launches need; nothing to do on a CPU (the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def base2_table(bias: Tensor | None, facts: Facts) -> tuple[Tensor | None, int]:
    """The bias as the kernels read it and its stride between heads.

    A relative table becomes fp32 `[H, entries]`, contiguous and times log2(e): neighbouring offsets are then
    neighbours in memory and adding it costs one instruction. It is small. A dense bias stays as it is.
    """
    if bias is None or facts.bias == NO_BIAS:
        return None, 0
    if facts.bias == DENSE_BIAS:
        return bias.contiguous(), 0
    table = bias if facts.bias == DISTANCE_BIAS else bias.t()
    base2 = torch.empty(table.shape, dtype=torch.float32, device=bias.device)
    torch.mul(table.float(), _LOG2E, out=base2)
    return base2, base2.stride(0)


def padded_head_dim(head_dim: int) -> int:
    """Matrix tiles are powers of two, at least 16 wide."""
    return max(16, 1 << (head_dim - 1).bit_length())


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """Random words below the first number are dropped; the second scales what is kept."""
    return threshold(dropout_p), 1 / (1 - dropout_p)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products follow `torch.set_float32_matmul_precision`; half precision has only one way."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"
