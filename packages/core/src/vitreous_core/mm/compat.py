"""What MMEngine 0.10.7 needs to work with current PyTorch, setuptools and Python."""

from __future__ import annotations


def install() -> None:
    """Install everything once; calling it again is harmless."""
