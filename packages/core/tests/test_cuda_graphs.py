"""Captured forwards: what is refused, when a graph is reused, and on a GPU that a replay is the module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vitreous_core import cuda_graphs
from vitreous_core.cuda_graphs import GraphedModule


class Doubled(nn.Module):
    """A pair of results, from two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": self.linear(x) + y, "first": 2 * x}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes captured; a stand-in for the device's graphs runs the module again on the memory of the capture."""
    seen: list[tuple[int, ...]] = []

    def capture(module: nn.Module, inputs: tuple[Tensor, ...]) -> cuda_graphs._Graph:
        seen.append(tuple(inputs[0].shape))
        places = tuple(tensor.clone() for tensor in inputs)
        outputs = module(*places)

        def play() -> None:
            for old, new in zip(outputs.values(), module(*places).values(), strict=True):
                old.detach().copy_(new)

        return cuda_graphs._Graph(play, places, outputs)

    monkeypatch.setattr(cuda_graphs, "_capture", capture)
    monkeypatch.setattr(cuda_graphs, "unsupported_reasons", lambda module, inputs: [])
    return seen


@torch.no_grad()
def test_one_capture_for_each_kind_and_the_oldest_goes(captures: list[tuple[int, ...]]) -> None:
    module = Doubled().eval()
    graphed = GraphedModule(module, max_graphs=2)
    first, other = torch.randn(3, 4), torch.randn(3, 4)
    got = graphed(first, other)
    torch.testing.assert_close(got, module(first, other), rtol=0, atol=0)
    again = graphed(other, first)
    torch.testing.assert_close(again, module(other, first), rtol=0, atol=0)
    torch.testing.assert_close(got, module(first, other), rtol=0, atol=0)  # the caller's own memory
    assert captures == [(3, 4)]
    graphed(first.double().float().T.contiguous().T, other)  # other strides
    assert captures == [(3, 4)] * 2
    graphed(first, other)
    graphed(first[:2], other[:2])
    graphed(first, other)
    assert captures == [(3, 4), (3, 4), (2, 4)]
    graphed(first.T.contiguous().T, other)
    assert captures == [(3, 4), (3, 4), (2, 4), (3, 4)]
    assert len(graphed) == 2


@torch.no_grad()
def test_weights_that_move_are_captured_anew(captures: list[tuple[int, ...]]) -> None:
    module = Doubled().eval()
    graphed, x = GraphedModule(module), torch.randn(2, 4)
    graphed(x, x)
    module.linear.weight.mul_(2)
    torch.testing.assert_close(graphed(x, x), module(x, x))
    assert len(captures) == 1
    module.double()
    x = x.double()
    torch.testing.assert_close(graphed(x, x), module(x, x))
    assert (len(captures), len(graphed)) == (2, 1)
    graphed.reset()
    assert len(graphed) == 0


@pytest.mark.compile
@torch.no_grad()
def test_a_compiled_module_compiles_once_for_each_kind(captures: list[tuple[int, ...]]) -> None:
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    module, plain = Doubled().eval(), Doubled().eval()
    plain.load_state_dict(module.state_dict())
    module.compile(backend=backend, dynamic=False)
    graphed = GraphedModule(module)
    for x in (torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 4)):
        torch.testing.assert_close(graphed(x, x), plain(x, x))
    assert len(compiled) == len(captures) == 2


def test_refuses_with_every_reason() -> None:
    graphed = GraphedModule(Doubled())
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"training mode; call eval.*requires gradients.*CUDA device; got cpu"):
        graphed(x, x)
    with torch.device("meta"):
        module = Doubled().eval()
    with pytest.raises(RuntimeError, match="on one device; got cpu, meta"):
        GraphedModule(module)(x.detach(), x.detach())
    with pytest.raises(RuntimeError, match="no input"):
        GraphedModule(module)()
    with pytest.raises(ValueError, match="max_graphs must be at least 1; got 0"):
        GraphedModule(module, 0)


def test_gradients_are_refused_to_a_known_kind_too(captures: list[tuple[int, ...]]) -> None:
    graphed, x = GraphedModule(Doubled().eval()), torch.randn(2, 4)
    with torch.no_grad():
        graphed(x, x)
    with pytest.raises(RuntimeError, match="requires gradients"):
        graphed(x, x.clone().requires_grad_())


@pytest.mark.gpu
def test_a_replay_is_the_module() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)).cuda().eval()
    graphed = GraphedModule(module, max_graphs=2)
    batches = [torch.randn(size, 3, 16, 16, device="cuda") for size in (1, 4, 1, 4, 2)]
    with torch.inference_mode():
        graphed(batches[0])
    with torch.no_grad():
        results = [graphed(images) for images in batches]
        for images, result in zip(batches, results, strict=True):
            torch.testing.assert_close(result, module(images))
        module[0].weight.mul_(-1)
        torch.testing.assert_close(graphed(batches[4]), module(batches[4]))
        module.half()
        torch.testing.assert_close(graphed(batches[0].half()), module(batches[0].half()))
        module.float()
        plain = graphed(batches[0])
        with torch.autocast("cuda", torch.bfloat16):
            assert graphed(batches[0]).dtype != plain.dtype
            torch.testing.assert_close(graphed(batches[0]), module(batches[0]))
    assert len(graphed) == 2  # one for each precision


@pytest.mark.gpu
@pytest.mark.compile
def test_a_replay_of_a_compiled_module_is_the_module() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 5, 1)).cuda().eval()
    plain = copy.deepcopy(module)
    module.compile(dynamic=False)
    graphed = GraphedModule(module)
    batches = [torch.randn(size, 3, 16, 16, device="cuda") for size in (4, 2, 4)]
    with torch.inference_mode():
        results = [graphed(images) for images in batches]
        for images, result in zip(batches, results, strict=True):
            torch.testing.assert_close(result, plain(images))
        module[0].weight.mul_(-1)
        assert not torch.allclose(graphed(batches[0]), results[0])
    assert len(graphed) == 2


@pytest.mark.gpu
@pytest.mark.compile
def test_training_steps_are_replayed_without_a_skip() -> None:
    """What `vitreous train --compile reduce-overhead` and the benchmark's training steps rely on."""
    from torch._dynamo.utils import counters

    def train(module: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        generator = torch.Generator("cuda").manual_seed(0)
        losses = []
        for _ in range(6):
            with torch.autocast("cuda", torch.bfloat16):
                loss = module(torch.randn(4, 3, 16, 16, generator=generator, device="cuda")).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 5, 1)).cuda()
    plain = copy.deepcopy(module)
    counters.clear()
    module.compile(dynamic=False, mode="reduce-overhead")
    # bfloat16 rounds the two ways at other places.
    assert train(module) == pytest.approx(train(plain), rel=0.05)
    assert counters["inductor"]["cudagraph_skips"] == 0
