"""Builders shared by Flash Window Attention's tests."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """`draw(*shape, dtype=torch.float64, grad=False, scale=1.0)`: normal values, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_(grad)

    return make


@pytest.fixture(scope="session")
def fill() -> Callable[[nn.Module], nn.Module]:
    """Give every parameter a value large enough that a mistake in its use shows."""

    def make(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in module.named_parameters():
            values = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("logit_scale"):
                values += 4.0  # some heads below and some above the clamp at log(100)
                values *= 1.0 + torch.arange(len(values)).view(-1, 1, 1) * 0.2
            elif "norm" in name and name.endswith("weight"):
                values += 1.0
            parameter.data.copy_(values)
        return module

    return make
