"""1x1 convolutions as matrix products: when, that they are as exact, compiled and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitreous_core.deploy import switch_to_deploy
from vitreous_core.testing.budget import assert_within_budget
from vitreous_swiftformer.pointwise import PointwiseConv2d

HALF, BRAIN = torch.float16, torch.bfloat16
Build = Callable[..., nn.Sequential]


def operations(module: nn.Module, x: Tensor) -> set[str]:
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def draw(*shape: int, dtype: torch.dtype = HALF, last: bool = True) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@torch.no_grad()
def test_a_product_is_as_exact_as_the_convolution(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(40, 24, 1).to(dtype).to(memory_format=torch.channels_last)
    pointwise, x = PointwiseConv2d.from_conv(conv), draw(3, 40, 5, 7, dtype=dtype)
    assert pointwise.weight is conv.weight
    assert pointwise.state_dict().keys() == conv.state_dict().keys()
    actual = pointwise(x)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    truth = copy.deepcopy(conv).double()(x.double())
    assert_within_budget({"out": actual}, {"out": truth}, {"out": conv(x)})
    assert pointwise(x[:0]).shape == (0, 24, 5, 7)


def test_only_where_maps_are_channels_last_in_half_precision() -> None:
    pointwise = PointwiseConv2d(8, 6).eval().requires_grad_(False)
    half = copy.deepcopy(pointwise).half()
    convolution, product = {"aten.conv2d.default"}, "aten.linear.default"
    assert operations(half, draw(2, 8, 3, 4, last=False)) == convolution
    assert operations(half, draw(2, 8, 1, 1)) == convolution
    assert operations(pointwise, draw(2, 8, 3, 4, dtype=torch.float32)) == convolution
    assert product in operations(half, draw(2, 8, 3, 4))


@pytest.mark.compile
@torch.no_grad()
def test_a_network_in_deploy_mode(build: Build, tiny: dict[str, Any]) -> None:
    model = build(tiny, num_classes=10).to(HALF)
    switch_to_deploy(model)
    images = draw(2, 3, 40, 24)
    exact = copy.deepcopy(model).double()(images.double())
    convolved = model(images.contiguous())
    model.to(memory_format=torch.channels_last)
    products: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, PointwiseConv2d):
            module.register_forward_hook(lambda module, inputs, output: products.append(output))
    actual = model(images)
    assert_within_budget({"logits": actual}, {"logits": exact}, {"logits": convolved})
    # Two of each block, and four more of an attention block; all of them on maps of more than one position.
    assert len(products) == 2 * 5 + 4 * 3
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in products)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images), actual)
