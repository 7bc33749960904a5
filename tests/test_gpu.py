"""Every paper on a GPU: its digits model gives the CPU's answers there and trains in mixed precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitreous_core.zoo import models

pytestmark = pytest.mark.gpu
DIGITS = [card for card in models() if card.is_digits]
IMAGES = 16


def batch_for(card: Any) -> torch.Tensor:
    """Random images of the size that the config's pipeline resizes to."""
    from mmengine.config import Config

    pipeline = Config.fromfile(card.config).test_dataloader.dataset.pipeline
    side = next(step["scale"] for step in pipeline if step["type"] == "Resize")
    return torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=DIGITS, ids=lambda card: card.name)
def card(request: pytest.FixtureRequest) -> Any:
    request.param.paper.module("mm")
    torch.manual_seed(0)
    return request.param


def test_fp32_logits_are_the_cpus(card: Any) -> None:
    from mmpretrain import get_model

    model = get_model(card.name).eval()
    images = batch_for(card)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32, cudnn = False, torch.backends.cudnn.allow_tf32
    try:
        with torch.no_grad():
            expected = model.double()(images.double())
            model = model.float()
            baseline = model(images)
            found = model.cuda()(images.cuda()).cpu()
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn
    # The CPU's own fp32 error is the measure; four of it covers another order of summation.
    budget = 4 * (baseline - expected).abs().max() + 1e-6 * expected.abs().max()
    assert (found - expected).abs().max() <= budget


def test_training_steps_in_bf16_are_finite_and_move_what_moves_on_the_cpu(card: Any) -> None:
    still_on_cpu = unmoved_by_two_steps(card, "cpu", torch.float32)
    assert unmoved_by_two_steps(card, "cuda", torch.bfloat16) == still_on_cpu
    # On a map of one token softmax is constant: its bias table alone gets no gradient, anywhere.
    assert all(name.endswith(("rpb", "relative_position_bias_table")) for name in still_on_cpu)


def unmoved_by_two_steps(card: Any, device: str, dtype: torch.dtype) -> list[str]:
    """Parameters that two optimizer steps leave as they were (a zero-initialised scale hides others from one)."""
    from mmpretrain import get_model

    torch.manual_seed(0)
    model = get_model(card.name).to(device).train()
    images, labels = batch_for(card).to(device), torch.arange(IMAGES, device=device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            scores = model(images)
        scores = scores if isinstance(scores, tuple) else (scores,)
        loss = sum(torch.nn.functional.cross_entropy(score.float(), labels) for score in scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    return [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
