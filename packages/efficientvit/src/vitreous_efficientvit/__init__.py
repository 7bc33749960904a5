"""EfficientViT (MSRA): memory-efficient vision transformer with cascaded group attention, arXiv 2305.07027.

Plain PyTorch; `import vitreous_efficientvit.mm` registers the models with MMPretrain.
"""

from .attention import CascadedGroupAttention
from .model import EfficientViTMSRA, EfficientViTMSRAHead
from .neck import FinerMaps

__all__ = ["CascadedGroupAttention", "EfficientViTMSRA", "EfficientViTMSRAHead", "FinerMaps"]
