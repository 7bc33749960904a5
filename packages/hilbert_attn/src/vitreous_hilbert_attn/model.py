"""HWT and HNT, the two backbones of "Hilbert-Guided Sparse Local Attention" (Li and Xu, arXiv 2511.05832), and NAT.

HWT is Swin (arXiv 2103.14030) and HNT is NAT (arXiv 2204.07143), with one change each: tokens lie on a space-filling
curve and attend along it. NAT itself is here too, exact, on the same curves: its neighbourhoods are squares of the
image whatever the order of the tokens.

The stem puts tokens on the curve of the first stage and each downsampling on that of the next, both of which copy
tokens anyway, so that no block does; every map that leaves a backbone is NCHW, in image order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from vitreous_core.backbone import stage_indices
from vitreous_core.gelu_linear import gelu_linear
from vitreous_core.ops.sum_norm import SumNorm, add_branch, sum_norm
from vitreous_core.stochastic_depth import branch_factors

from .attention import Backend, CurveAttention, HilbertNeighborhoodAttention, HilbertWindowAttention
from .attention_2d import NeighborhoodAttention2d
from .reorder import Curve, OrderName

Size = tuple[int, int]


class _HierarchicalBackbone(nn.Module):
    """What the backbones share: a stem, stages, one norm per output, and MMPretrain's conventions.

    A subclass sets `stages_name` and the modules `patch_embed` and `stages_name`.
    """

    stages_name: ClassVar[str]
    arch_settings: ClassVar[dict[str, dict[str, Any]]]

    def __init__(self, out_indices: int | Sequence[int], frozen_stages: int, norm_eval: bool, depth: int) -> None:
        super().__init__()
        if not -1 <= frozen_stages < depth:
            raise ValueError(f"frozen_stages must lie in -1..{depth - 1}; got {frozen_stages}")
        self.out_indices = stage_indices(out_indices, depth)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    @property
    def stages(self) -> nn.ModuleList:
        """The stages, first to last."""
        return getattr(self, self.stages_name)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the stages in `out_indices`.

        Args:
            images: `[B, in_channels, height, width]`, any size from one pixel up.

        Returns:
            One contiguous map `[B, C_i, height_i, width_i]` per out index, normalised.
        """
        curves = [stage.curve for stage in self.stages]
        tokens, size = self.patch_embed(images, curves[0])
        outputs = []
        for index, stage in enumerate(self.stages):
            tokens = stage(tokens, size)
            if index in self.out_indices:
                normed = curves[index].take_off(getattr(self, f"norm{index}")(tokens), *size)
                outputs.append(normed.mT.contiguous().unflatten(2, size))
            if index == self.out_indices[-1]:
                break
            tokens, size = stage.downsample(tokens, size, curves[index], curves[index + 1])
        return tuple(outputs)

    def train(self, mode: bool = True) -> _HierarchicalBackbone:
        """As `nn.Module.train`, but frozen stages, and norms under `norm_eval`, stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm | _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        """Frozen stages `k >= 0`: the stem, stages 0 to k with their downsampling, and their output norms."""
        if self.frozen_stages < 0:
            return
        frozen: list[nn.Module] = [self.patch_embed, *self.stages[: self.frozen_stages + 1]]
        frozen += [getattr(self, f"norm{i}") for i in self.out_indices if i <= self.frozen_stages]
        for module in frozen:
            module.eval().requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay.

        Args:
            param_name: name in the model's state dict.
            prefix: the backbone's prefix in it, e.g. `"backbone."`.

        Returns:
            `(depth, layers)`: 0 for the stem, 1 up for the blocks, `layers - 1` for the norms and whatever lies
            outside the backbone. A downsampling counts with the stage before it.
        """
        depths = [len(stage.blocks) for stage in self.stages]
        last = sum(depths) + 1
        if not param_name.startswith(prefix):
            return last, last + 1
        parts = param_name.removeprefix(prefix).split(".")
        if parts[0] == "patch_embed":
            return 0, last + 1
        if parts[0] != self.stages_name:
            return last, last + 1
        stage = int(parts[1])
        inside = int(parts[3]) + 1 if parts[2] == "blocks" else depths[stage]
        return sum(depths[:stage]) + inside, last + 1

    def _add_norms(self, channels: Sequence[int]) -> None:
        for index in self.out_indices:
            self.add_module(f"norm{index}", nn.LayerNorm(channels[index]))

    def _finish(self) -> None:
        """Initialise as Swin and NAT do (truncated normal 0.02, zero biases) and apply `frozen_stages`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._freeze()


class HilbertWindowTransformer(_HierarchicalBackbone):
    """HWT: a Swin whose windows are runs of `window_size^2` tokens along a curve, shifted in odd blocks.

    Where the smaller side of a map is at most `window_size`, that side takes its place and nothing is shifted.

    Paper: arXiv 2511.05832, HWT. `depths` of HWT-tiny are 2, 2, 6, 2: the released default of 3, 3, 6, 3 does not
    have the published cost.

    Args:
        arch: `"tiny"`, or a dict with `embed_dims`, `depths`, `num_heads`, and optionally `mlp_ratio` (4).
        img_size: side or `(height, width)` that the global bias tables are made for. Any other input works; the
            tables are then resized (bicubic) on the fly.
        in_channels: of the images.
        patch_size: side of a patch.
        window_size: side `w` of the square that a window has the area of.
        depths: overrides those of `arch`.
        order: the curve, see `HilbertWindowAttention`.
        relative_bias: whether blocks have a global relative position bias.
        qkv_bias: whether the query, key and value projections have biases.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        out_indices: stage or stages whose maps are returned; negative ones count from the end.
        frozen_stages: freeze the stem and stages 0 to this one; -1 freezes nothing.
        norm_eval: keep norms in evaluation mode (no effect on layer norms' output).
        with_cp: recompute each block in the backward pass to save memory.
        backend: `"auto"`, `"torch"`, `"flex"` or `"triton"`, see `vitreous_hilbert_attn.attention`.
    """

    stages_name = "layers"
    arch_settings: ClassVar = {
        "tiny": {"embed_dims": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "tiny",
        img_size: int | Size = 224,
        in_channels: int = 3,
        patch_size: int = 4,
        window_size: int = 7,
        depths: Sequence[int] | None = None,
        order: OrderName = "hilbert",
        relative_bias: bool = True,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        backend: Backend = "auto",
    ) -> None:
        settings = {"mlp_ratio": 4.0, **_arch(arch, self.arch_settings, depths, optional=("mlp_ratio",))}
        depths, heads = settings["depths"], settings["num_heads"]
        super().__init__(out_indices, frozen_stages, norm_eval, len(depths))
        channels = [settings["embed_dims"] * 2**index for index in range(len(depths))]
        map_size = tuple(-(-side // patch_size) for side in _pair("img_size", img_size))

        self.patch_embed = PatchEmbed(in_channels, channels[0], patch_size)
        self.layers = nn.ModuleList()
        rates = _drop_path_rates(drop_path_rate, depths)
        for index, depth in enumerate(depths):
            blocks = [
                CurveBlock(
                    HilbertWindowAttention(
                        channels[index], heads[index], window_size, block % 2 * (window_size**2 // 2), order=order,
                        relative_bias=relative_bias, map_size=map_size, qkv_bias=qkv_bias, backend=backend,
                    ),
                    channels[index], mlp_ratio=settings["mlp_ratio"],
                )
                for block in range(depth)
            ]  # fmt: skip
            for block in blocks:
                block.register_load_state_dict_pre_hook(_drop_mask_buffer)
            last = index == len(depths) - 1
            downsample = None if last else PatchMerging(channels[index], channels[index + 1])
            self.layers.append(CurveStage(blocks, rates[index], downsample, with_cp))
            map_size = tuple(-(-side // 2) for side in map_size)
        self._add_norms(channels)
        self._finish()


class _NeighborhoodBackbone(_HierarchicalBackbone):
    """NAT's architecture; a subclass says which attention each block has."""

    stages_name = "levels"
    arch_settings: ClassVar = {
        "mini": {"embed_dims": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16)},
        "tiny": {"embed_dims": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16)},
        "small": {
            "embed_dims": 96, "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0,
            "layer_scale": 1e-5,
        },
        "base": {
            "embed_dims": 128, "depths": (3, 4, 18, 5), "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0,
            "layer_scale": 1e-5,
        },
    }  # fmt: skip

    def __init__(
        self,
        attention: Callable[[int, int, int, int], CurveAttention],
        arch: str | Mapping[str, Any],
        in_channels: int,
        depths: Sequence[int] | None,
        drop_path_rate: float,
        out_indices: int | Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
    ) -> None:
        """`attention(level, block, channels, heads)` makes the attention of a block."""
        settings = _arch(arch, self.arch_settings, depths, optional=("mlp_ratio", "layer_scale"))
        settings = {"mlp_ratio": 3.0, "layer_scale": None, **settings}
        depths, heads = settings["depths"], settings["num_heads"]
        super().__init__(out_indices, frozen_stages, norm_eval, len(depths))
        channels = [settings["embed_dims"] * 2**index for index in range(len(depths))]

        self.patch_embed = ConvTokenizer(in_channels, channels[0])
        self.levels = nn.ModuleList()
        rates = _drop_path_rates(drop_path_rate, depths)
        for index, depth in enumerate(depths):
            blocks = [
                CurveBlock(
                    attention(index, block, channels[index], heads[index]), channels[index],
                    mlp_ratio=settings["mlp_ratio"], layer_scale=settings["layer_scale"],
                )
                for block in range(depth)
            ]  # fmt: skip
            last = index == len(depths) - 1
            downsample = None if last else ConvDownsampler(channels[index], channels[index + 1])
            self.levels.append(CurveStage(blocks, rates[index], downsample, with_cp))
        self._add_norms(channels)
        self._finish()


