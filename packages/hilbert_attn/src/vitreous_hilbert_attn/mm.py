"""MMPretrain's view of this paper: importing it registers the backbones and the model index."""

from __future__ import annotations

from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import MODELS

from vitreous_core.mm import BackboneAdapter, register_paper

from .model import HilbertNeighborhoodTransformer, HilbertWindowTransformer, NeighborhoodAttentionTransformer


@MODELS.register_module(name="HilbertWindowTransformer")
class MMHilbertWindowTransformer(BackboneAdapter, HilbertWindowTransformer, BaseBackbone):
    """`HilbertWindowTransformer` with MMEngine's `init_cfg`."""


@MODELS.register_module(name="HilbertNeighborhoodTransformer")
class MMHilbertNeighborhoodTransformer(BackboneAdapter, HilbertNeighborhoodTransformer, BaseBackbone):
    """`HilbertNeighborhoodTransformer` with MMEngine's `init_cfg`."""


@MODELS.register_module(name="NeighborhoodAttentionTransformer")
class MMNeighborhoodAttentionTransformer(BackboneAdapter, NeighborhoodAttentionTransformer, BaseBackbone):
    """`NeighborhoodAttentionTransformer` with MMEngine's `init_cfg`."""


register_paper("hilbert_attn")
