"""The exceptions of vitreous. Bad types and values raise `TypeError` and `ValueError`; the rest is here."""

from __future__ import annotations

from collections.abc import Sequence


class BackendUnsupported(NotImplementedError):
    """A named backend cannot run this problem; a named backend never falls back to another.

    Args:
        backend: the backend that was asked for.
        reasons: every reason it refuses, one short clause each.
    """

    def __init__(self, backend: str, reasons: Sequence[str]) -> None:
        self.backend = backend
        self.reasons = tuple(reasons)
        super().__init__(f"backend={backend!r} cannot run this: {'; '.join(self.reasons)}. Use backend='torch'.")


class StateMismatch(ValueError):
    """A state dict does not fit a model. The message names the keys that are missing, surplus or misshapen."""


class UserError(Exception):
    """A mistake that the command line reports as one readable line with exit code 2, never as a traceback."""
