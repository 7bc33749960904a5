"""The place of the Triton kernels; this release refuses `backend="triton"`."""

from __future__ import annotations

import torch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reasons(device_type: str, dtype: torch.dtype) -> list[str]:
    """Every reason why the kernels cannot run; never empty in this release."""
    reasons = ["the Triton kernels of window attention are not built in this release"]
    if device_type != "cuda":
        reasons.append(f"tensors must be on a CUDA device; got {device_type!r}")
    if dtype not in _DTYPES:
        reasons.append(f"dtype must be float16, bfloat16 or float32; got {dtype}")
    return reasons
