"""Recomputing a block in the backward pass changes no result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vitreous_core.recompute import recompute


class Block(nn.Sequential):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_draws_and_statistics_are_the_same(training: bool) -> None:
    torch.manual_seed(0)
    plain = Block(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU()).train(training)
    again = copy.deepcopy(plain)
    x = torch.randn(5, 3, 6, 6)
    results = []
    for block, run in ((plain, plain), (again, lambda x: recompute(again, x))):
        torch.manual_seed(1)
        image = x.clone().requires_grad_()
        y = run(image)
        y.square().sum().backward()
        results.append([y, image.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (plain.calls, again.calls) == (1, 2)
    assert again[1].track_running_stats


@pytest.mark.compile
def test_in_one_compiled_graph() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    again = copy.deepcopy(plain)
    x = torch.randn(5, 3, 6, 6)
    plain(x).square().sum().backward()
    torch.compile(lambda x: recompute(again, x), backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(plain.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(a, b)
