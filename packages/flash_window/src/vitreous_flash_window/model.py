"""Swin Transformer V1 and V2, whole: patch embedding, stages of window-attention blocks, patch merging.

Papers: Liu et al., "Swin Transformer", arXiv 2103.14030; Liu et al., "Swin Transformer V2", arXiv 2111.09883; the
attention operation is that of "Flash Window Attention", arXiv 2501.06480. Constructor arguments and state-dict keys
are those of MMPretrain 1.2.0's `SwinTransformer` and `SwinTransformerV2` plus `backend`; their checkpoints load
unchanged. From the outside in: the two backbones, a stage, the blocks, the layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from vitreous_core.backbone import stage_indices
from vitreous_core.gelu_linear import gelu_linear
from vitreous_core.hooks import has_hooks
from vitreous_core.ops.sum_norm import add_branch
from vitreous_core.stochastic_depth import branch_factors

from . import block_node
from .attention import FlashShiftWindowMSA, FlashWindowMSAV2, init_linear
from .layers import (
    LAYER_NORM,
    LayerConfig,
    apply_drop,
    apply_norm,
    build_activation,
    build_dropout,
    build_norm,
    drop_rate,
    pair,
    split_drop,
    sum_and_norm,
)
from .ops import Backend

Shape = tuple[int, int]
Config = Mapping[str, Any]


class _SwinBackbone(nn.Module, ABC):
    """What V1 and V2 share: the stem, the loop's bookkeeping, freezing, and adapting checkpoints."""

    arch_zoo: ClassVar[dict[str, dict[str, Any]]]
    _version = 3  # as MMPretrain's, so that it does not take our files for old ones

    def __init__(
        self,
        arch: str | Config,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_channels: int,
        drop_rate: float,
        out_indices: int | Sequence[int],
        use_abs_pos_embed: bool,
        interpolate_mode: str,
        frozen_stages: int,
        norm_eval: bool,
        patch_cfg: Config | None,
    ) -> None:
        super().__init__()
        self.arch_settings = self._settings(arch)
        self.embed_dims: int = self.arch_settings["embed_dims"]
        self.depths = tuple(self.arch_settings["depths"])
        self.num_heads = tuple(self.arch_settings["num_heads"])
        self.num_layers = len(self.depths)
        if len(self.num_heads) != self.num_layers:
            raise ValueError(f"arch needs one num_heads per stage; got {self.num_heads} for depths {self.depths}")
        self.out_indices = stage_indices(out_indices, self.num_layers)
        if not -1 <= frozen_stages < self.num_layers:
            raise ValueError(f"frozen_stages must be in [-1, {self.num_layers}); got {frozen_stages}")
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.interpolate_mode = interpolate_mode

        self.patch_embed = PatchEmbed(
            **{
                "in_channels": in_channels,
                "embed_dims": self.embed_dims,
                "kernel_size": patch_size,
                "stride": patch_size,
                "input_size": img_size,
                **(patch_cfg or {}),
            }
        )
        self.patch_resolution = self.patch_embed.init_out_size
        self.absolute_pos_embed: nn.Parameter | None
        self.register_parameter("absolute_pos_embed", None)
        if use_abs_pos_embed:
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, math.prod(self.patch_resolution), self.embed_dims))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.drop_after_pos = nn.Dropout(drop_rate)

    @classmethod
    def _settings(cls, arch: str | Config) -> dict[str, Any]:
        if isinstance(arch, str):
            for name, settings in cls.arch_zoo.items():
                if arch.lower() in (name, name[0]):
                    return settings
            raise ValueError(f"arch must be one of {', '.join(cls.arch_zoo)}, or a dict; got {arch!r}")
        needed = set(cls.arch_zoo["tiny"])
        if not isinstance(arch, Mapping) or set(arch) != needed:
            got = sorted(arch) if isinstance(arch, Mapping) else type(arch).__name__
            raise ValueError(f"arch must be a name or a dict with the keys {sorted(needed)}; got {got}")
        return dict(arch)

    def _add_norms(self, channels: Sequence[int], norm_cfg: LayerConfig | None) -> None:
        for index in self.out_indices:
            self.add_module(f"norm{index}", build_norm(norm_cfg, channels[index]))

    def _embed(self, x: Tensor) -> tuple[Tensor, Shape]:
        x, shape = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + resize_position_embedding(
                self.absolute_pos_embed, self.patch_resolution, shape, self.interpolate_mode
            )
        return self.drop_after_pos(x), shape

    def _output(self, index: int, x: Tensor, shape: Shape) -> Tensor:
        x = apply_norm(self.get_submodule(f"norm{index}"), x)
        return x.unflatten(1, shape).permute(0, 3, 1, 2).contiguous()

    def train(self, mode: bool = True) -> _SwinBackbone:
        """As `nn.Module.train`; frozen stages stay in eval mode, and batch norms too with `norm_eval`."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        self.drop_after_pos.eval()
        if self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad_(False)
        for module in (self.patch_embed, *self.stages[: self.frozen_stages + 1]):
            module.eval().requires_grad_(False)
        for index in self.out_indices:
            if index <= self.frozen_stages:
                self.get_submodule(f"norm{index}").requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rates, and the number of depths.

        0 is the stem, the last depth is what follows the stages. A patch merging has the depth of the block before.

        Args:
            param_name: e.g. `"backbone.stages.0.blocks.1.norm1.weight"`.
            prefix: of the backbone's parameters, e.g. `"backbone."`.
        """
        last = sum(self.depths) + 1
        if not param_name.startswith(prefix):
            return last, last + 1
        parts = param_name.removeprefix(prefix).split(".")
        if parts[0] in ("patch_embed", "absolute_pos_embed"):
            depth = 0
        elif parts[0] != "stages":
            depth = last
        elif parts[2] == "blocks":
            depth = sum(self.depths[: int(parts[1])]) + int(parts[3]) + 1
        else:
            depth = self._blocks_before_merge(int(parts[1]))
        return depth, last + 1

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.startswith("norm."):  # files from before there was a norm per output
                state_dict[f"{prefix}norm{self.num_layers - 1}.{name.removeprefix('norm.')}"] = state_dict.pop(key)
            elif name.endswith("attn_mask"):  # a function of the image size
                del state_dict[key]
        key = f"{prefix}absolute_pos_embed"
        if self.absolute_pos_embed is not None and key in state_dict:
            source = state_dict[key]
            side = math.isqrt(source.shape[1])
            if source.shape != self.absolute_pos_embed.shape and side**2 == source.shape[1]:
                state_dict[key] = resize_position_embedding(
                    source, (side, side), self.patch_resolution, self.interpolate_mode
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @abstractmethod
    def _blocks_before_merge(self, stage: int) -> int:
        """Number of blocks before the patch merging of a stage."""


class FlashSwinTransformer(_SwinBackbone):
    """Swin Transformer (arXiv 2103.14030) on `shifted_window_attention`.

    Images of any size: the image is padded to whole patches, maps to whole windows.

    Args:
        arch: `"tiny"`, `"small"`, `"base"`, `"large"` (or the first letter), or a dict with `embed_dims`, `depths`,
            `num_heads`.
        img_size: expected image size; only an absolute position embedding depends on it.
        patch_size: side of the patches.
        in_channels: channels of the image.
        window_size: side of the windows.
        drop_rate: dropout after the patch embedding.
        drop_path_rate: stochastic depth of the last block; grows linearly from zero.
        out_indices: stages to return, negatives count from the end.
        out_after_downsample: return stages after their patch merging.
        use_abs_pos_embed: add a learnt position embedding, resized to the map.
        interpolate_mode: how it is resized.
        with_cp: recompute the blocks in the backward pass to save memory.
        frozen_stages: freeze the stem and the stages up to this one; -1 for none.
        norm_eval: keep batch norms in eval mode.
        pad_small_map: see `FlashShiftWindowMSA`.
        norm_cfg: norm of each output, or None.
        stage_cfgs: further arguments of `SwinStage`, one dict for all stages or one each, e.g.
            `dict(block_cfgs=dict(window_size=12))`.
        patch_cfg: further arguments of `PatchEmbed`.
        backend: see `ops.shifted_window_attention`.

    Examples:
        >>> FlashSwinTransformer("tiny", out_indices=(2, -1))(torch.randn(1, 3, 224, 224))[0].shape
        torch.Size([1, 384, 14, 14])
    """

    arch_zoo: ClassVar = {
        "tiny": {"embed_dims": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
        "small": {"embed_dims": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
        "base": {"embed_dims": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
        "large": {"embed_dims": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
    }

    def __init__(
        self,
        arch: str | Config = "tiny",
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_channels: int = 3,
        window_size: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: int | Sequence[int] = -1,
        out_after_downsample: bool = False,
        use_abs_pos_embed: bool = False,
        interpolate_mode: str = "bicubic",
        with_cp: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        pad_small_map: bool = False,
        norm_cfg: LayerConfig | None = LAYER_NORM,
        stage_cfgs: Config | Sequence[Config] | None = None,
        patch_cfg: Config | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            arch, img_size, patch_size, in_channels, drop_rate, out_indices, use_abs_pos_embed, interpolate_mode,
            frozen_stages, norm_eval, patch_cfg,
        )  # fmt: skip
        self.out_after_downsample = out_after_downsample
        drop_paths = _drop_path_schedule(drop_path_rate, self.depths)
        self.stages = nn.ModuleList()
        channels = [self.embed_dims]
        for index, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            stage = SwinStage(
                **{
                    "embed_dims": channels[-1],
                    "depth": depth,
                    "num_heads": heads,
                    "window_size": window_size,
                    "downsample": index < self.num_layers - 1,
                    "drop_paths": drop_paths[index],
                    "with_cp": with_cp,
                    "pad_small_map": pad_small_map,
                    "backend": backend,
                    **_nth_config("stage_cfgs", stage_cfgs, index, self.num_layers),
                }
            )
            self.stages.append(stage)
            channels.append(stage.out_channels)
        self.num_features = channels[1:] if out_after_downsample else channels[:-1]
        self._add_norms(self.num_features, norm_cfg)
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image `[B, in_channels, height, width]` to one map `[B, C, height', width']` per output stage."""
        x, shape = self._embed(x)
        outputs = []
        for index, stage in enumerate(self.stages):
            x = stage(x, shape)
            if self.out_after_downsample and stage.downsample is not None:
                x, shape = stage.downsample(x, shape)
            if index in self.out_indices:
                outputs.append(self._output(index, x, shape))
            if not self.out_after_downsample and stage.downsample is not None:
                x, shape = stage.downsample(x, shape)
        return tuple(outputs)

    def _blocks_before_merge(self, stage: int) -> int:
        return sum(self.depths[: stage + 1])


class FlashSwinTransformerV2(_SwinBackbone):
    """Swin Transformer V2 (arXiv 2111.09883) on `shifted_window_attention`: cosine attention, norms after the branch.

    Args:
        arch: `"tiny"`, `"small"`, `"base"`, `"large"`, `"huge"`, `"giant"` (or the first letter), or a dict with
            `embed_dims`, `depths`, `num_heads`, `extra_norm_every_n_blocks`.
        img_size: expected image size; only an absolute position embedding depends on it.
        patch_size: side of the patches.
        in_channels: channels of the image.
        window_size: side of the windows, for all stages or one each.
        drop_rate: dropout after the patch embedding.
        drop_path_rate: stochastic depth of the last block; grows linearly from zero.
        out_indices: stages to return, negatives count from the end.
        use_abs_pos_embed: add a learnt position embedding, resized to the map.
        interpolate_mode: how it is resized.
        with_cp: recompute the blocks in the backward pass to save memory.
        frozen_stages: freeze the stem and the stages up to this one; -1 for none.
        norm_eval: keep batch norms in eval mode.
        pad_small_map: see `FlashShiftWindowMSA`.
        norm_cfg: norm of each output, or None.
        stage_cfgs: further arguments of `SwinStageV2`, one dict for all stages or one each.
        patch_cfg: further arguments of `PatchEmbed`.
        pretrained_window_sizes: the window side that a loaded checkpoint was trained with, for all stages or one
            each; zero for the same.
        backend: see `ops.shifted_window_attention`.
    """

    # The heads of "huge" are MMPretrain's choice; neither huge nor giant was released.
    arch_zoo: ClassVar = {
        **{name: {**arch, "extra_norm_every_n_blocks": 0} for name, arch in FlashSwinTransformer.arch_zoo.items()},
        "huge": {
            "embed_dims": 352,
            "depths": (2, 2, 18, 2),
            "num_heads": (8, 16, 32, 64),
            "extra_norm_every_n_blocks": 6,
        },
        "giant": {
            "embed_dims": 512,
            "depths": (2, 2, 42, 4),
            "num_heads": (16, 32, 64, 128),
            "extra_norm_every_n_blocks": 6,
        },
    }

    def __init__(
        self,
        arch: str | Config = "tiny",
        img_size: int | Sequence[int] = 256,
        patch_size: int | Sequence[int] = 4,
        in_channels: int = 3,
        window_size: int | Sequence[int] = 8,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: int | Sequence[int] = -1,
        use_abs_pos_embed: bool = False,
        interpolate_mode: str = "bicubic",
        with_cp: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        pad_small_map: bool = False,
        norm_cfg: LayerConfig | None = LAYER_NORM,
        stage_cfgs: Config | Sequence[Config] | None = None,
        patch_cfg: Config | None = None,
        pretrained_window_sizes: int | Sequence[int] = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            arch, img_size, patch_size, in_channels, drop_rate, out_indices, use_abs_pos_embed, interpolate_mode,
            frozen_stages, norm_eval, patch_cfg,
        )  # fmt: skip
        self.extra_norm_every_n_blocks: int = self.arch_settings["extra_norm_every_n_blocks"]
        self.window_sizes = _per_stage("window_size", window_size, self.num_layers)
        pretrained = _per_stage("pretrained_window_sizes", pretrained_window_sizes, self.num_layers)
        drop_paths = _drop_path_schedule(drop_path_rate, self.depths)
        self.stages = nn.ModuleList()
        channels = [self.embed_dims]
        for index, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            stage = SwinStageV2(
                **{
                    "embed_dims": channels[-1],
                    "depth": depth,
                    "num_heads": heads,
                    "window_size": self.window_sizes[index],
                    "downsample": index > 0,
                    "drop_paths": drop_paths[index],
                    "with_cp": with_cp,
                    "pad_small_map": pad_small_map,
                    "extra_norm_every_n_blocks": self.extra_norm_every_n_blocks,
                    "pretrained_window_size": pretrained[index],
                    "downsample_cfg": {"use_post_norm": True},
                    "backend": backend,
                    **_nth_config("stage_cfgs", stage_cfgs, index, self.num_layers),
                }
            )
            self.stages.append(stage)
            channels.append(stage.out_channels)
        self.num_features = channels[1:]
        self._add_norms(self.num_features, norm_cfg)
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image `[B, in_channels, height, width]` to one map `[B, C, height', width']` per output stage."""
        x, shape = self._embed(x)
        outputs = []
        for index, stage in enumerate(self.stages):
            if stage.downsample is not None:
                x, shape = stage.downsample(x, shape)
            x = stage(x, shape)
            if index in self.out_indices:
                outputs.append(self._output(index, x, shape))
        return tuple(outputs)

    def _blocks_before_merge(self, stage: int) -> int:
        return sum(self.depths[:stage])


class SwinStage(nn.Module):
    """Blocks at one resolution, every second one shifted, and the patch merging that follows them.

    The patch merging is for the backbone to call, which may want the map before it.

    Args:
        embed_dims: C.
        depth: number of blocks.
        num_heads, window_size, with_cp, pad_small_map, backend: of the blocks.
        downsample: whether a patch merging follows.
        downsample_cfg: further arguments of `PatchMerging`.
        drop_paths: stochastic depth, one for all blocks or one each.
        block_cfgs: further arguments of `SwinBlock`, one dict for all blocks or one each.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        num_heads: int,
        window_size: int = 7,
        downsample: bool = False,
        downsample_cfg: Config | None = None,
        drop_paths: float | Sequence[float] = 0.0,
        block_cfgs: Config | Sequence[Config] | None = None,
        with_cp: bool = False,
        pad_small_map: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(
                **{
                    "embed_dims": embed_dims,
                    "num_heads": num_heads,
                    "window_size": window_size,
                    "shift": index % 2 == 1,
                    "drop_path": _nth_drop_path(drop_paths, index, depth),
                    "with_cp": with_cp,
                    "pad_small_map": pad_small_map,
                    "backend": backend,
                    **_nth_config("block_cfgs", block_cfgs, index, depth),
                }
            )
            for index in range(depth)
        )
        self.downsample: PatchMerging | None = None
        if downsample:
            merging = {"in_channels": embed_dims, "out_channels": 2 * embed_dims, **(downsample_cfg or {})}
            self.downsample = PatchMerging(**merging)
        self.out_channels = embed_dims if self.downsample is None else self.downsample.out_channels

    def forward(self, x: Tensor, shape: Shape) -> Tensor:
        """The blocks, without the patch merging, on tokens `[B, height * width, C]`."""
        factors = _draw(self.blocks, x)
        branch = factor = None
        for index, block in enumerate(self.blocks):
            own_factors = factors[2 * index : 2 * index + 2]
            if _is_called(block):
                x = block(x if branch is None else add_branch(x, branch, factor), shape, *own_factors)
                branch = factor = None
            else:  # its last sum is left to the norm at the beginning of the next block
                x, branch, factor = block.attend_and_feed(x, branch, factor, shape, *own_factors)
        return x if branch is None else add_branch(x, branch, factor)


class SwinStageV2(nn.Module):
    """The patch merging of V2, which comes first, and the blocks at its resolution.

    Args:
        embed_dims: channels before the patch merging.
        extra_norm_every_n_blocks: a norm on the main branch after every so many blocks; 0 for none.
        pretrained_window_size: of the blocks.
        depth, num_heads, window_size, downsample, downsample_cfg, drop_paths, block_cfgs, with_cp, pad_small_map,
            backend: as in `SwinStage`.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        num_heads: int,
        window_size: int = 8,
        downsample: bool = False,
        downsample_cfg: Config | None = None,
        drop_paths: float | Sequence[float] = 0.0,
        block_cfgs: Config | Sequence[Config] | None = None,
        with_cp: bool = False,
        pad_small_map: bool = False,
        extra_norm_every_n_blocks: int = 0,
        pretrained_window_size: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.out_channels = 2 * embed_dims if downsample else embed_dims
        self.downsample: PatchMerging | None = None
        if downsample:
            merging = {"in_channels": embed_dims, "out_channels": self.out_channels, **(downsample_cfg or {})}
            self.downsample = PatchMerging(**merging)
        every = extra_norm_every_n_blocks
        self.blocks = nn.ModuleList(
            SwinBlockV2(
                **{
                    "embed_dims": self.out_channels,
                    "num_heads": num_heads,
                    "window_size": window_size,
                    "shift": index % 2 == 1,
                    "extra_norm": every > 0 and (index + 1) % every == 0,
                    "drop_path": _nth_drop_path(drop_paths, index, depth),
                    "with_cp": with_cp,
                    "pad_small_map": pad_small_map,
                    "pretrained_window_size": pretrained_window_size,
                    "backend": backend,
                    **_nth_config("block_cfgs", block_cfgs, index, depth),
                }
            )
            for index in range(depth)
        )

    def forward(self, x: Tensor, shape: Shape) -> Tensor:
        """The blocks, without the patch merging, on tokens `[B, height * width, C]`."""
        factors = _draw(self.blocks, x)
        for index, block in enumerate(self.blocks):
            x = block(x, shape, *factors[2 * index : 2 * index + 2])
        return x


class SwinBlock(nn.Module):
    """`x + attn(norm1(x))`, then `x + ffn(norm2(x))` (Swin, eq. 3).

    Args:
        embed_dims: C.
        num_heads, window_size, pad_small_map, backend: of `FlashShiftWindowMSA`.
        shift: whether its windows are shifted by half their side.
        ffn_ratio: hidden channels of the feed-forward network over C.
        drop_path: stochastic depth of both branches.
        attn_cfgs: further arguments of `FlashShiftWindowMSA`.
        ffn_cfgs: further arguments of `FeedForward`.
        norm_cfg: of both norms.
        with_cp: recompute the block in the backward pass.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        shift: bool = False,
        ffn_ratio: float = 4.0,
        drop_path: float = 0.0,
        pad_small_map: bool = False,
        attn_cfgs: Config | None = None,
        ffn_cfgs: Config | None = None,
        norm_cfg: LayerConfig | None = LAYER_NORM,
        with_cp: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        attention = _attention_arguments(embed_dims, num_heads, window_size, shift, drop_path, pad_small_map, backend)
        self.norm1 = build_norm(norm_cfg, embed_dims)
        self.attn = FlashShiftWindowMSA(**{**attention, **(attn_cfgs or {})})
        self.norm2 = build_norm(norm_cfg, embed_dims)
        self.ffn = FeedForward(**{**_ffn_arguments(embed_dims, ffn_ratio, drop_path), **(ffn_cfgs or {})})

    def forward(
        self, x: Tensor, shape: Shape, attn_factor: Tensor | None = None, ffn_factor: Tensor | None = None
    ) -> Tensor:
        """Tokens `[B, height * width, C]` to the same shape.

        The factors `[B]` are those of stochastic depth on both branches, see `layers.split_drop`.
        """
        return _run(self._forward, self.with_cp, x, shape, attn_factor, ffn_factor)

    def _forward(self, x: Tensor, shape: Shape, attn_factor: Tensor | None, ffn_factor: Tensor | None) -> Tensor:
        return add_branch(*self.attend_and_feed(x, None, None, shape, attn_factor, ffn_factor))

    def attend_and_feed(
        self,
        x: Tensor,
        branch: Tensor | None,
        factor: Tensor | None,
        shape: Shape,
        attn_factor: Tensor | None,
        ffn_factor: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The block between two sums: tokens, and the branch with its factor `[B]` that is still to be added to them.

        Args:
            x: `[B, height * width, C]`.
            branch, factor: of the block before, still to be added to `x`; None in the first block.
            shape: (height, width).
            attn_factor, ffn_factor: as in `forward`.
        """
        at_once = block_node.run(self, x, branch, factor, shape, attn_factor) if type(self.ffn) is FeedForward else None
        if at_once is not None:
            x, branch = at_once
            return x, *split_drop(self.ffn.dropout_layer, branch, ffn_factor)
        # Stochastic depth is left to the sums, and they to the norms after them: fewer passes over memory.
        x, normed = sum_and_norm(self.norm1, x, branch, factor)
        branch, factor = split_drop(self.attn.drop, self.attn(normed, shape, drop=False), attn_factor)
        x, normed = sum_and_norm(self.norm2, x, branch, factor)
        return x, *split_drop(self.ffn.dropout_layer, self.ffn(normed, drop=False), ffn_factor)


class SwinBlockV2(nn.Module):
    """`x + norm1(attn(x))`, then `x + norm2(ffn(x))` (Swin V2, section 3.2), with cosine attention.

    As in MMPretrain, stochastic depth acts before the norm: a dropped branch adds the norm's bias.

    Args:
        extra_norm: a further norm on the main branch.
        pretrained_window_size: of `FlashWindowMSAV2`.
        embed_dims, num_heads, window_size, shift, ffn_ratio, drop_path, pad_small_map, attn_cfgs, ffn_cfgs, norm_cfg,
            with_cp, backend: as in `SwinBlock`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 8,
        shift: bool = False,
        extra_norm: bool = False,
        ffn_ratio: float = 4.0,
        drop_path: float = 0.0,
        pad_small_map: bool = False,
        attn_cfgs: Config | None = None,
        ffn_cfgs: Config | None = None,
        norm_cfg: LayerConfig | None = LAYER_NORM,
        with_cp: bool = False,
        pretrained_window_size: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        attention = _attention_arguments(embed_dims, num_heads, window_size, shift, drop_path, pad_small_map, backend)
        v2 = {"window_msa": FlashWindowMSAV2, "pretrained_window_size": pretrained_window_size}
        self.attn = FlashShiftWindowMSA(**{**attention, **(attn_cfgs or {}), **v2})
        self.norm1 = build_norm(norm_cfg, embed_dims)
        self.ffn = FeedForward(**{**_ffn_arguments(embed_dims, ffn_ratio, drop_path), **(ffn_cfgs or {})})
        self.norm2 = build_norm(norm_cfg, embed_dims)
        self.norm3 = build_norm(norm_cfg, embed_dims) if extra_norm else None

    def forward(
        self, x: Tensor, shape: Shape, attn_factor: Tensor | None = None, ffn_factor: Tensor | None = None
    ) -> Tensor:
        """Tokens `[B, height * width, C]` to the same shape; the factors are as in `SwinBlock.forward`."""
        return _run(self._forward, self.with_cp, x, shape, attn_factor, ffn_factor)

    def _forward(self, x: Tensor, shape: Shape, attn_factor: Tensor | None, ffn_factor: Tensor | None) -> Tensor:
        branch = apply_drop(self.attn.drop, self.attn(x, shape, drop=False), attn_factor)
        x = x + apply_norm(self.norm1, branch)
        branch = apply_drop(self.ffn.dropout_layer, self.ffn(x, drop=False), ffn_factor)
        x = x + apply_norm(self.norm2, branch)
        return x if self.norm3 is None else apply_norm(self.norm3, x)


class FeedForward(nn.Module):
    """Linear, activation, linear, with dropout after each and `dropout_layer` at the end; no residual.

    Args:
        embed_dims: C.
        feedforward_channels: hidden channels.
        num_fcs: number of linear layers, at least 2.
        act_cfg: the activation.
        ffn_drop: dropout rate.
        dropout_layer: see `FlashShiftWindowMSA`.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        num_fcs: int = 2,
        act_cfg: LayerConfig = {"type": "GELU"},  # noqa: B006 (never mutated)
        ffn_drop: float = 0.0,
        dropout_layer: LayerConfig | None = None,
    ) -> None:
        super().__init__()
        if num_fcs < 2:
            raise ValueError(f"num_fcs must be at least 2; got {num_fcs}")
        widths = [embed_dims] + [feedforward_channels] * (num_fcs - 1)
        hidden = [
            nn.Sequential(init_linear(before, after), build_activation(act_cfg), nn.Dropout(ffn_drop))
            for before, after in pairwise(widths)
        ]
        self.layers = nn.Sequential(*hidden, init_linear(feedforward_channels, embed_dims), nn.Dropout(ffn_drop))
        self.dropout_layer = build_dropout(dropout_layer)

    def forward(self, x: Tensor, drop: bool = True) -> Tensor:
        """`[..., C]` to the same shape; without `drop`, `dropout_layer` is left to the caller."""
        *hidden, linear, dropout = self.layers
        for layer, activation, hidden_dropout in hidden[:-1]:
            x = hidden_dropout(activation(layer(x)))
        layer, activation, hidden_dropout = hidden[-1]
        x = layer(x)
        is_gelu = type(activation) is nn.GELU and not has_hooks(activation)
        if is_gelu and (hidden_dropout.p == 0.0 or not hidden_dropout.training):
            x = gelu_linear(x, linear, activation.approximate)
        else:
            x = linear(hidden_dropout(activation(x)))
        x = dropout(x)
        return self.dropout_layer(x) if drop else x


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, and a norm: image to tokens.

    Args:
        in_channels: of the image.
        embed_dims: channels of the tokens.
        kernel_size, stride, dilation, bias: of the convolution; `stride` None means `kernel_size`.
        padding: `"corner"` pads right and bottom, `"same"` on both sides, until windows of the convolution cover the
            image; a number or pair pads every side by it.
        norm_cfg: of the tokens, or None.
        input_size: expected image size, for `init_out_size`.
        conv_type: only `"Conv2d"`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dims: int = 96,
        kernel_size: int | Sequence[int] = 4,
        stride: int | Sequence[int] | None = None,
        padding: str | int | Sequence[int] = "corner",
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        norm_cfg: LayerConfig | None = LAYER_NORM,
        input_size: int | Sequence[int] = 224,
        conv_type: str = "Conv2d",
    ) -> None:
        super().__init__()
        if conv_type != "Conv2d":
            raise ValueError(f"conv_type must be 'Conv2d'; got {conv_type!r}")
        self.in_channels = in_channels
        self.sampling = Sampling(kernel_size, stride, padding, dilation)
        self.projection = nn.Conv2d(
            in_channels,
            embed_dims,
            self.sampling.kernel,
            self.sampling.stride,
            dilation=self.sampling.dilation,
            bias=bias,
        )
        self.norm = build_norm(norm_cfg, embed_dims)
        self.init_out_size = self.sampling.output_shape(pair("img_size", input_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Shape]:
        """`[B, in_channels, height, width]` to tokens `[B, L, embed_dims]` and their (height, width)."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [B, {self.in_channels}, height, width]; got {tuple(x.shape)}")
        left, right, top, bottom = self.sampling.paddings((x.shape[2], x.shape[3]))
        if left or right or top or bottom:
            x = F.pad(x, (left, right, top, bottom))
        x = self.projection(x)
        shape = (x.shape[2], x.shape[3])
        return apply_norm(self.norm, x.flatten(2).transpose(1, 2)), shape


class PatchMerging(nn.Module):
    """Gathers the pixels of each cell into one token and reduces its channels: half the height and width.

    The gathered channels are ordered by channel first, then row and column in the cell, as `torch.nn.Unfold` does;
    Microsoft's release orders them by cell position first (see `convert`).

    Args:
        in_channels, out_channels: before and after.
        kernel_size: of the cells; `stride` None means the same.
        stride, padding, dilation: as in `PatchEmbed`.
        bias: of the reduction.
        norm_cfg: before the reduction (V1), or after it with `use_post_norm` (V2), or None.
        use_post_norm: see `norm_cfg`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 2,
        stride: int | Sequence[int] | None = None,
        padding: str | int | Sequence[int] = "corner",
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        norm_cfg: LayerConfig | None = LAYER_NORM,
        use_post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.sampling = Sampling(kernel_size, stride, padding, dilation)
        gathered = math.prod(self.sampling.kernel) * in_channels
        self.use_post_norm = use_post_norm
        # Created in the order of use, which is MMPretrain's order of parameters.
        if use_post_norm:
            self.reduction = init_linear(gathered, out_channels, bias=bias)
            self.norm = build_norm(norm_cfg, out_channels)
        else:
            self.norm = build_norm(norm_cfg, gathered)
            self.reduction = init_linear(gathered, out_channels, bias=bias)

    def forward(self, x: Tensor, shape: Shape) -> tuple[Tensor, Shape]:
        """Tokens `[B, height * width, in_channels]` to `[B, L, out_channels]` and their (height, width)."""
        x = x.unflatten(1, shape)
        left, right, top, bottom = self.sampling.paddings(shape)
        if left or right or top or bottom:
            x = F.pad(x, (0, 0, left, right, top, bottom))
        for axis in (0, 1):  # [B, height', width', C, kernel height, kernel width]
            dilation = self.sampling.dilation[axis]
            extent = dilation * (self.sampling.kernel[axis] - 1) + 1
            x = x.unfold(1 + axis, extent, self.sampling.stride[axis])[..., ::dilation]
        shape = (x.shape[1], x.shape[2])
        x = x.flatten(3).flatten(1, 2)
        if self.use_post_norm:
            return apply_norm(self.norm, self.reduction(x)), shape
        return self.reduction(apply_norm(self.norm, x, to_linear=True)), shape


class Sampling:
    """Where the windows of a strided sampling lie: its kernel, stride, dilation and padding, as pairs.

    Args:
        kernel_size, stride, padding, dilation: as in `PatchEmbed`.
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None,
        padding: str | int | Sequence[int],
        dilation: int | Sequence[int],
    ) -> None:
        self.kernel = pair("kernel_size", kernel_size)
        self.stride = pair("stride", kernel_size if stride is None else stride)
        self.dilation = pair("dilation", dilation)
        if isinstance(padding, str) and padding not in ("corner", "same"):
            raise ValueError(f"padding must be 'corner', 'same' or a size; got {padding!r}")
        self.padding = padding if isinstance(padding, str) else pair("padding", padding)

    def paddings(self, shape: Shape) -> tuple[int, int, int, int]:
        """Pixels to add left, right, top and bottom of an image (height, width)."""
        (top, bottom), (left, right) = (self._axis_paddings(axis, shape[axis]) for axis in (0, 1))
        return left, right, top, bottom

    def output_shape(self, shape: Shape) -> Shape:
        """(height, width) of the sampled image."""
        height, width = (
            (shape[axis] + sum(self._axis_paddings(axis, shape[axis])) - self._extent(axis)) // self.stride[axis] + 1
            for axis in (0, 1)
        )
        return height, width

    def _axis_paddings(self, axis: int, length: int) -> tuple[int, int]:
        if not isinstance(self.padding, str):
            return self.padding[axis], self.padding[axis]
        windows = -(-length // self.stride[axis])
        total = max((windows - 1) * self.stride[axis] + self._extent(axis) - length, 0)
        before = total // 2 if self.padding == "same" else 0
        return before, total - before

    def _extent(self, axis: int) -> int:
        return (self.kernel[axis] - 1) * self.dilation[axis] + 1


def resize_position_embedding(embedding: Tensor, source: Shape, target: Shape, mode: str) -> Tensor:
    """A position embedding `[1, source height * width, C]` for a map of another (height, width).

    Interpolated in at least float32, dtype of `embedding`; unchanged where the shapes agree.
    """
    if tuple(source) == tuple(target):
        return embedding
    image = embedding.unflatten(1, source).permute(0, 3, 1, 2)
    image = image.to(torch.promote_types(embedding.dtype, torch.float32))
    align = None if mode in ("nearest", "nearest-exact", "area") else False
    image = F.interpolate(image, size=target, mode=mode, align_corners=align)
    return image.flatten(2).transpose(1, 2).to(embedding.dtype)


def _attention_arguments(
    embed_dims: int,
    num_heads: int,
    window_size: int,
    shift: bool,
    drop_path: float,
    pad_small_map: bool,
    backend: Backend,
) -> dict[str, Any]:
    return {
        "embed_dims": embed_dims,
        "num_heads": num_heads,
        "window_size": window_size,
        "shift_size": window_size // 2 if shift else 0,
        "dropout_layer": {"type": "DropPath", "drop_prob": drop_path},
        "pad_small_map": pad_small_map,
        "backend": backend,
    }


def _ffn_arguments(embed_dims: int, ffn_ratio: float, drop_path: float) -> dict[str, Any]:
    return {
        "embed_dims": embed_dims,
        "feedforward_channels": int(embed_dims * ffn_ratio),
        "dropout_layer": {"type": "DropPath", "drop_prob": drop_path},
    }


def _draw(blocks: nn.ModuleList, x: Tensor) -> list[Tensor | None]:
    """Factors of stochastic depth on both branches of each block, drawn at once.

    MMPretrain draws for each branch by itself: the same seed leaves out other branches there.
    """
    rates = [drop_rate(drop) for block in blocks for drop in (block.attn.drop, block.ffn.dropout_layer)]
    return branch_factors(rates, x.shape[0], x.device)  # len() would fix the batch of an exported graph


def _is_called(block: nn.Module) -> bool:
    """Whether a block of a stage has to be called as a module: recomputed, wrapped, or with somebody listening."""
    return type(block) is not SwinBlock or block.with_cp or has_hooks(block)


def _run(block: Callable[..., Tensor], with_cp: bool, x: Tensor, *arguments: Any) -> Tensor:
    if with_cp and x.requires_grad:
        return checkpoint(block, x, *arguments, use_reentrant=False)
    return block(x, *arguments)


def _drop_path_schedule(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of all blocks by stage, growing linearly from zero to `rate`."""
    # On the CPU, so that a model can be built under the meta device.
    rates = torch.linspace(0, rate, sum(depths), device="cpu").split(list(depths))
    return [stage.tolist() for stage in rates]


def _per_stage(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise ValueError(f"{name} must be one number or {count} of them; got {value!r}")
    return values


def _nth_drop_path(drop_paths: float | Sequence[float], index: int, count: int) -> float:
    if not isinstance(drop_paths, Sequence):
        return drop_paths
    if len(drop_paths) != count:
        raise ValueError(f"drop_paths must have one entry per block ({count}); got {len(drop_paths)}")
    return drop_paths[index]


def _nth_config(name: str, configs: Config | Sequence[Config] | None, index: int, count: int) -> Config:
    if configs is None:
        return {}
    if isinstance(configs, Mapping):
        return configs
    if len(configs) != count:
        raise ValueError(f"{name} must be one dict or {count} of them; got {len(configs)}")
    return configs[index]
