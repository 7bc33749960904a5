"""Checks on state dicts, used by every paper's checkpoint conversion."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .errors import StateMismatch

_SHOWN = 8


def unwrap_state(checkpoint: Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict inside a loaded checkpoint: under `model` or `state_dict`, or the mapping itself.

    Raises:
        StateMismatch: when no mapping from names to tensors is found.
    """
    for key in ("model", "state_dict"):
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping):
            checkpoint = inner
            break
    if not checkpoint or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise StateMismatch(
            "checkpoint must hold a mapping from names to tensors, bare or under 'model' or 'state_dict'; "
            f"got keys {_sample(list(checkpoint))}"
        )
    return {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}


def check_state(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Require `given` to have exactly the keys and shapes of `expected`.

    Raises:
        StateMismatch: naming every kind of difference (missing, surplus, wrong shape) with the keys.
    """
    missing = [name for name in expected if name not in given]
    surplus = [name for name in given if name not in expected]
    misshapen = [
        f"{name} (needs {tuple(expected[name].shape)}, got {tuple(given[name].shape)})"
        for name in expected
        if name in given and expected[name].shape != given[name].shape
    ]
    problems = [
        f"{label}: {_sample(names)}"
        for label, names in (("missing", missing), ("surplus", surplus), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        raise StateMismatch("state dict does not fit the model; " + "; ".join(problems))


def _sample(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
