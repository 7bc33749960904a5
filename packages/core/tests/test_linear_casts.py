"""Linear layers cast together: bitwise what autocast gives, whatever training does around them.

On a CPU with the question for the device answered otherwise; on a GPU as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vitreous_core import linear_casts
from vitreous_core.gelu_linear import gelu_linear
from vitreous_core.linear_casts import apply_linear, cast_linears

LOW = [torch.float16, torch.bfloat16]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_casts, "_DEVICE", "cpu")


class Block(nn.Module):
    """Three linear layers, one without a bias, whose weights are cast together or by autocast."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fc1, self.fc2 = nn.Linear(16, 24, bias=False), nn.Linear(24, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor, together: bool) -> Tensor:
        casts = cast_linears(self.first, self.fc1, self.fc2) if together else None
        assert (casts is not None) == together
        hidden = apply_linear(apply_linear(x, self.first, casts), self.fc1, casts)
        return x + gelu_linear(hidden, self.fc2, casts=casts)


def step(block: Block, x: Tensor, together: bool, dtype: torch.dtype = torch.bfloat16, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype):
        out = (
            checkpoint(block, leaf, together, use_reentrant=False)
            if options.get("recomputed")
            else block(leaf, together)
        )
    out.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in block.parameters())
    return [out, leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


def assert_bitwise(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@contextmanager
def operations() -> Iterator[Counter[str]]:
    """How often each operation runs."""
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[func.__name__.split(".")[0]] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        yield counts


@pytest.mark.usefixtures("on_cpu")
class TestPlumbing:
    @pytest.mark.parametrize("dtype", LOW, ids=["fp16", "bf16"])
    def test_bitwise_autocasts_results(self, dtype: torch.dtype) -> None:
        block, x = Block(), torch.randn(5, 16)
        assert_bitwise(step(block, x, True, dtype), step(block, x, False, dtype))
        assert_bitwise(step(block, x, True, dtype, recomputed=True), step(block, x, False, dtype))

    def test_one_cast_each_way(self) -> None:
        block, x = Block(), torch.randn(5, 16)
        with operations() as counts:
            step(block, x, True)
        assert counts["_foreach_copy_"] == 2
        with operations() as apart:
            step(block, x, False)
        # What remains is the input's, and the output's to fp32.
        assert counts["_to_copy"] == apart["_to_copy"] - 2 * 5

    @pytest.mark.parametrize("frozen", [["fc1.weight"], ["fc2.bias", "first.weight"], ["first.weight", "fc1", "fc2"]])
    def test_frozen_parameters_cost_no_gradient(self, frozen: list[str]) -> None:
        block, x = Block(), torch.randn(5, 16)
        for name in frozen:
            module, _, parameter = name.partition(".")
            target = block.get_submodule(module)
            (getattr(target, parameter) if parameter else target).requires_grad_(False)
        with operations() as counts:
            together = step(block, x, True)
        with operations() as apart_counts:
            apart = step(block, x, False)
        assert_bitwise(together, apart)
        assert counts["mm"] == apart_counts["mm"]

    def test_without_gradients(self) -> None:
        block, x = Block(), torch.randn(5, 16)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(block(x, True), block(x, False))
        assert_bitwise(step(block, x, True), step(block, x, False))

    def test_gradients_accumulate_and_parameters_change(self) -> None:
        blocks = [Block(), copy.deepcopy(Block())]
        for block, together in zip(blocks, (True, False), strict=True):
            optimizer = torch.optim.SGD(block.parameters(), 0.1)
            for seed in range(4):
                x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
                with torch.autocast("cpu", torch.bfloat16):
                    loss = block(x, together).float().square().mean()
                loss.backward()
                if seed % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            block.fc1.weight.data.mul_(0.5)
        x = torch.randn(3, 16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(blocks[0](x, True), blocks[1](x, False))

    def test_a_layer_that_is_not_used_gets_no_gradient(self) -> None:
        used, unused = nn.Linear(4, 4), nn.Linear(4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            casts = cast_linears(used, unused)
            apply_linear(torch.randn(2, 4), used, casts).sum().backward()
        assert used.weight.grad is not None
        assert unused.weight.grad is None

    def test_layers_that_do_more_are_called(self) -> None:
        class Adapted(nn.Linear):
            pass

        hooked, replaced, compiled = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        hooked.register_forward_hook(lambda module, inputs, output: -output)
        replaced.forward = lambda x: -F.linear(x, replaced.weight)
        compiled.compile(backend="eager")
        subclassed = nn.Linear(4, 4)
        subclassed.weight = type("Sharded", (nn.Parameter,), {})(torch.randn(4, 4))
        gathered = nn.Linear(4, 4)
        gathered.weight.data = torch.empty(0)
        others = [
            hooked, replaced, compiled, subclassed, gathered, Adapted(4, 4), nn.Identity(),
            parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4).double(), nn.Linear(4, 4).bfloat16(),
        ]  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            assert cast_linears(*others) is None
            plain, x = nn.Linear(4, 4), torch.randn(2, 4)
            casts = cast_linears(*others, plain)
            assert casts is not None
            assert set(casts) == {plain}
            assert torch.equal(apply_linear(x, hooked, casts), hooked(x))

    def test_nothing_is_cast_where_it_would_not_pay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = nn.Linear(4, 4)
        assert cast_linears(layer) is None
        seen = []
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(lambda x: (seen.append(cast_linears(layer)), x)[1], backend="eager")(torch.zeros(1))
            torch.jit.trace(lambda x: (seen.append(cast_linears(layer)), x + 1)[1], torch.zeros(1), check_trace=False)
            monkeypatch.undo()
            seen.append(cast_linears(layer))
        assert seen == [None, None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=["fp16", "bf16"])
def test_bitwise_autocasts_results_on_a_gpu(dtype: torch.dtype) -> None:
    block, x = Block().cuda(), torch.randn(5, 16, device="cuda")
    plain = step(block, x, False, dtype)
    with operations() as counts:
        assert_bitwise(step(block, x, True, dtype), plain)
    assert counts["_foreach_copy_"] == 2
    assert_bitwise(step(block, x, True, dtype, recomputed=True), plain)
