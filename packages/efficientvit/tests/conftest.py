"""Builders shared by EfficientViT's tests."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vitreous_core.testing.golden import golden_state
from vitreous_efficientvit import EfficientViTMSRA, EfficientViTMSRAHead
from vitreous_efficientvit.convert import from_official, to_official

Build = Callable[..., nn.Sequential]


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def build() -> Build:
    """`build(arch, distillation=False, golden=True, num_classes=1000, **backbone)`: `backbone` and `head`."""

    def make(
        arch: str | dict[str, Any],
        distillation: bool = False,
        golden: bool = True,
        num_classes: int = 1000,
        **backbone: Any,
    ) -> nn.Sequential:
        torch.manual_seed(0)
        body = EfficientViTMSRA(arch, **backbone)
        head = EfficientViTMSRAHead(num_classes, body.channels[-1], distillation=distillation)
        model = nn.Sequential(OrderedDict(backbone=body, head=head))
        if golden:
            model.load_state_dict(from_official(golden_state(to_official(model.state_dict()))))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """An architecture small enough for fp64 and for exhaustive checks, with every kind of layer."""
    return {
        "channels": (16, 24, 32),
        "depths": (1, 2, 1),
        "num_heads": (2, 3, 2),
        "kernel_sizes": (5, 3, 3),
        "window_size": 3,
        "key_dim": 4,
    }
