"""vitreous core: curves, attention patterns, block-sparse attention and the glue that the papers share.

Importing it is light: submodules are imported by whoever needs them, and only `vitreous_core.mm` needs MMPretrain.
"""

__version__ = "0.1.0"
