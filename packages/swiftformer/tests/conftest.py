"""Builders shared by SwiftFormer's tests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from vitreous_core.testing.golden import golden_state
from vitreous_swiftformer import SwiftFormer, SwiftFormerHead
from vitreous_swiftformer.convert import from_official, to_official

Build = Callable[..., nn.Sequential]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def build() -> Build:
    """`build(arch, distillation=True, num_classes=1000, **backbone)`: `backbone` and `head`, golden weights, eval."""

    def make(
        arch: str | Mapping[str, Any], distillation: bool = True, num_classes: int = 1000, **backbone: Any
    ) -> nn.Sequential:
        body = SwiftFormer(arch, **backbone)
        head = SwiftFormerHead(num_classes, body.channels[-1], distillation)
        model = nn.Sequential(OrderedDict(backbone=body, head=head))
        model.load_state_dict(from_official(golden_state(to_official(model.state_dict()))))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """An architecture small enough for fp64 and for exhaustive checks, with every kind of layer."""
    return {"channels": (8, 12, 16), "depths": (2, 1, 2), "mlp_ratio": 2}
