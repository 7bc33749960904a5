"""EfficientViT in MMPretrain: importing this module registers the classes and the model names."""

from __future__ import annotations

# First, because it repairs MMEngine before MMPretrain imports it.
from vitreous_core.mm import BackboneAdapter, register_paper
from vitreous_core.mm.distillation import DistillationLossMixin

# isort: split
from mmengine.model import BaseModule
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS

from .model import EfficientViTMSRA, EfficientViTMSRAHead
from .neck import FinerMaps


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


@MODELS.register_module(name="FinerMaps")
class MMFinerMaps(BackboneAdapter, FinerMaps, BaseModule):
    """`FinerMaps` as a neck for detectors: its arguments and `init_cfg`."""


register_paper("efficientvit")
