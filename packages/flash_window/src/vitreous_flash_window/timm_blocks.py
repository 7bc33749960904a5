"""timm's Swin blocks with this package's attention. Imported only for a model that timm has built."""

from __future__ import annotations

from typing import NoReturn

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from .attention import FlashWindowMSA, FlashWindowMSAV2


class _FlashAttention(nn.Module):
    """The step from the image to the attention's output, in front of a class of timm's in the bases.

    timm rolls the map before it pads it, and may use rectangular windows. Where that makes a difference to
    `shifted_window_attention`, timm cuts the windows and `window_attention` runs on them.
    """

    attn: FlashWindowMSA | FlashWindowMSAV2
    window_size: tuple[int, int]
    shift_size: tuple[int, int]

    def _attn(self, x: Tensor) -> Tensor:
        (side, width), (shift, shift_x) = self.window_size, self.shift_size
        is_whole = x.shape[1] % side == 0 and x.shape[2] % width == 0
        if side == width and shift == shift_x and (is_whole or shift == 0):
            return self.attn.forward_image(x, shift)
        return super()._attn(x)

    def set_input_size(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: windows may change with the size."""
        raise ValueError("set_input_size must be called before convert_model; build the model again and do so")


class FlashSwinBlock(_FlashAttention, SwinTransformerBlock):
    """timm's `SwinTransformerBlock` on `shifted_window_attention`."""


class FlashSwinV2Block(_FlashAttention, SwinTransformerV2Block):
    """timm's `SwinTransformerV2Block` on `shifted_window_attention`."""


def convert_block(block: nn.Module, attention: FlashWindowMSA | FlashWindowMSAV2) -> None:
    """Turn a block of timm's into one of these, in place, with that attention."""
    block.attn = attention
    block.__class__ = FlashSwinBlock if type(block) is SwinTransformerBlock else FlashSwinV2Block
