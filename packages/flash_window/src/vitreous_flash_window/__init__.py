"""Flash Window Attention (arXiv 2501.06480): Swin V1 and V2 on window-attention operations of their own.

Plain PyTorch; `import vitreous_flash_window.mm` registers the models with MMPretrain.
"""

from .attention import FlashShiftWindowMSA, FlashWindowMSA, FlashWindowMSAV2
from .model import FlashSwinTransformer, FlashSwinTransformerV2
from .ops import choose_backend, shifted_window_attention, window_attention
from .swap import convert_model

__all__ = [
    "FlashShiftWindowMSA",
    "FlashSwinTransformer",
    "FlashSwinTransformerV2",
    "FlashWindowMSA",
    "FlashWindowMSAV2",
    "choose_backend",
    "convert_model",
    "shifted_window_attention",
    "window_attention",
]
