"""SwiftFormer XS, S, L1 and L3: backbone and classification head, in plain PyTorch.

Paper: *SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications*,
ICCV 2023, arXiv 2303.15446. Written from a description of the network; modules and parameters below the public
classes are named as in the official checkpoints, so that a state dict reads the same here and there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitreous_core.backbone import stage_indices
from vitreous_core.deploy import check_evaluating, check_trainable, seal
from vitreous_core.errors import BackendUnsupported
from vitreous_core.fold import (
    fold_conv_norm,
    fold_conv_norm_conv,
    fold_gain,
    fold_mean,
    fold_norm_conv,
    fold_norm_linear,
)
from vitreous_core.recompute import recompute

from .ablations import KeyValueAdditiveAttention, SelfAttention
from .attention import EfficientAdditiveAttention, FoldedAdditiveAttention
from .halving import HalvingConv2d
from .ops import Backend, pointwise_mlp
from .ops.backends import mlp_backend, resolve_mlp
from .pointwise import PointwiseConv2d, is_half_channels_last

Attention = Literal["additive", "additive_kv", "self"]


class SwiftFormer(nn.Module):
    """SwiftFormer backbone: a stride-4 stem and stages of convolutional blocks that end in one attention block.

    Any image size works, rectangles and single pixels too: each stride-2 step takes `r` to `(r + 1) // 2`.

    Paper: arXiv 2303.15446, section 3, "SwiftFormer Architecture".

    Every output goes through a batch norm of its own, named as in the official checkpoints: `norm` where the last
    stage is the only output (classification), else `norm{2 * stage}` (dense prediction: `norm0`, `norm2`,
    `norm4`, `norm6`). A state dict with the last stage's norm under its other name loads too.

    Args:
        arch: `"xs"`, `"s"`, `"l1"`, `"l3"`, or a dict with `channels` and `depths` (one entry per stage) and
            optionally `mlp_ratio` (4).
        in_channels: image channels.
        out_indices: stages whose maps are returned, int or sequence, negative ones count from the end.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages with their norms.
        norm_eval: keep batch norms in evaluation mode while training.
        with_cp: recompute the blocks in the backward pass to save memory; results are unchanged.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 and applied to every residual
            branch (officially only to those of the attention blocks); the paper uses none.
        backend: of the additive attention: `"torch"`, `"triton"`, or `"auto"`, which chooses (see
            `ops.choose_backend`). In deploy mode also of the 1x1 convolutions around GELU and of those of stride 2
            (`ops.choose_mlp_backend`, `ops.choose_halving_backend`); `"triton"` by name then asks for half precision,
            and leaves to PyTorch only the widths that have no kernel (`ops.backends.mlp_backend`).
        attention: `"additive"`, or what the paper's ablations compare it with (table 1 and the appendix):
            `"additive_kv"`, the same with the interaction of keys and values (`KeyValueAdditiveAttention`), and
            `"self"`, softmax self-attention (`SelfAttention`), quadratic in the tokens.

    Raises:
        TypeError: for an `arch` or `out_indices` of another type.
        ValueError: for an unknown architecture, backend or attention, or a value out of range.
        BackendUnsupported: for `backend="triton"` with `attention="self"`, which has no kernel.
    """

    arch_settings: ClassVar[dict[str, dict[str, Any]]] = {
        "xs": {"channels": (48, 56, 112, 220), "depths": (3, 3, 6, 4)},
        "s": {"channels": (48, 64, 168, 224), "depths": (3, 3, 9, 6)},
        "l1": {"channels": (48, 96, 192, 384), "depths": (4, 3, 10, 5)},
        "l3": {"channels": (64, 128, 320, 512), "depths": (4, 4, 12, 6)},
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "xs",
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
        backend: Backend = "auto",
        attention: Attention = "additive",
    ) -> None:
        super().__init__()
        arch = _checked_arch(arch, self.arch_settings)
        self.channels: tuple[int, ...] = tuple(arch["channels"])
        self.depths: tuple[int, ...] = tuple(arch["depths"])
        stages = len(self.depths)
        if not -1 <= frozen_stages <= stages:
            raise ValueError(f"frozen_stages must lie in -1..{stages}; got {frozen_stages}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must lie in [0, 1); got {drop_path_rate}")
        if attention not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(map(repr, get_args(Attention)))}; got {attention!r}")
        self.in_channels = in_channels
        self.out_indices = stage_indices(out_indices, stages)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.backend = backend
        self.deploy = False

        self.patch_embed = _stem(in_channels, self.channels[0])
        blocks = sum(self.depths)
        rates = iter([drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)])
        self.network = nn.ModuleList()
        for stage, (channels, depth) in enumerate(zip(self.channels, self.depths, strict=True)):
            if stage > 0:
                self.network.append(Downsample(self.channels[stage - 1], channels, backend))
            drop_paths = list(islice(rates, depth))
            self.network.append(_stage(channels, arch.get("mlp_ratio", 4), drop_paths, backend, attention))
        for stage in self.out_indices:
            self.add_module(self._norm_name(stage), nn.BatchNorm2d(self.channels[stage]))
        self.register_load_state_dict_pre_hook(_rename_last_norm)
        self.apply(_init_weights)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of the stages in `out_indices`.

        Args:
            x: `[B, in_channels, height, width]`.

        Returns:
            Normalised NCHW maps in stage order, of stride `4 * 2**stage` (rounded up) and `channels[stage]`
            channels.

        Raises:
            ValueError: for another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(f"x must be images [B, {self.in_channels}, height, width]; got {tuple(x.shape)}")
        x = self.patch_embed(x)
        outputs = []
        for index, module in enumerate(self.network):
            is_stage = index % 2 == 0  # the others downsample between the stages
            x = self._recompute_blocks(module, x) if is_stage and self.with_cp else module(x)
            if is_stage and index // 2 in self.out_indices:
                outputs.append(getattr(self, self._norm_name(index // 2))(x))
            if index == 2 * self.out_indices[-1]:
                break
        return tuple(outputs)

    def train(self, mode: bool = True) -> SwiftFormer:
        """Set the mode; frozen stages, and all batch norms under `norm_eval`, stay in evaluation mode.

        Raises:
            RuntimeError: for training mode after `switch_to_deploy`.
        """
        check_trainable(self.deploy, mode)
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fold for inference, in place; a second call changes nothing.

        * Batch norms go into the convolution before them, or after them where that is the only one (`fc1`); layer
          scales into the linear map before them.
        * The shift between a depthwise convolution and `pwconv1` goes on into the latter's bias.
        * Attention takes its folded form (`FoldedAdditiveAttention`): two 1x1 convolutions instead of four linear maps,
          on maps instead of tokens.
        * Where maps are channels-last in half precision, 1x1 convolutions become matrix products (`PointwiseConv2d`).
          There, on a GPU, those around a GELU run as one kernel with their residual, and convolutions of stride 2 as
          one with their ReLU (`ops.choose_mlp_backend`, `ops.choose_halving_backend`).

        What stays: the norms of the outputs, because what they follow is a sum, not a linear map (`SwiftFormerHead`
        can take over the last one); the residuals, whose branches are not linear.

        State dicts change their names and shapes, so load weights before. Afterwards only the state of another
        deployed model loads. Memory format, device and dtype stay.

        Numerics: computed in fp64 and rounded once to the model's dtype.

        Raises:
            RuntimeError: in training mode, where batch norms are no fixed maps.
        """
        if self.deploy:
            return
        check_evaluating(self)
        _fold_stem(self.patch_embed, self.backend)
        for module in list(self.network.modules()):
            if isinstance(module, ConvEncoder | SwiftFormerEncoder | Mlp | Downsample):
                module.fold()
        self.deploy = True
        seal(self)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rates: stem 0, each block one, everything else last.

        A downsampling counts with the first block after it.

        Args:
            param_name: full name of the parameter.
            prefix: what stands before the backbone's own names, e.g. `"backbone."`.

        Returns:
            The depth and the number of depths.
        """
        last = sum(self.depths) + 1
        parts = param_name.removeprefix(prefix).split(".")
        if not param_name.startswith(prefix) or parts[0] not in ("patch_embed", "network"):
            return last, last + 1
        if parts[0] == "patch_embed":
            return 0, last + 1
        index = int(parts[1])
        stage = (index + 1) // 2
        block = 0 if index % 2 else int(parts[2])
        return 1 + sum(self.depths[:stage]) + block, last + 1

    def _recompute_blocks(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        for block in stage:
            x = recompute(block, x) if torch.is_grad_enabled() else block(x)
        return x

    def _norm_name(self, stage: int) -> str:
        return "norm" if self.out_indices == (len(self.depths) - 1,) else f"norm{2 * stage}"

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen: list[nn.Module] = [self.patch_embed, *self.network[: max(2 * self.frozen_stages - 1, 0)]]
        frozen += [getattr(self, self._norm_name(stage)) for stage in self.out_indices if stage < self.frozen_stages]
        for module in frozen:
            module.eval().requires_grad_(False)


class SwiftFormerHead(nn.Module):
    """Global average pool and one linear classifier, or two of them for distillation.

    Args:
        num_classes: number of classes.
        in_channels: channels of the last map.
        distillation: add `dist_head`, the classifier that learns from a teacher.
    """

    def __init__(self, num_classes: int, in_channels: int, distillation: bool = False) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive; got {num_classes}")
        self.num_classes = num_classes
        self.deploy = False
        self.head = nn.Linear(in_channels, num_classes)
        self.dist_head = nn.Linear(in_channels, num_classes) if distillation else None
        self.apply(_init_weights)

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Spatial mean `[B, C]` of the last of the backbone's maps."""
        return feats[-1].mean(dim=(2, 3))

    def scores(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits `[B, num_classes]` of each classifier, the one that learns from labels first."""
        pooled = self.pre_logits(feats)
        if self.dist_head is None:
            return (self.head(pooled),)
        return self.head(pooled), self.dist_head(pooled)

    def forward(self, feats: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Logits `[B, num_classes]`; of two classifiers the pair while training, the mean in evaluation."""
        scores = self.scores(feats)
        if len(scores) == 1:
            return scores[0]
        return scores if self.training else (scores[0] + scores[1]) / 2

    def train(self, mode: bool = True) -> SwiftFormerHead:
        """Set the mode.

        Raises:
            RuntimeError: for training mode after `switch_to_deploy`.
        """
        check_trainable(self.deploy, mode)
        super().train(mode)
        return self

    @torch.no_grad()
    def switch_to_deploy(self, backbone: SwiftFormer | None = None) -> None:
        """Fold two classifiers into their mean, in place, for inference only. A second call changes nothing.

        Args:
            backbone: deploy it too and take over the norm of its last map, which commutes with the mean over
                positions. Only the logits are the same then: the backbone's own last map is unnormalised.

        Raises:
            RuntimeError: in training mode.
            ValueError: for a backbone whose last map has another number of channels.
        """
        if backbone is not None:
            self._check_fits(backbone)
            backbone.switch_to_deploy()
        if not self.deploy:
            check_evaluating(self)
            if self.dist_head is not None:
                self.head = fold_mean(self.head, self.dist_head)
            self.dist_head = None
            self.deploy = True
            seal(self)
        if backbone is not None:
            self._absorb_last_norm(backbone)

    def _check_fits(self, backbone: SwiftFormer) -> None:
        channels = backbone.channels[backbone.out_indices[-1]]
        if channels != self.head.in_features:
            raise ValueError(
                f"backbone must end in a map of the head's {self.head.in_features} channels; its last output has "
                f"{channels}. Give the backbone and the head that work together"
            )

    def _absorb_last_norm(self, backbone: SwiftFormer) -> None:
        name = backbone._norm_name(backbone.out_indices[-1])
        norm = getattr(backbone, name)
        if isinstance(norm, _BatchNorm):
            self.head = fold_norm_linear(norm, self.head).requires_grad_(False).eval()
            setattr(backbone, name, nn.Identity().eval())


class ConvEncoder(nn.Module):
    """`x + layer_scale * pwconv2(gelu(pwconv1(norm(dwconv(x)))))`, with `hidden` channels in the middle.

    Also, with as many hidden channels as it has, the local representation of a `SwiftFormerEncoder`.
    """

    def __init__(self, channels: int, hidden: int, drop_path: float = 0.0, backend: Backend = "auto") -> None:
        super().__init__()
        self.drop_path = drop_path
        self.backend = mlp_backend(backend, channels)
        self.layer_scale: nn.Parameter | None = nn.Parameter(torch.ones(channels, 1, 1))
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.pwconv1 = nn.Conv2d(channels, hidden, kernel_size=1)
        self.act = nn.GELU()
        self.pwconv2 = nn.Conv2d(hidden, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_scale is None and (parameters := _fused(self.backend, x, self.pwconv1, self.pwconv2)):
            return pointwise_mlp(self.dwconv(x), x, *parameters, backend="triton")
        branch = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        return _add_branch(self, x, branch, self.layer_scale)

    def fold(self) -> None:
        """Norm into the convolutions around it, layer scale into `pwconv2`."""
        self.dwconv, expand = fold_conv_norm_conv(self.dwconv, self.norm, self.pwconv1)
        self.norm = nn.Identity()
        self.pwconv1 = PointwiseConv2d.from_conv(expand)
        self.pwconv2 = PointwiseConv2d.from_conv(fold_gain(self.pwconv2, self.layer_scale))
        self.layer_scale = None


class SwiftFormerEncoder(nn.Module):
    """Local representation, attention (additive, but in ablations) over all positions, and an MLP."""

    attn: EfficientAdditiveAttention | FoldedAdditiveAttention | KeyValueAdditiveAttention | SelfAttention

    def __init__(
        self,
        channels: int,
        hidden: int,
        drop_path: float = 0.0,
        backend: Backend = "auto",
        attention: Attention = "additive",
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.layer_scale_1: nn.Parameter | None = nn.Parameter(torch.full((channels, 1, 1), 1e-5))
        self.layer_scale_2: nn.Parameter | None = nn.Parameter(torch.full((channels, 1, 1), 1e-5))
        self.local_representation = ConvEncoder(channels, channels, drop_path, backend)
        self.attn = _attention(attention, channels, backend)
        self.linear = Mlp(channels, hidden, backend)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_representation(x)
        x = _add_branch(self, x, self._mix(x), self.layer_scale_1)
        mlp = self.linear
        if self.layer_scale_2 is None and (parameters := _fused(mlp.backend, x, mlp.fc1, mlp.fc2)):
            return pointwise_mlp(x, x, *parameters, backend="triton")
        return _add_branch(self, x, mlp(x), self.layer_scale_2)

    def _mix(self, x: Tensor) -> Tensor:
        if isinstance(self.attn, FoldedAdditiveAttention):
            return self.attn(x)
        return self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)

    def fold(self) -> None:
        """Additive attention in its folded form with its layer scale; the MLP's layer scale into its last map."""
        if isinstance(self.attn, EfficientAdditiveAttention):
            self.attn = self.attn.folded(self.layer_scale_1)
            self.layer_scale_1 = None
        self.linear.fc2 = PointwiseConv2d.from_conv(fold_gain(self.linear.fc2, self.layer_scale_2))
        self.layer_scale_2 = None


class Mlp(nn.Module):
    """Batch norm and two 1x1 convolutions with a GELU between."""

    def __init__(self, channels: int, hidden: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend = mlp_backend(backend, channels)
        self.norm1: nn.Module = nn.BatchNorm2d(channels)
        self.fc1 = nn.Conv2d(channels, hidden, kernel_size=1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.norm1(x))))

    def fold(self) -> None:
        """Norm into the 1x1 convolution after it, which has no border to see the shift."""
        self.fc1, self.norm1 = PointwiseConv2d.from_conv(fold_norm_conv(self.norm1, self.fc1)), nn.Identity()


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and batch norm, between two stages."""

    def __init__(self, in_channels: int, out_channels: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.proj = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))

    def fold(self) -> None:
        """Norm into the convolution before it."""
        self.proj = _fold_halving(self.proj, self.norm, relu=False, backend=self.backend)
        self.norm = nn.Identity()


def _stem(in_channels: int, channels: int) -> nn.Sequential:
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, half, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        nn.Conv2d(half, channels, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _stage(
    channels: int, mlp_ratio: float, drop_path_rates: Sequence[float], backend: Backend, attention: Attention
) -> nn.Sequential:
    hidden = int(mlp_ratio * channels)
    *before, last = drop_path_rates
    blocks: list[nn.Module] = [ConvEncoder(channels, hidden, rate, backend) for rate in before]
    return nn.Sequential(*blocks, SwiftFormerEncoder(channels, hidden, last, backend, attention))


def _attention(
    kind: Attention, channels: int, backend: Backend
) -> EfficientAdditiveAttention | KeyValueAdditiveAttention | SelfAttention:
    if kind == "additive":
        return EfficientAdditiveAttention(channels, backend)
    if kind == "additive_kv":
        return KeyValueAdditiveAttention(channels, backend)
    if backend == "triton":
        raise BackendUnsupported(backend, ["attention='self' has no kernel"])
    return SelfAttention(channels)


def _add_branch(block: ConvEncoder | SwiftFormerEncoder, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """`x + scale * branch`, the branch dropped per image with probability `block.drop_path` while training."""
    if scale is not None:
        branch = scale * branch
    if block.training and block.drop_path > 0.0:
        keep = 1.0 - block.drop_path
        branch = branch * (branch.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)
    return x + branch


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _fold_stem(layers: nn.Sequential, backend: Backend) -> None:
    """Each convolution, norm and ReLU to one layer; the numbers of layers stay."""
    for first in range(0, len(layers), 3):
        layers[first] = _fold_halving(layers[first], layers[first + 1], relu=True, backend=backend)
        layers[first + 1], layers[first + 2] = nn.Identity(), nn.Identity()


def _fold_halving(conv: nn.Module, norm: nn.Module, relu: bool, backend: Backend) -> HalvingConv2d:
    """The norm in the convolution before it, whose weight stays channels-last: a copy for each call costs a launch."""
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, _BatchNorm)
    folded = HalvingConv2d.from_conv(fold_conv_norm(conv, norm), relu, backend)
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        folded.to(memory_format=torch.channels_last)
    return folded


def _fused(
    backend: Backend, x: Tensor, first: nn.Conv2d, second: nn.Conv2d
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Parameters of two folded 1x1 convolutions, if they and the GELU between run as one kernel on this map."""
    if backend == "torch" or (backend == "auto" and not is_half_channels_last(x)):
        return None
    assert first.bias is not None
    assert second.bias is not None
    parameters = first.weight, first.bias, second.weight, second.bias
    if backend == "auto":
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        dtypes = (x.dtype, *[parameter.dtype for parameter in parameters])
        batch, channels, height, width = x.shape
        positions = batch * height * width
        chosen = resolve_mlp(backend, x.device, dtypes, channels, first.out_channels, positions, needs_grad)
        return parameters if chosen == "triton" else None
    return parameters


def _rename_last_norm(module: SwiftFormer, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    last = len(module.depths) - 1
    if last not in module.out_indices:
        return
    own = module._norm_name(last)
    other = f"norm{2 * last}" if own == "norm" else "norm"
    if any(key.startswith(f"{prefix}{own}.") for key in state_dict):
        return
    for key in [key for key in state_dict if key.startswith(f"{prefix}{other}.")]:
        state_dict[prefix + own + key.removeprefix(prefix + other)] = state_dict.pop(key)


def _checked_arch(arch: str | Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if isinstance(arch, str):
        if arch.lower() not in settings:
            raise ValueError(f"arch must be one of {list(settings)} or a dict; got {arch!r}")
        return settings[arch.lower()]
    if not isinstance(arch, Mapping):
        raise TypeError(f"arch must be a name or a dict; got {type(arch).__name__}")
    if not {"channels", "depths"} <= set(arch) <= {"channels", "depths", "mlp_ratio"}:
        raise ValueError(f"arch needs channels and depths and may have mlp_ratio; got {sorted(arch)}")
    channels, depths = arch["channels"], arch["depths"]
    if len(channels) != len(depths) or not depths or min(depths) < 1 or min(channels) < 2:
        raise ValueError(
            "arch must give every stage at least 2 channels and a depth of at least 1; "
            f"got channels {tuple(channels)}, depths {tuple(depths)}"
        )
    return arch
