"""Compiling the kernels of a pass: what is new, together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from vitreous_core.kernel_launch import Launch
from vitreous_core.ops.block_sparse_attention.triton import configs, launches


@pytest.fixture(autouse=True)
def _no_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need a kernel that was really compiled."""
    monkeypatch.setattr(launches, "_build_launcher", lambda kernel: None)


class Recorder:
    """Stands for a compiled function and writes down what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def warmup(self, *arguments: Any, **settings: Any) -> None:
        self.log.append(f"{self.name} {settings['BLOCK']}")


class Pointer:
    """Stands for a tensor on a GPU."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device, self.is_cuda = dtype, torch.device(device), device != "cpu"


def compile_new(*launched: tuple[Recorder, int], dtype: torch.dtype = torch.float16, device: str = "cuda:0") -> None:
    launches.compile_new([
        (
            Launch(kernel, (1,), ("x",), (3,), {"BLOCK": block, "num_warps": 4, "num_stages": 2}),
            (Pointer(dtype, device),),  # type: ignore[arg-type]
        )
        for kernel, block in launched
    ])  # fmt: skip


def test_new_kernels_compile_together_and_only_once() -> None:
    log: list[str] = []
    pair = (Recorder("first", log), 1), (Recorder("second", log), 2)
    compile_new(*pair)
    assert log == ["first 1", "second 2"]
    compile_new(*pair)
    assert log == ["first 1", "second 2"]
    log.clear()
    for change in ({"dtype": torch.float32}, {"device": "cuda:1"}):
        compile_new(*pair, **change)  # type: ignore[arg-type]
    assert log == 2 * ["first 1", "second 2"]


def test_a_lone_new_kernel_compiles_at_its_launch() -> None:
    log: list[str] = []
    kernel = Recorder("only", log)
    compile_new((kernel, 1))
    compile_new((kernel, 1), (kernel, 2))
    assert log == []


def test_the_interpreter_compiles_nothing() -> None:
    log: list[str] = []
    compile_new((Recorder("a", log), 1), (Recorder("b", log), 1), device="cpu")
    assert log == []


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_a_precision_changes_no_rows(head_dim: int) -> None:
    """Tables are cut by rows before the precision is known."""
    tile = configs.Tile(64, 64, 4, 1)
    light = configs.for_precision(tile, head_dim, "ieee")
    assert light.rows == tile.rows
    # Multiply-adds per thread of one product.
    assert light.rows * light.columns * head_dim / (32 * light.warps) <= 64 * 32 * 256 / 512
    assert configs.for_precision(tile, head_dim, "tf32") == tile
