"""MMPretrain's view of this paper: importing it registers the modules, the backbones and the model index."""

from __future__ import annotations

from mmengine.model import BaseModule
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import MODELS

from vitreous_core.mm import BackboneAdapter, register_paper

from .attention import FlashShiftWindowMSA, FlashWindowMSA, FlashWindowMSAV2
from .model import FlashSwinTransformer, FlashSwinTransformerV2


@MODELS.register_module(name="FlashWindowMSA")
class MMFlashWindowMSA(BackboneAdapter, FlashWindowMSA, BaseModule):
    """`FlashWindowMSA` with MMEngine's `init_cfg`."""


@MODELS.register_module(name="FlashWindowMSAV2")
class MMFlashWindowMSAV2(BackboneAdapter, FlashWindowMSAV2, BaseModule):
    """`FlashWindowMSAV2` with MMEngine's `init_cfg`."""


@MODELS.register_module(name="FlashShiftWindowMSA")
class MMFlashShiftWindowMSA(BackboneAdapter, FlashShiftWindowMSA, BaseModule):
    """`FlashShiftWindowMSA` with MMEngine's `init_cfg`."""


@MODELS.register_module(name="FlashSwinTransformer")
class MMFlashSwinTransformer(BackboneAdapter, FlashSwinTransformer, BaseBackbone):
    """`FlashSwinTransformer` with MMEngine's `init_cfg`."""


@MODELS.register_module(name="FlashSwinTransformerV2")
class MMFlashSwinTransformerV2(BackboneAdapter, FlashSwinTransformerV2, BaseBackbone):
    """`FlashSwinTransformerV2` with MMEngine's `init_cfg`."""


register_paper("flash_window")
