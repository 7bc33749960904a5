"""SwiftFormer: efficient additive attention for mobile vision, arXiv 2303.15446.

Plain PyTorch; `import vitreous_swiftformer.mm` registers the models with MMPretrain.
"""

from .attention import EfficientAdditiveAttention
from .model import SwiftFormer, SwiftFormerHead

__all__ = ["EfficientAdditiveAttention", "SwiftFormer", "SwiftFormerHead"]