class HilbertNeighborhoodTransformer(_NeighborhoodBackbone):
    """HNT: a NAT whose neighbourhoods are the `kernel_size` nearest tokens along a curve.

    A level with fewer tokens than `kernel_size` attends to all of them.

    Paper: arXiv 2511.05832, HNT. `kernel_size` is 49 in every variant, which is what the published costs of mini
    and tiny belong to.

    Args:
        arch: `"mini"`, `"tiny"`, `"small"`, `"base"`, or a dict with `embed_dims`, `depths`, `num_heads`, and
            optionally `mlp_ratio` (3) and `layer_scale` (None; the initial value of the scales otherwise).
        in_channels: of the images.
        kernel_size: keys per query, counted along the curve.
        depths: overrides those of `arch`.
        order: the curve, see `HilbertWindowAttention`.
        relative_bias: whether blocks have a relative position bias `rpb` along the curve. The released code has
            one or not depending on the NATTEN version.
        qkv_bias, drop_path_rate, out_indices, frozen_stages, norm_eval, with_cp, backend: as in
            `HilbertWindowTransformer`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "mini",
        in_channels: int = 3,
        kernel_size: int = 49,
        depths: Sequence[int] | None = None,
        order: OrderName = "hilbert",
        relative_bias: bool = True,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.2,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        backend: Backend = "auto",
    ) -> None:
        def attention(level: int, block: int, channels: int, heads: int) -> HilbertNeighborhoodAttention:
            return HilbertNeighborhoodAttention(
                channels, heads, kernel_size, order=order, relative_bias=relative_bias, qkv_bias=qkv_bias,
                backend=backend,
            )  # fmt: skip

        super().__init__(
            attention, arch, in_channels, depths, drop_path_rate, out_indices, frozen_stages, norm_eval, with_cp
        )


class NeighborhoodAttentionTransformer(_NeighborhoodBackbone):
    """NAT, and with `dilations` DiNAT: every pixel sees the `kernel_size` x `kernel_size` pixels nearest to it.

    Exact on every curve, so weights of the official models give the official results; see
    `vitreous_hilbert_attn.convert`. A level shorter than the kernel attends to all of its cells along that axis.

    Paper: arXiv 2204.07143 (NAT), 2209.15001 (DiNAT, whose mini to base have dilations 8, 4, 2, 1). This is the
    two-dimensional model that HNT is compared with.

    Args:
        arch, in_channels, depths: as in `HilbertNeighborhoodTransformer`.
        kernel_size: side of the neighbourhood, or (rows, columns).
        dilations: for each level, the step between visible cells in its odd blocks; even blocks have 1. None: 1.
        order: the curve that tokens lie on. It does not change the result.
        relative_bias: whether blocks have a relative position bias `rpb` `[H, 2 * K - 1, 2 * K - 1]`.
        qkv_bias, drop_path_rate, out_indices, frozen_stages, norm_eval, with_cp, backend: as in
            `HilbertWindowTransformer`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "mini",
        in_channels: int = 3,
        kernel_size: int | Sequence[int] = 7,
        dilations: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        order: OrderName = "hilbert",
        relative_bias: bool = True,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.2,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        backend: Backend = "auto",
    ) -> None:
        kernel = _pair("kernel_size", kernel_size)
        levels = len(_arch(arch, self.arch_settings, depths, optional=("mlp_ratio", "layer_scale"))["depths"])
        steps = (1,) * levels if dilations is None else tuple(dilations)
        if len(steps) != levels:
            raise ValueError(f"dilations must have one entry for each of the {levels} levels; got {steps}")

        def attention(level: int, block: int, channels: int, heads: int) -> NeighborhoodAttention2d:
            return NeighborhoodAttention2d(
                channels, heads, kernel, steps[level] if block % 2 else 1, order=order, relative_bias=relative_bias,
                qkv_bias=qkv_bias, backend=backend,
            )  # fmt: skip

        super().__init__(
            attention, arch, in_channels, depths, drop_path_rate, out_indices, frozen_stages, norm_eval, with_cp
        )


