"""The fused operators against the unfused layers in fp64, by the two-times rule: on a GPU, and in the interpreter."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitreous_core.deploy import switch_to_deploy
from vitreous_core.errors import BackendUnsupported
from vitreous_core.testing.budget import assert_within_budget
from vitreous_core.testing.golden import golden_input
from vitreous_efficientvit import CascadedGroupAttention, EfficientViTMSRA
from vitreous_efficientvit.attention import ConvBN, LocalWindowAttention
from vitreous_efficientvit.fused import FusedAttention, FusedConvolution, FusedFFN, FusedMerging, fuse
from vitreous_efficientvit.model import FFN, PatchMerging, Residual, fold
from vitreous_efficientvit.ops import (
    Operator,
    cascaded_group_attention,
    choose_backend,
    contracts,
    feed_forward,
)
from vitreous_efficientvit.ops.triton.configs import (
    attention_tile,
    convolution_tile,
    feed_forward_tile,
    split_channels,
)

Build = Callable[..., nn.Sequential]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

both_devices = pytest.mark.parametrize(
    "where", [pytest.param("interpreter", marks=pytest.mark.interpret), pytest.param("gpu", marks=pytest.mark.gpu)]
)


class Attention(NamedTuple):
    """Channels, heads, window, kernels and key channels of a layer; batch, height and width of the map; its dtype."""

    channels: int
    heads: int
    window: int
    kernels: tuple[int, ...]
    key_dim: int
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def layer(self) -> Residual:
        return Residual(LocalWindowAttention(*self[:5]))

    def run(self, layer: Residual, x: Tensor, backend: Any) -> Tensor:
        folded = layer.m.attn.folded().to(x)
        return cascaded_group_attention(x, FusedAttention(folded).weights, backend=backend)


class FeedForward(NamedTuple):
    """Channels of an FFN; batch, height and width of the map; its dtype; whether a convolution comes first."""

    channels: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    local: bool = True

    def layer(self) -> nn.Sequential:
        local = Residual(ConvBN(self.channels, self.channels, 3, padding=1, groups=self.channels))
        return nn.Sequential(OrderedDict(local=local, ffn=Residual(FFN(self.channels))))[0 if self.local else 1 :]

    def run(self, layer: nn.Sequential, x: Tensor, backend: Any) -> Tensor:
        ffn = copy.deepcopy(layer.ffn.m)
        ffn.pw1, ffn.pw2 = ffn.pw1.folded(), ffn.pw2.folded()
        local = layer.local.m.folded(residual=True).to(x) if self.local else None
        return feed_forward(x, FusedFFN(local, ffn.to(x)).weights, backend=backend)


class Convolution(NamedTuple):
    """Channels in and out; batch, height and width of the map; its dtype; whether a ReLU follows."""

    channels: int
    outputs: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    relu: bool = True

    def layer(self) -> nn.Sequential:
        conv = ConvBN(self.channels, self.outputs, 3, stride=2, padding=1)
        return nn.Sequential(conv, nn.ReLU() if self.relu else nn.Identity())

    def run(self, layer: nn.Sequential, x: Tensor, backend: Any) -> Tensor:
        return FusedConvolution(layer[0].folded().to(x), self.relu, backend)(x)


class Merging(NamedTuple):
    """Channels in and out of patch merging; batch, height and width of the map; its dtype."""

    channels: int
    outputs: int
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def layer(self) -> PatchMerging:
        return PatchMerging(self.channels, self.outputs)

    def run(self, layer: PatchMerging, x: Tensor, backend: Any) -> Tensor:
        folded = copy.deepcopy(layer)
        fold(folded)
        return FusedMerging(folded.to(x), backend)(x)


Case = Attention | FeedForward | Convolution | Merging
SMALL: dict[str, Case] = {
    "padded-both-ways": Attention(32, 2, 3, (5, 3), 4, (2, 4, 7), HALF),
    "kernels-over-the-window": Attention(48, 3, 2, (7, 5, 1), 16, (1, 3, 3), SINGLE),
    "windows-share-a-tile": Attention(40, 2, 4, (5, 3), 16, (3, 4, 4), HALF),
    "one-head": Attention(24, 1, 7, (3,), 8, (1, 9, 7), SINGLE),
    "window-of-eight": Attention(32, 4, 8, (5, 5, 5, 5), 16, (1, 8, 5), HALF),
    "map-below-the-window": Attention(16, 1, 7, (3,), 16, (1, 1, 2), HALF),
    "ffn": FeedForward(24, (3, 3, 5), HALF),
    "ffn-two-blocks": FeedForward(48, (2, 4, 4), SINGLE),
    "ffn-alone": FeedForward(40, (1, 5, 7), HALF, local=False),
    "ffn-one-cell": FeedForward(16, (1, 1, 1), SINGLE),
    "image": Convolution(3, 8, (2, 16, 36), HALF),
    "image-of-odd-width": Convolution(3, 16, (1, 6, 9), HALF, relu=False),
    "image-single": Convolution(3, 8, (1, 8, 6), SINGLE),
    "stem": Convolution(8, 24, (2, 7, 12), HALF),
    "stem-of-two-blocks": Convolution(72, 80, (1, 3, 4), HALF),
    "stem-without-relu": Convolution(24, 48, (1, 6, 5), SINGLE, relu=False),
    "merging": Merging(24, 16, (2, 9, 8), HALF),
    "merging-single": Merging(16, 40, (1, 3, 11), SINGLE),
}
# The layers of M0 and M4 that differ most, and what else the architectures need of the kernels.
LARGE = {
    "m4-stage1": Attention(128, 4, 7, (7, 5, 3, 3), 16, (64, 14, 14), HALF),
    "m0-stage2": Attention(128, 4, 7, (5, 5, 5, 5), 16, (64, 7, 7), BRAIN),
    "m4-stage3": Attention(384, 4, 4, (7, 5, 3, 3), 16, (600, 4, 4), HALF),
    "m2-stage3-padded": Attention(224, 2, 7, (7, 5), 16, (9, 8, 10), BRAIN),
    "m4-stage1-single": Attention(128, 4, 7, (7, 5, 3, 3), 16, (8, 16, 16), SINGLE),
    "m0-stage1-ffn": FeedForward(64, (64, 14, 14), HALF),
    "m4-stage2-ffn": FeedForward(256, (64, 7, 7), BRAIN),
    "m4-stage3-ffn": FeedForward(384, (600, 4, 4), HALF),
    "m1-stage2-ffn": FeedForward(144, (3, 7, 9), SINGLE),
    "m5-stage2-ffn-alone": FeedForward(288, (64, 7, 7), HALF, local=False),
    "m0-image": Convolution(3, 8, (8, 224, 224), HALF),
    "m4-image": Convolution(3, 16, (3, 384, 224), BRAIN),
    "m0-stem2": Convolution(8, 16, (8, 112, 112), HALF),
    "m4-stem4": Convolution(64, 128, (16, 28, 28), BRAIN, relu=False),
    "m5-stem3-single": Convolution(48, 96, (2, 56, 56), SINGLE),
    "m0-merging": Merging(64, 128, (64, 14, 14), HALF),
    "m5-merging2": Merging(288, 384, (64, 7, 7), BRAIN),
}


def randomize(layer: nn.Module) -> nn.Module:
    """Away from zeros and ones, at which norms and biases would not show."""
    for module in layer.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 2.0)
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor)
        elif isinstance(module, CascadedGroupAttention):
            nn.init.normal_(module.attention_biases)
    return layer.eval()


@torch.no_grad()
def check(case: Case) -> None:
    """The operator against the layer in fp64, whose batch norms are not folded, on the same rounded input."""
    torch.manual_seed(0)
    layer = randomize(case.layer())
    x = torch.randn(case.shape[0], case.channels, *case.shape[1:]).to(DEVICE, case.dtype)
    truth = copy.deepcopy(layer).to(DEVICE).double()(x.double())
    baseline, actual = case.run(layer, x, "torch"), case.run(layer, x, "triton")
    assert actual.dtype == case.dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget({"out": actual}, {"out": truth}, {"out": baseline})
    # The memory format of the input changes nothing.
    assert torch.equal(case.run(layer, x.contiguous(memory_format=torch.channels_last), "triton"), actual)
    assert case.run(layer, x[:0], "triton").shape == actual[:0].shape


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name: str) -> None:
    check(SMALL[name])


ALIKE: dict[str, tuple[Case, Case]] = {
    "kernels": (Attention(32, 2, 4, (5, 3), 4, (1, 4, 7), HALF), Attention(32, 2, 4, (3, 5), 4, (1, 4, 7), HALF)),
    "sizes": (Attention(16, 1, 3, (3,), 16, (2, 4, 6), HALF), Attention(16, 1, 3, (3,), 16, (2, 6, 4), HALF)),
    "convolution-before": (FeedForward(24, (1, 3, 2), HALF), FeedForward(24, (1, 3, 2), HALF, local=False)),
    "relu": (Convolution(3, 8, (1, 6, 8), HALF), Convolution(3, 8, (1, 6, 8), HALF, relu=False)),
    "dtype": (Convolution(8, 16, (1, 6, 8), HALF), Convolution(8, 16, (1, 6, 8), SINGLE)),
    "merging": (Merging(24, 16, (1, 5, 8), HALF), Merging(24, 16, (1, 8, 5), HALF)),
}


@both_devices
@pytest.mark.parametrize("name", ALIKE)
def test_what_is_remembered_of_one_call_is_not_taken_for_another(where: str, name: str) -> None:
    one, other = ALIKE[name]
    for case in (one, other, one):
        check(case)


@both_devices
@torch.no_grad()
def test_an_image_at_any_address(where: str) -> None:
    """Aligned to 16 bytes; to 4, as pairs of numbers need; to 2."""
    layer = FusedConvolution(randomize(ConvBN(3, 8, 3, stride=2, padding=1)).folded(), True, "triton").to(DEVICE, HALF)
    image, memory = torch.randn(2 * 6 * 8 * 3, device=DEVICE, dtype=HALF), torch.empty(400, device=DEVICE, dtype=HALF)
    results = []
    for start in (0, 2, 1, 0):
        moved = memory[start:][: len(image)].copy_(image)
        results.append(layer(moved.view(2, 6, 8, 3).permute(0, 3, 1, 2)))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[3], results[0])
    torch.testing.assert_close(results[2], results[0], rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_on_gpu(name: str) -> None:
    check(LARGE[name])


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_the_plain_path_is_the_layer(name: str) -> None:
    case = SMALL[name]
    layer = randomize(case.layer()).double()
    x = torch.randn(case.shape[0], case.channels, *case.shape[1:], dtype=torch.float64)
    torch.testing.assert_close(case.run(layer, x, "torch"), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.interpret
@torch.no_grad()
def test_a_fused_model_is_the_model(build: Build, tiny: dict[str, Any]) -> None:
    plain = build(tiny, True, num_classes=10, img_size=64, out_indices=(0, 1, 2))
    images = golden_input(1, 32, 48)
    truth = copy.deepcopy(plain).double().backbone(images.double())
    fused = copy.deepcopy(plain)
    fused.backbone.switch_to_deploy(backend="triton")
    kinds = [type(module) for module in fused.modules()]
    assert (kinds.count(FusedAttention), kinds.count(FusedFFN)) == (4, 12)
    assert (kinds.count(FusedConvolution), kinds.count(FusedMerging)) == (4, 2)
    assert Residual not in kinds
    switch_to_deploy(plain)
    maps = fused.backbone(images)
    for got, want, base in zip(maps, truth, plain.backbone(images), strict=True):
        assert_within_budget({"map": got}, {"map": want}, {"map": base})
    # The state of one fused model loads into another, and compiles without breaks.
    other = build(tiny, True, num_classes=10, img_size=64, golden=False)
    other.head.switch_to_deploy(other.backbone, backend="triton")
    other.backbone.load_state_dict(fused.backbone.state_dict())
    compiled = torch.compile(other.backbone, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images)[0], maps[-1])


@pytest.mark.gpu
@torch.no_grad()
def test_a_fused_network_on_gpu(build: Build) -> None:
    plain, images = build("m0"), golden_input(4, 224, 224).cuda()
    truth = copy.deepcopy(plain).cuda().double()(images.double())
    fused = copy.deepcopy(plain)
    switch_to_deploy(plain)
    switch_to_deploy(fused, backend="triton")
    baseline, actual = plain.cuda().half()(images.half()), fused.cuda().half()(images.half())
    assert_within_budget({"logits": actual}, {"logits": truth}, {"logits": baseline})


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("name", "operator", "function"),
    [
        ("windows-share-a-tile", "cascaded_group_attention", "attention"),
        ("ffn", "feed_forward", "feed_forward"),
        ("image", "halving_convolution", "halving_convolution"),
        ("merging", "halving_depthwise", "halving_depthwise"),
    ],
)
def test_registered_without_gradients(name: str, operator: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL[name]
    layer, x = case.layer().eval(), torch.randn(2, case.channels, *case.shape[1:]).half()
    calls: list[Any] = []
    call_operator = getattr(contracts, function)

    def record(*call: Any) -> Any:
        calls.append(call)
        return call_operator(*call)

    with monkeypatch.context() as patch:
        patch.setattr(contracts, function, record)
        case.run(layer, x, "triton")
    ((read, weights, *options),) = calls
    arguments = [value.detach() if isinstance(value, Tensor) else value for value in (read, *weights, *options)]
    registered = getattr(torch.ops.vitreous_efficientvit, operator).default
    torch.library.opcheck(registered, arguments, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match=f"{operator} is for inference"):
        case.run(layer, x.requires_grad_(), "triton")


@torch.no_grad()
def test_refusals_name_every_reason(build: Build, tiny: dict[str, Any]) -> None:
    wide = Attention(260, 2, 9, (3, 3), 16, (1, 9, 9), torch.float64)
    layer, x = wide.layer().eval(), torch.randn(1, 260, 9, 9, dtype=torch.float64)
    with pytest.raises(BackendUnsupported, match=r"float64.*window_size must be at most 8; got 9.*value_dim.*got 130"):
        wide.run(layer, x, "triton")
    with pytest.raises(ValueError, match=r"x must be \[B, 260, height, width\]; got \(1, 9, 9\)"):
        wide.run(layer, x[:, 0], "torch")
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch' or 'triton'; got 'flex'"):
        wide.run(layer, x, "flex")
    weights = FusedAttention(layer.m.attn.folded()).weights
    with pytest.raises(ValueError, match=r"dtype and device of x, torch.float64 on cpu; got torch.float32 on cpu"):
        cascaded_group_attention(x, weights)
    with pytest.raises(ValueError, match=r"bias_tile must be \[2, 64, 64\]; got \(2, 9, 9\)"):
        cascaded_group_attention(x.float(), weights._replace(bias_tile=torch.zeros(2, 9, 9)))
    with pytest.raises(ValueError, match="proj_weight must be contiguous"):
        cascaded_group_attention(x.float(), weights._replace(proj_weight=weights.proj_weight.T))
    ffn = FeedForward(520, (1, 2, 2), torch.float64)
    with pytest.raises(BackendUnsupported, match="channels must be at most 512; got 520"):
        ffn.run(ffn.layer().eval(), torch.randn(1, 520, 2, 2, dtype=torch.float64), "triton")

    model = build({**tiny, "window_size": 9}, img_size=320)
    with pytest.raises(BackendUnsupported, match=r"blocks1\.0\.mixer\.m\.attn: window_size must be at most 8; got 9"):
        model.backbone.switch_to_deploy(backend="triton")
    assert not model.backbone.deploy
    with pytest.raises(BackendUnsupported, match="float64"):
        build(tiny).double().backbone.switch_to_deploy(backend="triton")
    with pytest.raises(ValueError, match="got 'flex'"):
        build(tiny).backbone.switch_to_deploy(backend="flex")


def test_auto_is_what_has_been_seen_to_win(build: Build, tiny: dict[str, Any]) -> None:
    for operator in get_args(Operator):
        assert choose_backend(operator, "cuda", HALF, 32) == "triton"
        assert choose_backend(operator, "cuda", SINGLE, 32) == "torch"
        assert choose_backend(operator, "cpu", HALF, 32) == "torch"
    assert choose_backend("cascaded_group_attention", "cuda", BRAIN, 384, 16) == "triton"
    assert choose_backend("halving_convolution", "cuda", HALF, 64) == "torch"
    chosen = [choose_backend("feed_forward", "cuda", HALF, 384, cells) for cells in (16, 32, 33, None)]
    assert chosen == ["torch", "torch", "triton", "triton"]
    assert choose_backend("feed_forward", "cuda", HALF, 256, 1) == "triton"
    model = build(tiny)
    model.backbone.switch_to_deploy()
    assert not [module for module in model.modules() if isinstance(module, FusedAttention | FusedFFN)]
    switch_to_deploy(model, backend="torch")
    with pytest.raises(RuntimeError, match="switched to deploy with backend='torch'; got 'triton'"):
        switch_to_deploy(model, backend="triton")


@torch.no_grad()
def test_each_fused_layer_can_choose(build: Build, tiny: dict[str, Any]) -> None:
    """On a CPU all choose PyTorch's operations, which are the folded model's."""
    folded = build(tiny, img_size=64, out_indices=(0, 1, 2))
    switch_to_deploy(folded)
    fused = copy.deepcopy(folded)
    fuse(fused.backbone, backend="auto")
    assert not [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
    images = golden_input(2, 32, 80).double()
    for got, want in zip(fused.double().backbone(images), folded.double().backbone(images), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("arch", sorted(EfficientViTMSRA.arch_settings))
def test_every_architecture_can_be_fused(arch: str) -> None:
    backbone = EfficientViTMSRA(arch).eval()
    backbone.switch_to_deploy()
    residuals = sum(isinstance(module, Residual) for module in backbone.modules())
    fuse(backbone)
    kinds = [type(module) for module in backbone.modules()]
    assert kinds.count(FusedAttention) + kinds.count(FusedFFN) == residuals
    assert Residual not in kinds


def test_tiles_hold_what_they_must() -> None:
    for dtype in (HALF, BRAIN, SINGLE):
        for windows in (1, 2, 64, 10**5):
            for side in range(1, 9):
                tile = attention_tile(dtype, windows > 2, windows, side, 96, 132)
                assert 16 <= tile.rows <= 64
                assert 1 <= tile.windows <= tile.rows // side**2
        for channels in range(8, 513, 8):
            for cells, shared_memory in ((1, 99 * 1024), (10**6, 227 * 1024)):
                ffn = feed_forward_tile(dtype, cells, channels, 132, shared_memory)
                assert min(ffn.rows, ffn.hidden) >= 16
            first, second = split_channels(channels)
            assert channels <= first + second < 2 * max(channels, 16)
    for side in (1, 7, 12, 14, 28, 56, 112, 192):
        conv = convolution_tile(HALF, 8, side, side)
        assert 16 <= conv.rows * conv.columns <= 128
    # On consumer GPUs.
    assert feed_forward_tile(HALF, 10**6, 384, 84, 99 * 1024).hidden == 16
    assert feed_forward_tile(SINGLE, 10**6, 512, 84, 99 * 1024).stages == 1
    assert split_channels(384) == (256, 128)
    assert split_channels(256) == (256, 0)
