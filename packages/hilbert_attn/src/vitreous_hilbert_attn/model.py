"""HWT and HNT: the two backbones of "Hilbert-Guided Sparse Local Attention" (Li and Xu, arXiv 2511.05832).

HWT is Swin (arXiv 2103.14030) and HNT is NAT (arXiv 2204.07143), with one change each: tokens are put on a
space-filling curve at the entry of every stage, attend along it, and go back to the image at the stage's end. Maps
between stages are channels-last `[B, height, width, C]`; every map that leaves a backbone is NCHW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from vitreous_core.backbone import stage_indices

from .attention import Backend, HilbertNeighborhoodAttention, HilbertWindowAttention, OrderName, permute_tokens

Size = tuple[int, int]


class _HierarchicalBackbone(nn.Module):
    """What both backbones share: a stem, stages, one norm per output, and MMPretrain's conventions.

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
        maps, outputs = self.patch_embed(images), []
        for index, stage in enumerate(self.stages):
            maps = stage(maps)
            if index in self.out_indices:
                outputs.append(getattr(self, f"norm{index}")(maps).permute(0, 3, 1, 2).contiguous())
            if index == self.out_indices[-1]:
                break
            if stage.downsample is not None:
                maps = stage.downsample(maps)
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
                HilbertWindowBlock(
                    channels[index], heads[index], window_size, shift=block % 2 * (window_size**2 // 2),
                    mlp_ratio=settings["mlp_ratio"], drop_path=rates[index][block], order=order,
                    map_size=map_size if relative_bias else None, qkv_bias=qkv_bias, backend=backend,
                )
                for block in range(depth)
            ]  # fmt: skip
            last = index == len(depths) - 1
            downsample = None if last else PatchMerging(channels[index], channels[index + 1])
            self.layers.append(CurveStage(blocks, downsample, with_cp))
            map_size = tuple(-(-side // 2) for side in map_size)
        self._add_norms(channels)
        self._finish()


class HilbertNeighborhoodTransformer(_HierarchicalBackbone):
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
                HilbertNeighborhoodBlock(
                    channels[index], heads[index], kernel_size, mlp_ratio=settings["mlp_ratio"],
                    layer_scale=settings["layer_scale"], drop_path=rates[index][block], order=order,
                    relative_bias=relative_bias, qkv_bias=qkv_bias, backend=backend,
                )
                for block in range(depth)
            ]  # fmt: skip
            last = index == len(depths) - 1
            downsample = None if last else ConvDownsampler(channels[index], channels[index + 1])
            self.levels.append(CurveStage(blocks, downsample, with_cp))
        self._add_norms(channels)
        self._finish()


class CurveStage(nn.Module):
    """Blocks that work on tokens in curve order, between a map on the way in and a map on the way out.

    `downsample` belongs to the stage in the state dict, but the backbone calls it, after the stage's output.
    """

    def __init__(
        self,
        blocks: Sequence[HilbertWindowBlock | HilbertNeighborhoodBlock],
        downsample: nn.Module | None,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, maps: Tensor) -> Tensor:
        size = (int(maps.shape[1]), int(maps.shape[2]))  # torch.jit.trace would make tensors of them
        order, position = self.blocks[0].attn.order_tables(*size, maps.device)
        tokens = permute_tokens(maps.flatten(1, 2), order, position)
        for block in self.blocks:
            if self.with_cp and tokens.requires_grad:
                tokens = checkpoint(block, tokens, size, use_reentrant=False)
            else:
                tokens = block(tokens, size)
        return permute_tokens(tokens, position, order).unflatten(1, size)


class HilbertWindowBlock(nn.Module):
    """Pre-norm transformer block of HWT on tokens in curve order."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, *, shift: int, mlp_ratio: float, drop_path: float,
        order: OrderName, map_size: Size | None, qkv_bias: bool, backend: Backend,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = HilbertWindowAttention(
            dim, num_heads, window_size, shift, order=order, relative_bias=map_size is not None,
            map_size=map_size, qkv_bias=qkv_bias, backend=backend,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.register_load_state_dict_pre_hook(_drop_mask_buffer)

    def forward(self, tokens: Tensor, size: Size) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size, on_curve=True))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class HilbertNeighborhoodBlock(nn.Module):
    """Pre-norm transformer block of HNT on tokens in curve order, with optional layer scales."""

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int, *, mlp_ratio: float, layer_scale: float | None,
        drop_path: float, order: OrderName, relative_bias: bool, qkv_bias: bool, backend: Backend,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = HilbertNeighborhoodAttention(
            dim, num_heads, kernel_size, order=order, relative_bias=relative_bias, qkv_bias=qkv_bias,
            backend=backend,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        scaled = layer_scale is not None
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale)) if scaled else None

    def forward(self, tokens: Tensor, size: Size) -> Tensor:
        branch = self.attn(self.norm1(tokens), size, on_curve=True)
        tokens = tokens + self.drop_path(branch if self.gamma1 is None else self.gamma1 * branch)
        branch = self.mlp(self.norm2(tokens))
        return tokens + self.drop_path(branch if self.gamma2 is None else self.gamma2 * branch)


class PatchEmbed(nn.Module):
    """Swin's stem: patches projected by a strided convolution, then a norm. Images are padded with zeros at the
    bottom and right to whole patches."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Swin's downsampling: the four cells of a 2x2 square side by side, norm, linear. Odd maps are padded with
    zeros at the bottom and right."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[1:3]
        maps = F.pad(maps, (0, 0, 0, width % 2, 0, height % 2))
        # (row, column) offsets in the order of the official weights: down first, then right.
        cells = [maps[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(cells, dim=-1)))


class ConvTokenizer(nn.Module):
    """NAT's stem: two 3x3 convolutions of stride 2, then a norm."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_channels, dim // 2, 3, 2, 1),
            nn.Conv2d(dim // 2, dim, 3, 2, 1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """NAT's downsampling: a 3x3 convolution of stride 2 without bias, then a norm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(self.reduction(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, a sample's branch is zero with probability `rate`, and is
    divided by `1 - rate` otherwise."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.rate)
        return branch * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


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


def _pair(name: str, value: int | Size) -> Size:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be a side or (height, width), at least 1; got {value!r}")
    return pair


def _drop_mask_buffer(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Official HWT checkpoints carry the shift masks, which follow from the map's size; ours are not stored."""
    state.pop(prefix + "attn_mask", None)
