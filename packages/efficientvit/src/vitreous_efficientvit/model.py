"""EfficientViT (MSRA): the backbone M0 to M5 and its classification head, in plain PyTorch.

**Paper**: *EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention*, CVPR 2023,
arXiv 2305.07027. Written from a description of the network; module names below the public classes are those
of the official checkpoints, so that a state dict reads the same here and there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitreous_core.backbone import stage_indices
from vitreous_core.deploy import check_evaluating, check_trainable, seal
from vitreous_core.fold import fold_mean, fold_norm_linear
from vitreous_core.recompute import recompute

from .attention import ConvBN, HeadInput, LocalWindowAttention

if TYPE_CHECKING:
    from .ops import Backend

STEM_STRIDE = 16
NUM_STAGES = 3

_ARCH_REQUIRED = frozenset({"channels", "depths", "num_heads", "kernel_sizes"})
_ARCH_OPTIONAL = frozenset({"window_size", "key_dim", "head_input", "ffns", "ffn_ratio"})


def _settings(
    channels: tuple[int, ...],
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    kernel_sizes: tuple[int, ...],
) -> dict[str, Any]:
    return {"channels": channels, "depths": depths, "num_heads": num_heads, "kernel_sizes": kernel_sizes}


class EfficientViTMSRA(nn.Module):
    """EfficientViT backbone: a stride-16 stem and three stages of sandwich blocks.

    A block is depthwise conv, FFN, cascaded group attention in windows, depthwise conv, FFN, each residual.
    Maps come at strides 16, 32 and 64.

    **Paper**: arXiv 2305.07027, figure 6a.

    The window side of a stage is fixed at construction: `min(7, r)` with `r` the shorter side of the stage's
    map at `img_size` (so at 224 it is 7, 7, 4). Other input sizes run with these windows, on padded maps.
    A checkpoint made for another `img_size` loads: its bias tables are resized bicubically, with a warning.

    Args:
        arch: `"m0"` to `"m5"`, or a dict with `channels`, `depths`, `num_heads` (three entries each) and
            `kernel_sizes` (of the query convolution, by head index, shared by the stages), and optionally
            `window_size` (7), `key_dim` (16, or an entry for each stage), and what the paper's ablations change
            (section 4.4): `head_input` (`"cascade"`, see `CascadedGroupAttention`), `ffns` (1, 1), the FFNs of a block
            before and after its attention, each behind a depthwise conv, and `ffn_ratio` (2), the expansion of all
            FFNs.
        img_size: input size the windows are made for, int or (height, width), multiples of 16.
        in_channels: image channels.
        out_indices: stages whose maps are returned, int or sequence, negative ones count from the end.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages.
        norm_eval: keep batch norms in evaluation mode while training.
        with_cp: recompute the blocks in the backward pass to save memory; results are unchanged.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; the paper uses none.
        backend: of the heads' attention and of the convolutions of the stem and by depth, in training and unfused
            inference; see `CascadedGroupAttention` and `ops.Convolution`. Deploy mode has its own.

    Raises:
        TypeError: for an `arch`, `img_size` or `out_indices` of another type.
        ValueError: for an unknown architecture or backend, sizes no multiple of 16, heads that do not divide channels.
    """

    arch_settings: ClassVar[dict[str, dict[str, Any]]] = {
        "m0": _settings((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
        "m1": _settings((128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
        "m2": _settings((128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
        "m3": _settings((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
        "m4": _settings((128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
        "m5": _settings((192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "m0",
        img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        arch = _checked_arch(arch, self.arch_settings)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1); got {drop_path_rate}")
        if not -1 <= frozen_stages <= NUM_STAGES:
            raise ValueError(f"frozen_stages must be -1 (none), 0 (the stem) or 1 to {NUM_STAGES}; got {frozen_stages}")
        self.channels: tuple[int, ...] = tuple(arch["channels"])
        self.depths: tuple[int, ...] = tuple(arch["depths"])
        self.img_size = _checked_img_size(img_size)
        self.in_channels = in_channels
        self.out_indices = stage_indices(out_indices, NUM_STAGES)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.deploy = False
        self.deploy_backend: Backend | None = None

        self.patch_embed = _stem(in_channels, self.channels[0], backend)
        ffn_ratio = arch.get("ffn_ratio", 2)
        last = max(sum(self.depths) - 1, 1)
        rates = (drop_path_rate * block / last for block in count())
        side = min(self.img_size) // STEM_STRIDE
        for stage in range(NUM_STAGES):
            layers: list[nn.Module] = []
            if stage > 0:
                layers += _subsample(self.channels[stage - 1], self.channels[stage], ffn_ratio, backend)
                side = (side - 1) // 2 + 1
            layers += [
                EfficientViTBlock(
                    self.channels[stage],
                    arch["num_heads"][stage],
                    min(arch.get("window_size", 7), side),
                    arch["kernel_sizes"],
                    _key_dims(arch)[stage],
                    drop_path=next(rates),
                    head_input=arch.get("head_input", "cascade"),
                    ffns=arch.get("ffns", (1, 1)),
                    ffn_ratio=ffn_ratio,
                    backend=backend,
                )
                for _ in range(self.depths[stage])
            ]
            self.add_module(f"blocks{stage + 1}", nn.Sequential(*layers))
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of the stages in `out_indices`.

        Args:
            x: `[B, in_channels, height, width]`, height and width multiples of 16.

        Returns:
            NCHW maps in stage order; stage s has stride 16, 32 or 64 (rounded up) and `channels[s]` channels.

        Raises:
            ValueError: for another shape.
        """
        self._check_input(x)
        x = self.patch_embed(x)
        outputs = []
        for stage in range(max(self.out_indices) + 1):
            for layer in self.get_submodule(f"blocks{stage + 1}"):
                x = self._run(layer, x)
            if stage in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def train(self, mode: bool = True) -> EfficientViTMSRA:
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
    def switch_to_deploy(self, backend: Backend = "auto") -> None:
        """Fold for inference, in place; a second call changes nothing.

        * Every batch norm goes into its convolution.
        * `x + dw(x)` becomes one depthwise convolution, its middle tap raised by one.
        * Attention takes its folded form (`FoldedCascadedGroupAttention`): the scale is in the query's convolution, and
          the bias of each pair of tokens is read, not gathered.

        What stays: the residuals of FFN and attention, whose branches are not linear; squeeze-excite, whose gate
        depends on the image.

        State dicts change their names and shapes, so load weights before. Afterwards only the state of another
        deployed model loads. Memory format, device and dtype stay.

        **Numerics**: computed in fp64 and rounded once to the model's dtype. A 16-bit model rounds taps near one to
        its spacing there, an error like that of rounding the sum.

        Args:
            backend: `"triton"` puts fused operators (`ops`) in the place of attention, of FFNs, each with the depthwise
                convolution before it, of the stem and of the patch mergings: for NVIDIA GPUs, in fp16, bf16 and
                fp32. State dicts are those of `"triton"` then, and maps channels-last. `"torch"` keeps PyTorch's
                layers. `"auto"` is `"torch"` unless the model is on a GPU where fused operators win in half precision
                (`ops.choose_backend`); there it is the model of `"triton"`, in which each operator chooses for itself.

        Raises:
            RuntimeError: in training mode, where batch norms are no fixed maps; at a second call with another backend.
            ValueError: for an unknown backend.
            BackendUnsupported: when `backend="triton"` cannot take a layer; nothing has changed then.
        """
        # Here, as the first needs the layers of this file, and both import more than training does.
        from .fused import check_fusable, fuse, is_worth_fusing
        from .ops.api import check_backend

        check_backend(backend)
        if self.deploy:
            if backend not in ("auto", self.deploy_backend):
                raise RuntimeError(
                    f"this model is switched to deploy with backend={self.deploy_backend!r}; got {backend!r}. Build a "
                    "new one and load the original weights"
                )
            return
        check_evaluating(self)
        if backend == "triton":
            check_fusable(self)
        elif backend == "auto" and not is_worth_fusing(self):
            backend = "torch"
        fold(self)
        if backend != "torch":
            fuse(self, backend)
        self.deploy_backend = backend
        self.deploy = True
        seal(self)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rates: stem 0, each block one, everything else last.

        The layers between two stages count with the first block after them.

        Args:
            param_name: full name of the parameter.
            prefix: what stands before the backbone's own names, e.g. `"backbone."`.

        Returns:
            The depth and the number of depths.
        """
        num_layers = sum(self.depths) + 2
        parts = param_name.removeprefix(prefix).split(".")
        if param_name.startswith(prefix) and parts[0] == "patch_embed":
            return 0, num_layers
        if param_name.startswith(prefix) and parts[0].startswith("blocks"):
            stage, child = int(parts[0].removeprefix("blocks")) - 1, int(parts[1])
            block = child if stage == 0 else max(child - 3, 0)
            return 1 + sum(self.depths[:stage]) + block, num_layers
        return num_layers - 1, num_layers

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        if not (self.with_cp and self.training and torch.is_grad_enabled()):
            return layer(x)
        return recompute(layer, x)

    def _freeze(self) -> None:
        frozen = ["patch_embed", *(f"blocks{stage + 1}" for stage in range(self.frozen_stages))]
        for name in frozen if self.frozen_stages >= 0 else ():
            self.get_submodule(name).eval().requires_grad_(False)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [B, {self.in_channels}, height, width]; got {tuple(x.shape)}")
        if min(x.shape[2:]) < STEM_STRIDE or x.shape[2] % STEM_STRIDE or x.shape[3] % STEM_STRIDE:
            raise ValueError(
                f"height and width of x must be positive multiples of {STEM_STRIDE}; "
                f"got {tuple(x.shape[2:])}. Resize or pad the images"
            )


class EfficientViTMSRAHead(nn.Module):
    """Global average pool and one batch-normed linear classifier, or two of them for distillation.

    Args:
        num_classes: classes; 0 leaves the pooled features as they are.
        in_channels: channels of the last map.
        distillation: add the classifier that learns from a teacher.
    """

    def __init__(self, num_classes: int, in_channels: int, distillation: bool = False) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0 (no classifier); got {num_classes}")
        self.num_classes = num_classes
        self.deploy = False
        self.classifier = _classifier(in_channels, num_classes)
        self.distillation_classifier = _classifier(in_channels, num_classes) if distillation else None

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Spatial mean `[B, C]` of the last of the backbone's maps."""
        return feats[-1].mean(dim=(2, 3))

    def scores(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits `[B, num_classes]` of each classifier, the one that learns from labels first."""
        pooled = self.pre_logits(feats)
        logits = self.classifier(pooled)
        if self.distillation_classifier is None:
            return (logits,)
        return logits, self.distillation_classifier(pooled)

    def forward(self, feats: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Logits `[B, num_classes]`; of two classifiers the pair while training, the mean in evaluation."""
        scores = self.scores(feats)
        if len(scores) == 1:
            return scores[0]
        return scores if self.training else (scores[0] + scores[1]) / 2

    def train(self, mode: bool = True) -> EfficientViTMSRAHead:
        """Set the mode.

        Raises:
            RuntimeError: for training mode after `switch_to_deploy`.
        """
        check_trainable(self.deploy, mode)
        super().train(mode)
        return self

    @torch.no_grad()
    def switch_to_deploy(self, backbone: EfficientViTMSRA | None = None, backend: Backend = "auto") -> None:
        """Fold the batch norms, and two classifiers into their mean, in place; a second call changes nothing.

        Args:
            backbone: deploy it too. It leaves nothing for the head to take over: its last layer is in a residual.
            backend: of the backbone, see there.

        Raises:
            RuntimeError: in training mode.
        """
        if backbone is not None:
            backbone.switch_to_deploy(backend)
        if self.deploy:
            return
        check_evaluating(self)
        fold(self)
        if isinstance(self.distillation_classifier, nn.Linear):
            assert isinstance(self.classifier, nn.Linear)
            self.classifier = fold_mean(self.classifier, self.distillation_classifier)
        self.distillation_classifier = None
        self.deploy = True
        seal(self)


class EfficientViTBlock(nn.Sequential):
    """Sandwich block: one attention layer between two depthwise convolutions and two FFNs; figure 6b.

    With `ffns=(N, N)` there are N of both on each side (equation 1). `(0, 1)` is the order of Swin and of most others:
    attention, then one FFN.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int,
        kernel_sizes: Sequence[int],
        key_dim: int,
        drop_path: float,
        head_input: HeadInput,
        ffns: Sequence[int],
        ffn_ratio: float,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        attention = LocalWindowAttention(channels, num_heads, window_size, kernel_sizes, key_dim, head_input, backend)

        def add_ffn(index: int) -> None:
            self.add_module(f"dw{index}", Residual(_depthwise(channels, 0.0, backend), drop_path))
            self.add_module(f"ffn{index}", Residual(FFN(channels, ffn_ratio), drop_path))

        before, after = ffns
        for index in range(before):
            add_ffn(index)
        self.mixer = Residual(attention, drop_path)
        for index in range(before, before + after):
            add_ffn(index)


class Residual(nn.Module):
    """`x + m(x)`, the branch dropped per image with probability `drop_path` while training."""

    def __init__(self, m: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.m = m
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        branch = self.m(x)
        if self.training and self.drop_path > 0.0:
            keep = 1.0 - self.drop_path
            branch = branch * (branch.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)
        return x + branch


class FFN(nn.Module):
    """Two 1x1 convolutions with a ReLU between, `ratio` times as many channels there."""

    def __init__(self, channels: int, ratio: float = 2) -> None:
        super().__init__()
        hidden = int(ratio * channels)
        self.pw1 = ConvBN(channels, hidden)
        self.act = nn.ReLU()
        self.pw2 = ConvBN(hidden, channels, gamma=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class PatchMerging(nn.Module):
    """Inverted residual without the residual: 1x1 to 4C, depthwise 3x3 stride 2, squeeze-excite, 1x1."""

    def __init__(self, in_channels: int, out_channels: int, backend: Backend = "auto") -> None:
        super().__init__()
        hidden = 4 * in_channels
        self.conv1 = ConvBN(in_channels, hidden)
        self.conv2 = ConvBN(hidden, hidden, kernel_size=3, stride=2, padding=1, groups=hidden, backend=backend)
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvBN(hidden, out_channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1(x))
        x = self.act(self.conv2(x))
        return self.conv3(self.se(x))


class SqueezeExcite(nn.Module):
    """Gate each channel by a two-layer function of all channels' spatial means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A quarter, rounded to a multiple of 8.
        reduced = max(8, (channels // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, reduced, kernel_size=1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(reduced, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.act(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * gate.sigmoid()


class BNLinear(nn.Sequential):
    """Batch norm and linear layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.l = nn.Linear(in_features, out_features)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def folded(self) -> nn.Linear:
        """The single linear layer that this pair is in evaluation mode."""
        return fold_norm_linear(self.bn, self.l)


def _stem(in_channels: int, channels: int, backend: Backend) -> nn.Sequential:
    widths = [in_channels, channels // 8, channels // 4, channels // 2, channels]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [ConvBN(before, after, kernel_size=3, stride=2, padding=1, backend=backend), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _subsample(in_channels: int, out_channels: int, ffn_ratio: float, backend: Backend) -> list[nn.Module]:
    def local(channels: int) -> nn.Sequential:
        return nn.Sequential(Residual(_depthwise(channels, 1.0, backend)), Residual(FFN(channels, ffn_ratio)))

    return [local(in_channels), PatchMerging(in_channels, out_channels, backend), local(out_channels)]


def _depthwise(channels: int, gamma: float, backend: Backend) -> ConvBN:
    return ConvBN(channels, channels, kernel_size=3, padding=1, groups=channels, gamma=gamma, backend=backend)


def _classifier(in_channels: int, num_classes: int) -> nn.Module:
    return BNLinear(in_channels, num_classes) if num_classes else nn.Identity()


def fold(module: nn.Module) -> None:
    """Put the folded form of every layer inside a module in its place."""
    for name, child in module.named_children():
        if isinstance(child, Residual) and isinstance(child.m, ConvBN):
            setattr(module, name, child.m.folded(residual=True))
        elif isinstance(child, ConvBN | BNLinear):
            setattr(module, name, child.folded())
        elif isinstance(child, LocalWindowAttention):
            child.fold()
        else:
            fold(child)


def _checked_arch(arch: str | Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if isinstance(arch, str):
        if arch.lower() not in settings:
            raise ValueError(f"arch must be one of {sorted(settings)} or a dict; got {arch!r}")
        return settings[arch.lower()]
    if not isinstance(arch, Mapping):
        raise TypeError(f"arch must be a name or a dict; got {type(arch).__name__}")
    if not _ARCH_REQUIRED <= set(arch) <= _ARCH_REQUIRED | _ARCH_OPTIONAL:
        raise ValueError(
            f"arch needs {sorted(_ARCH_REQUIRED)} and may have {sorted(_ARCH_OPTIONAL)}; got {sorted(arch)}"
        )
    for name in ("channels", "depths", "num_heads"):
        if not isinstance(arch[name], Sequence) or len(arch[name]) != NUM_STAGES:
            raise ValueError(f"arch[{name!r}] needs {NUM_STAGES} entries; got {arch[name]}")
        if min(arch[name]) < 1:
            raise ValueError(f"arch[{name!r}] must be positive; got {arch[name]}")
    if arch["channels"][0] % 8:
        raise ValueError(
            f"arch['channels'][0] must be a multiple of 8, the stem starts with an eighth of it; "
            f"got {arch['channels'][0]}"
        )
    if len(_key_dims(arch)) != NUM_STAGES:
        raise ValueError(f"arch['key_dim'] must be one number or {NUM_STAGES}; got {arch['key_dim']}")
    ffns = arch.get("ffns", (1, 1))
    if not isinstance(ffns, Sequence) or len(ffns) != 2 or min(ffns) < 0 or sum(ffns) < 1:
        raise ValueError(f"arch['ffns'] must be (before, after), not negative and not both 0; got {ffns}")
    if arch.get("ffn_ratio", 2) < 1:
        raise ValueError(f"arch['ffn_ratio'] must be at least 1; got {arch['ffn_ratio']}")
    return arch


def _key_dims(arch: Mapping[str, Any]) -> Sequence[int]:
    key_dim = arch.get("key_dim", 16)
    return (key_dim,) * NUM_STAGES if isinstance(key_dim, int) else key_dim


def _checked_img_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise TypeError(f"img_size must be an int or (height, width); got {img_size!r}")
    if any(side < STEM_STRIDE or side % STEM_STRIDE for side in sides):
        raise ValueError(f"img_size must be positive multiples of {STEM_STRIDE}; got {img_size}")
    return sides[0], sides[1]
