"""GELU and a linear layer that keep one hidden map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vitreous_core.gelu_linear import GeluLinear, gelu_linear


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Block(nn.Module):
    """A residual block; `linear(gelu(x))` as the two layers, or as one operation."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return x + (gelu_linear(hidden, self.fc2) if self.fused else self.fc2(F.gelu(hidden)))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradients_are_those_of_the_parts(approximate: str) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = double(2, 3, 6), double(4, 6), double(4)
    expected = F.linear(F.gelu(hidden, approximate=approximate), weight, bias)
    torch.testing.assert_close(GeluLinear.apply(hidden, weight, bias, approximate), expected)
    assert torch.autograd.gradcheck(lambda *leaves: GeluLinear.apply(*leaves, approximate), (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda *leaves: GeluLinear.apply(*leaves, None, approximate), (hidden, weight))


def test_a_layer_that_does_more_is_called() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubling, listened = Doubling(6, 4), nn.Linear(6, 4)
    listened.register_forward_hook(lambda module, inputs, output: -output)
    hidden = torch.randn(3, 6)
    for linear in (doubling, listened):
        assert torch.equal(gelu_linear(hidden, linear), linear(F.gelu(hidden)))


@pytest.mark.compile
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "in-a-checkpoint"])
def test_compiled_gradients_are_the_same(recomputed: bool) -> None:
    torch.manual_seed(0)
    plain = Block(fused=False)
    fused = Block(fused=True)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(5, 16)
    plain(x).square().sum().backward()

    def run(x: Tensor) -> Tensor:
        return checkpoint(fused, x, use_reentrant=False) if recomputed else fused(x)

    torch.compile(run, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.compile
def test_a_compiled_block_keeps_one_hidden_map() -> None:
    def saved(fused: bool) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def forward_compiler(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
            (outputs,) = graph.graph.output_node().args[0:1]
            shapes.extend(tuple(node.meta["val"].shape) for node in outputs[1:] if node is not None)
            return graph

        backend = aot_autograd(
            fw_compiler=forward_compiler, bw_compiler=lambda graph, _: graph,
            partition_fn=min_cut_rematerialization_partition,
        )  # fmt: skip
        torch.compile(Block(fused), backend=backend, fullgraph=True)(torch.randn(5, 16, requires_grad=True))
        return shapes

    assert saved(fused=True).count((5, 64)) == 1
    assert saved(fused=False).count((5, 64)) == 2


@pytest.mark.gpu
def test_on_gpu_it_keeps_less_and_gives_the_same() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(384, 96).cuda()
    hidden = torch.randn(4, 50, 384, device="cuda", requires_grad=True)
    leaves, grads, kept = (hidden, linear.weight, linear.bias), [], []
    for compute in (gelu_linear, lambda h, m: m(F.gelu(h))):
        sizes: list[int] = []
        with torch.autocast("cuda", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t
        ):  # fmt: skip
            out = compute(hidden.bfloat16(), linear)
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
        kept.append(sum(sizes))
    assert kept[0] < 0.8 * kept[1]
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 2 * torch.finfo(torch.bfloat16).eps * theirs.norm()
