"""What kernels ask of the machine."""

from __future__ import annotations

import pytest
import torch

from vitreous_core import triton_support

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


def test_a_gpu_from_ampere_on_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "_read_capability", lambda index: (8, 0))
    assert triton_support.device_reasons(CUDA) == []
    monkeypatch.setattr(triton_support, "_read_capability", lambda index: (7, 5))
    assert triton_support.device_reasons(CUDA) == ["the GPU must have compute capability 8.0 or more; got 7.5"]


def test_the_processor_is_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "_is_interpreted", lambda: False)
    assert triton_support.device_reasons(CPU) == ["tensors must be on a CUDA device; got 'cpu'"]
    assert triton_support.dtype_reasons(CPU, torch.bfloat16) == []
    monkeypatch.setattr(triton_support, "_is_interpreted", lambda: True)
    assert triton_support.device_reasons(CPU) == []
    assert triton_support.dtype_reasons(CPU, torch.bfloat16) == ["Triton's interpreter computes no bfloat16 products"]
    assert triton_support.dtype_reasons(CUDA, torch.bfloat16) == []


def test_other_dtypes_and_a_missing_triton_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (reason,) = triton_support.dtype_reasons(CUDA, torch.float64)
    assert reason == "dtype must be float16, bfloat16 or float32; got torch.float64"
    monkeypatch.setattr(triton_support, "_INSTALLED", False)
    assert triton_support.device_reasons(CUDA) == ["the package triton is not installed"]