class CurveStage(nn.Module):
    """Blocks that work on tokens on one curve, with stochastic depth (arXiv 1603.09382): in training, a sample's branch
    is left out with the block's probability, and divided by one minus that otherwise.

    `downsample` belongs to the stage in the state dict, but the backbone calls it, after the stage's output.
    """

    def __init__(
        self, blocks: Sequence[CurveBlock], drop_path_rates: Sequence[float], downsample: nn.Module | None,
        with_cp: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.drop_path_rates = tuple(drop_path_rates)
        self.downsample = downsample
        self.with_cp = with_cp

    @property
    def curve(self) -> Curve:
        """The curve that the stage's tokens lie on."""
        return self.blocks[0].attn.curve

    def branch_factors(self, batch: int, device: torch.device) -> list[Tensor | None]:
        """What each sample's branches are multiplied by, two per block."""
        rates = [rate if self.training else 0.0 for rate in self.drop_path_rates for _ in range(2)]
        return branch_factors(rates, batch, device)

    def forward(self, tokens: Tensor, size: Size) -> Tensor:
        factors = self.branch_factors(tokens.shape[0], tokens.device)  # len() would fix the batch of an exported graph
        branch = factor = None
        for index, block in enumerate(self.blocks):
            arguments = (tokens, branch, factor, factors[2 * index], size)
            if self.with_cp and tokens.requires_grad:
                tokens, branch = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens, branch = block(*arguments)
            factor = factors[2 * index + 1]
        return add_branch(tokens, branch, factor)


class CurveBlock(nn.Module):
    """Pre-norm transformer block on tokens on a curve, with optional layer scales.

    Each norm adds the branch before it, so the block is given the last branch of the block before and leaves its own to
    the next: tokens are read and written once between two branches.
    """

    def __init__(self, attn: CurveAttention, dim: int, *, mlp_ratio: float, layer_scale: float | None = None) -> None:
        super().__init__()
        self.norm1 = SumNorm(dim)
        self.attn = attn
        self.norm2 = SumNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(
        self, tokens: Tensor, branch: Tensor | None, factor: Tensor | None, own_factor: Tensor | None, size: Size
    ) -> tuple[Tensor, Tensor]:
        """Tokens and the branch that is still to be added to them.

        Args:
            tokens: `[B, L, C]`.
            branch: of the block before, to be added to them; None in the first block.
            factor: of that branch, see `CurveStage.branch_factors`.
            own_factor: of this block's attention.
            size: `(height, width)`.
        """
        tokens, normed = self.norm1(tokens, branch, factor)
        mixed = self.attn(normed, size, on_curve=True)
        tokens, normed = self.norm2(tokens, mixed if self.gamma1 is None else self.gamma1 * mixed, own_factor)
        branch = self.mlp(normed)
        return tokens, branch if self.gamma2 is None else self.gamma2 * branch


class PatchEmbed(nn.Module):
    """Swin's stem: patches projected by a strided convolution, put on a curve, then a norm. Images are padded with
    zeros at the bottom and right to whole patches."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.norm = FirstNorm(dim)

    def forward(self, images: Tensor, target: Curve) -> tuple[Tensor, Size]:
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        tokens, size = _as_tokens(self.proj(_channels_last(images)), target)
        return self.norm(tokens), size


class PatchMerging(nn.Module):
    """Swin's downsampling: the four cells of a 2x2 square side by side, norm, linear. Odd maps are padded with
    zeros at the bottom and right."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm = SumNorm(4 * dim)

    def forward(self, tokens: Tensor, size: Size, source: Curve, target: Curve) -> tuple[Tensor, Size]:
        squares = source.merge(tokens, *size, target)
        _, normed = self.norm(squares)
        return self.reduction(normed), (-(-size[0] // 2), -(-size[1] // 2))


class ConvTokenizer(nn.Module):
    """NAT's stem: two 3x3 convolutions of stride 2, put on a curve, then a norm."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_channels, dim // 2, 3, 2, 1),
            nn.Conv2d(dim // 2, dim, 3, 2, 1),
        )
        self.norm = FirstNorm(dim)

    def forward(self, images: Tensor, target: Curve) -> tuple[Tensor, Size]:
        tokens, size = _as_tokens(self.proj(_channels_last(images)), target)
        return self.norm(tokens), size


class ConvDownsampler(nn.Module):
    """NAT's downsampling: a 3x3 convolution of stride 2 without bias, then a norm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False)
        self.norm = FirstNorm(out_dim)

    def forward(self, tokens: Tensor, size: Size, source: Curve, target: Curve) -> tuple[Tensor, Size]:
        maps = source.take_off(tokens, *size).unflatten(1, size).permute(0, 3, 1, 2)
        tokens, size = _as_tokens(self.reduction(maps), target)
        return self.norm(tokens), size


class FirstNorm(SumNorm):
    """Layer norm from which the tokens of a stage start: under autocast, too, in the precision of the parameters."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]  # nothing is added
        dtype = torch.promote_types(tokens.dtype, self.weight.dtype)
        return sum_norm(tokens, None, self.weight, self.bias, eps=self.eps, dtype=dtype)[1]


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return gelu_linear(self.fc1(tokens), self.fc2)


def _channels_last(images: Tensor) -> Tensor:
    """Convolutions then give channels-last maps, whose tokens lie side by side."""
    return images.contiguous(memory_format=torch.channels_last)


def _as_tokens(maps: Tensor, curve: Curve) -> tuple[Tensor, Size]:
    """`[B, C, height, width]` as tokens `[B, L, C]` on a curve, and the size."""
    size = (int(maps.shape[2]), int(maps.shape[3]))  # torch.jit.trace would make tensors of them
    return curve.put_on(maps.flatten(2).mT, *size), size


def _arch(
    arch: str | Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]],
    depths: Sequence[int] | None,
    optional: Sequence[str],
) -> dict[str, Any]:
    """Settings of a named or custom architecture, checked."""
    if isinstance(arch, str):
        if arch not in known:
            raise ValueError(f"arch must be one of {sorted(known)} or a dict of settings; got {arch!r}")
        settings = dict(known[arch])
    else:
        settings = dict(arch)
        required = {"embed_dims", "depths", "num_heads"}
        if not required <= set(settings) <= required | set(optional):
            raise ValueError(
                f"arch as a dict must have the keys {sorted(required)}, and may have {sorted(optional)}; "
                f"got {sorted(settings)}"
            )
    if depths is not None:
        settings["depths"] = tuple(depths)
    depths, heads = tuple(settings["depths"]), tuple(settings["num_heads"])
    if not depths or len(depths) != len(heads) or min(depths) < 1:
        raise ValueError(
            "depths and num_heads must have one entry of at least 1 per stage; "
            f"got depths {depths} and num_heads {heads}"
        )
    return settings


def _drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates per stage and block, linear from 0 in the first block to `rate` in the last."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate must lie in 0 (inclusive) to 1 (exclusive); got {rate}")
    step = rate / max(sum(depths) - 1, 1)
    first = [sum(depths[:stage]) for stage in range(len(depths))]
    return [[step * (start + block) for block in range(depth)] for start, depth in zip(first, depths, strict=True)]


def _pair(name: str, value: int | Sequence[int]) -> Size:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be a side or (height, width), at least 1; got {value!r}")
    return pair


def _drop_mask_buffer(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Official HWT checkpoints carry the shift masks, which follow from the map's size; ours are not stored."""
    state.pop(prefix + "attn_mask", None)
