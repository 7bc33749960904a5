"""The only place in core that imports MMEngine and MMPretrain (extra: `vitreous-core[mm]`).

Importing it makes MMEngine work with current PyTorch (`compat`) and registers what packaged configs name:
`DigitsDataset`, `GzippedFashionMNIST`, the optimizer wrappers and `CompileHook`. A paper's `mm.py` needs
`BackboneAdapter` and `register_paper`.
"""

from . import compat

compat.install()  # before the imports below: some of it must be active when MMEngine is first imported

from .adapter import BackboneAdapter, register_paper  # noqa: E402
from .digits import DigitsDataset  # noqa: E402
from .fashion_mnist import GzippedFashionMNIST  # noqa: E402
from .hooks import CompileHook  # noqa: E402
from .optim_wrappers import AGCAmpOptimWrapper, AGCOptimWrapper, CPUAmpOptimWrapper  # noqa: E402

__all__ = [
    "AGCAmpOptimWrapper",
    "AGCOptimWrapper",
    "BackboneAdapter",
    "CPUAmpOptimWrapper",
    "CompileHook",
    "DigitsDataset",
    "GzippedFashionMNIST",
    "register_paper",
]
