"""The attentions that the paper compares with: formulas, gradients, what the switch changes, and the configs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitreous_swiftformer.mm  # noqa: F401  (first: it repairs MMEngine)

# isort: split
from mmengine.config import Config
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from vitreous_core.deploy import switch_to_deploy
from vitreous_core.errors import BackendUnsupported
from vitreous_core.testing.golden import golden_input, golden_state
from vitreous_core.zoo import find_model
from vitreous_swiftformer import EfficientAdditiveAttention, SwiftFormer
from vitreous_swiftformer.ablations import KeyValueAdditiveAttention, SelfAttention

Build = Callable[..., nn.Sequential]

BASE = "swiftformer-xs_1xb128_fashion-mnist"
CHANGES = {"key-value": "additive_kv", "self-attention": "self"}
NAMES = [BASE, *(BASE.replace("xs_", f"xs-{ablation}_") for ablation in CHANGES)]


def config(name: str) -> Config:
    return Config.fromfile(find_model(name).config)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def weighted(attention: nn.Module) -> nn.Module:
    attention.load_state_dict(golden_state(attention.state_dict()))
    return attention.double()


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def test_key_value_interaction_by_loops() -> None:
    dim, length = 6, 5
    attention = weighted(KeyValueAdditiveAttention(dim))
    (x,) = tokens(1, length, dim)
    query = [attention.to_query(token) for token in x]
    key = [attention.to_key(token) for token in x]
    query = [q / q.norm() for q in query]
    key = [k / k.norm() for k in key]
    a = torch.stack([q @ attention.w_g[:, 0] for q in query])
    a = a / a.norm()
    global_query = sum(a[n] * query[n] for n in range(length))
    product = [global_query * k for k in key]
    b = torch.stack([p @ attention.w_k[:, 0] for p in product])
    b = b / b.norm()
    global_key = sum(b[n] * product[n] for n in range(length))
    expected = [
        attention.final(attention.Proj(global_key * attention.to_value(x[n])) + query[n]) for n in range(length)
    ]
    # Measured 2e-16.
    assert (attention(x[None])[0] - torch.stack(expected)).abs().max() < 1e-14


@torch.no_grad()
def test_without_its_interaction_it_is_efficient_additive_attention() -> None:
    """With the product of global query and keys in the place of that of global key and values."""
    interacting, plain = KeyValueAdditiveAttention(6).double(), EfficientAdditiveAttention(6).double()
    state = golden_state(interacting.state_dict())
    interacting.load_state_dict(state)
    plain.load_state_dict({name: value for name, value in state.items() if "value" not in name and name != "w_k"})
    x = tokens(2, 7, 6)
    mixed: list[Tensor] = []
    plain.Proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    expected = plain(x)
    interacting.Proj.register_forward_pre_hook(lambda *_: (mixed[0],))
    assert torch.equal(interacting(x), expected)


@pytest.mark.parametrize(("dim", "heads"), [(16, 1), (64, 2), (112, 2), (220, 5), (384, 12)])
@torch.no_grad()
def test_self_attention_is_pytorchs(dim: int, heads: int) -> None:
    attention = weighted(SelfAttention(dim))
    x = tokens(2, 9, dim)
    assert attention.num_heads == heads
    split = [layer(x).view(2, 9, heads, -1).transpose(1, 2) for layer in
             (attention.to_query, attention.to_key, attention.to_value)]  # fmt: skip
    expected = attention.final(F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(2, 9, dim))
    # Measured 2e-15, for values of size 3.
    assert (attention(x) - expected).abs().max() < 1e-13


@pytest.mark.parametrize("kind", [KeyValueAdditiveAttention, SelfAttention])
def test_gradients_and_tokens(kind: Callable[[int], nn.Module]) -> None:
    attention = weighted(kind(6))
    names, values = zip(*attention.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(attention, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (tokens(2, 3, 6).requires_grad_(), *values))
    x, order = tokens(3, 7, 6), torch.randperm(7)
    assert torch.allclose(attention(x[:, order]), attention(x)[:, order], atol=1e-13)
    assert torch.allclose(attention(x[1:2]), attention(x)[1:2], atol=1e-13)
    assert attention(x[:0]).shape == (0, 7, 6)
    with pytest.raises(ValueError, match=r"x must be tokens \[B, L, 6\]; got \(2, 3, 5\)"):
        attention(tokens(2, 3, 5))
    with pytest.raises(ValueError, match="dim must be positive; got 0"):
        kind(0)


def test_parameters() -> None:
    linear = 24 * 24 + 24
    assert parameters(EfficientAdditiveAttention(24)) == 4 * linear + 24
    assert parameters(SelfAttention(24)) == 4 * linear
    assert parameters(KeyValueAdditiveAttention(24)) == 5 * linear + 2 * 24


@pytest.mark.parametrize("attention", ["additive_kv", "self"])
class TestBackbone:
    def test_nothing_but_the_attention_differs(self, tiny: dict[str, Any], attention: str) -> None:
        def others(model: nn.Module) -> dict[str, torch.Size]:
            return {name: value.shape for name, value in model.state_dict().items() if ".attn." not in name}

        changed = SwiftFormer(tiny, attention=attention)
        assert others(changed) == others(SwiftFormer(tiny))
        kinds = {type(module) for module in changed.modules()}
        assert EfficientAdditiveAttention not in kinds
        assert {KeyValueAdditiveAttention, SelfAttention} & kinds

    def test_every_parameter_learns_and_deploy_is_exact(
        self, build: Build, tiny: dict[str, Any], attention: str
    ) -> None:
        model = build(tiny, distillation=False, num_classes=10, attention=attention)
        learner = copy.deepcopy(model).train()
        learner(golden_input(4, 64, 48)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.parameters())
        model, images = model.double(), golden_input(2, 37, 52).double()
        with torch.no_grad():
            expected = model(images)
            assert switch_to_deploy(model)
            assert (model(images) - expected).abs().max() < 1e-9  # as for the paper's networks


def test_default_is_additive_attention(tiny: dict[str, Any]) -> None:
    torch.manual_seed(0)
    first = SwiftFormer(tiny).state_dict()
    torch.manual_seed(0)
    second = SwiftFormer(tiny, attention="additive").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_bad_attention(tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attention must be one of 'additive', 'additive_kv', 'self'; got 'softmax'"):
        SwiftFormer(tiny, attention="softmax")  # type: ignore[arg-type]
    with pytest.raises(BackendUnsupported, match="attention='self' has no kernel"):
        SwiftFormer(tiny, attention="self", backend="triton")


@pytest.mark.parametrize("ablation", CHANGES)
def test_configs_differ_from_the_base_in_their_attention(ablation: str) -> None:
    expected = config(BASE).to_dict()
    expected["model"]["backbone"]["attention"] = CHANGES[ablation]
    assert config(BASE.replace("xs_", f"xs-{ablation}_")).to_dict() == expected


@pytest.mark.parametrize("name", NAMES)
def test_configs_train_and_cost_what_the_metafile_says(name: str) -> None:
    model = MODELS.build(config(name).model).train()
    samples = [DataSample().set_gt_label(label) for label in (0, 9)]
    model.loss(golden_input(2, 56, 56), samples)["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert model.eval()(torch.zeros(1, 3, 56, 56)).shape == (1, 10)
    # As in the other entries, without the weighted sums of queries, and here of keys.
    sums = {"self": 0, "additive_kv": 2}.get(config(name).model.backbone.get("attention"), 1)
    uncounted = sum(side**2 * channels for side, channels in zip((14, 7, 4), (32, 64, 128), strict=True))
    assert counter.get_total_flops() // 2 - sums * uncounted == find_model(name).macs
    assert parameters(model) == find_model(name).parameters


def test_budget() -> None:
    settings = config(BASE)
    assert settings.train_cfg.max_epochs == 1
    for loader, split in (("train", "train"), ("val", "test"), ("test", "test")):
        dataset = settings[f"{loader}_dataloader"].dataset
        assert (dataset.type, dataset.split) == ("GzippedFashionMNIST", split)
        assert dataset.pipeline[-2].scale == 56
