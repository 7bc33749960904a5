"""Launching the kernels of a pass: what is new compiles first, all launches keep their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from vitreous_core.ops.block_sparse_attention.triton import configs, launches


@pytest.fixture(autouse=True)
def _no_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need a kernel that was really compiled."""
    monkeypatch.setattr(launches, "_build_launcher", lambda kernel: None)


class Recorder:
    """Stands for a compiled function and writes down what is asked of it."""

    arg_names = ("x_ptr", "length", "BLOCK")

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def warmup(self, *arguments: Any, **settings: Any) -> None:
        self.log.append(f"compile {self.name} {settings['BLOCK']}")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **settings: self.log.append(f"launch {self.name} {settings['BLOCK']}")


def plan(*launched: tuple[Recorder, int]) -> launches.Pass:
    return launches.Pass([
        launches.Launch(kernel, (1,), (3,), {"BLOCK": block, "num_warps": 4, "num_stages": 2})
        for kernel, block in launched
    ])  # fmt: skip


def run(planned: launches.Pass, dtype: torch.dtype = torch.float16, device: str = "cuda") -> None:
    planned.run([(torch.empty(1, dtype=dtype),)] * len(planned.launches), torch.device(device))


def test_new_kernels_compile_before_the_first_launch_and_only_once() -> None:
    log: list[str] = []
    first, second = Recorder("first", log), Recorder("second", log)
    pair = plan((first, 1), (second, 2))
    run(pair)
    assert log == ["compile first 1", "compile second 2", "launch first 1", "launch second 2"]
    for again in (pair, plan((first, 1), (second, 2))):
        log.clear()
        run(again)
        assert log == ["launch first 1", "launch second 2"]
    log.clear()
    run(plan((first, 1), (second, 3)), torch.float32)
    assert log == ["compile first 1", "compile second 3", "launch first 1", "launch second 3"]


def test_a_lone_new_kernel_compiles_at_its_launch() -> None:
    log: list[str] = []
    run(plan((Recorder("only", log), 1)))
    assert log == ["launch only 1"]


def test_the_interpreter_compiles_nothing() -> None:
    log: list[str] = []
    run(plan(*((Recorder(name, log), 1) for name in "ab")), device="cpu")
    assert log == ["launch a 1", "launch b 1"]


def test_pointers_must_be_those_of_every_launch() -> None:
    with pytest.raises(ValueError, match="shorter"):
        plan((Recorder("a", []), 1)).run([], torch.device("cpu"))


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_a_precision_changes_no_rows(head_dim: int) -> None:
    """Tables are cut by rows before the precision is known."""
    tile = configs.Tile(64, 64, 4, 1)
    light = configs.for_precision(tile, head_dim, "ieee")
    assert light.rows == tile.rows
    # Multiply-adds per thread of one product.
    assert light.rows * light.columns * head_dim / (32 * light.warps) <= 64 * 32 * 256 / 512
    assert configs.for_precision(tile, head_dim, "tf32") == tile
