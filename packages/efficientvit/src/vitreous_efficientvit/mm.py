"""EfficientViT in MMPretrain: importing this module registers the classes and the model names."""

from __future__ import annotations

# First, because it repairs MMEngine before MMPretrain imports it.
from vitreous_core.mm import BackboneAdapter, register_paper
from vitreous_core.mm.distillation import DistillationLossMixin

# isort: split
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS

from .model import EfficientViTMSRA, EfficientViTMSRAHead


@MODELS.register_module(name="EfficientViTMSRA")
class MMEfficientViTMSRA(BackboneAdapter, EfficientViTMSRA, BaseBackbone):
    """`EfficientViTMSRA` as an MMPretrain backbone: its arguments and `init_cfg`."""


@MODELS.register_module(name="EfficientViTMSRAHead")
class MMEfficientViTMSRAHead(DistillationLossMixin, EfficientViTMSRAHead, ClsHead):
    """`EfficientViTMSRAHead` as an MMPretrain head.

    Args:
        num_classes, in_channels: see `EfficientViTMSRAHead`.
        distillation, loss, topk, cal_acc, init_cfg: see `DistillationLossMixin`.
    """


register_paper("efficientvit")
