"""Deterministic weights and inputs for comparing a model with numbers from its official implementation.

Every floating entry of a state dict is made from its official name and its shape alone, so two
implementations that agree on the official key layout have the same weights without sharing a checkpoint.
The rule: draw `z` from a generator seeded with the CRC-32 of the name, then scale it by what the name says
the entry is; the scales and their reasons are in `_scaled`.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_RESIDUAL_BRANCH_END = re.compile(r"\.(?:m|pw2|proj\.1)\.bn\.weight$")
_ATTENTION_LOGIT_WEIGHT = re.compile(r"\.(?:qkvs|dws)\.")
_DERIVED_BUFFERS = frozenset({"attn_mask", "relative_coords_table"})


def golden_values(name: str, shape: Sequence[int]) -> np.ndarray:
    """The values of one floating entry, float32.

    Args:
        name: the entry's key in the official checkpoint layout.
        shape: the entry's shape.

    Raises:
        ValueError: when the rule says nothing about such an entry.
    """
    shape = tuple(int(size) for size in shape)
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    return np.ascontiguousarray(_scaled(name, noise), dtype=np.float32)


def golden_state(state: Mapping[str, Tensor], rename: Callable[[str], str | None] | None = None) -> dict[str, Tensor]:
    """A copy of `state` whose floating entries follow the rule; shapes, dtypes, devices and keys are kept.

    Integer entries and the buffers that a model derives from its settings (`attn_mask`,
    `relative_coords_table`) keep their values.

    Args:
        state: the state dict of the model under test.
        rename: maps a key of `state` to the official key that the rule reads (default: the same), or to None
            for an entry that the official layout does not have, which then keeps its value.
    """
    filled = {}
    for key, tensor in state.items():
        name = key if rename is None else rename(key)
        if name is None or not tensor.is_floating_point() or _leaf(name) in _DERIVED_BUFFERS:
            filled[key] = tensor.detach().clone()
        else:
            filled[key] = torch.from_numpy(golden_values(name, tensor.shape)).to(tensor)
    return filled


def golden_manifest_state(entries: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A whole official-layout state dict from the `entries` of a `*.keys.json` manifest, without a model.

    `num_batches_tracked` is zero; `attention_bias_idxs` (EfficientViT) is the index of |dy|, |dx|.

    Raises:
        ValueError: for any other integer entry.
    """
    state = {}
    for entry in entries:
        name, shape, dtype = entry["name"], tuple(entry["shape"]), getattr(torch, entry["dtype"])
        if dtype.is_floating_point:
            state[name] = torch.from_numpy(golden_values(name, shape)).to(dtype)
        elif _leaf(name) == "num_batches_tracked":
            state[name] = torch.zeros(shape, dtype=dtype)
        elif _leaf(name) == "attention_bias_idxs":
            state[name] = _absolute_offset_index(shape[0]).to(dtype)
        else:
            raise ValueError(f"the rule makes no integer entry like {name!r}; take it from a model instead")
    return state


def golden_input(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images `[batch, 3, height, width]` float32, standard normal."""
    return _normal((batch, 3, height, width), seed)


def golden_cotangent(shape: Sequence[int], seed: int = 7) -> Tensor:
    """The cotangent float32 of the train-mode files, whose loss is `(cotangent * logits).sum()`."""
    return _normal(tuple(shape), seed)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Digest of the floating entries in order (name, shape, little-endian float32): the files' `*_sha256`."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            values = tensor.detach().cpu().to(torch.float32).contiguous().numpy().astype("<f4")
            digest.update(name.encode() + repr(tuple(values.shape)).encode() + values.tobytes())
    return digest.hexdigest()


def golden_path(package_tests_dir: str | Path, filename: str) -> Path:
    """A golden file: from `golden/` beside the tests, else from `shared/golden` beside the repository.

    Without either the calling test is skipped with the reason, so call it only inside a test or a fixture.

    Args:
        package_tests_dir: `packages/<package>/tests`, usually `Path(__file__).parent`.
        filename: e.g. `"swiftformer_xs_224.npz"`.
    """
    tests = Path(package_tests_dir).resolve()
    repository = tests.parents[2]
    candidates = (tests / "golden" / filename, repository.parent / "shared" / "golden" / filename)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    import pytest  # a test tool: the package itself does not depend on it

    pytest.skip(f"golden file {filename} is neither in {tests.name}/golden nor in shared/golden beside the checkout")


def _scaled(name: str, noise: np.ndarray) -> np.ndarray:
    leaf = _leaf(name)
    if leaf == "running_mean":
        return 0.05 * noise
    if leaf == "running_var":
        return 1.0 + 0.1 * abs(noise)
    if leaf == "attention_biases":
        return 0.5 * noise
    if leaf == "logit_scale":
        return 3.0 + 1.5 * noise
    if leaf.startswith("layer_scale"):
        return 0.2 + 0.02 * noise
    if noise.ndim >= 2:
        weight = _zero_sum_filters(noise)
        # Small enough that EfficientViT's softmax does not saturate.
        return 0.5 * weight if _ATTENTION_LOGIT_WEIGHT.search(name) else weight
    if _RESIDUAL_BRANCH_END.search(name):
        # Small enough that EfficientViT's residual stream does not grow from stage to stage.
        return 0.25 + 0.025 * noise
    if noise.ndim == 1 and leaf == "weight":
        return 1.0 + 0.1 * noise
    if noise.ndim == 1 and leaf in {"bias", "q_bias", "v_bias"}:
        return 0.05 * noise
    raise ValueError(f"the golden rule has no line for entry {name!r} of shape {noise.shape}")


def _zero_sum_filters(noise: np.ndarray) -> np.ndarray:
    # Neighbour differences around a ring: each filter sums to zero, so the constant part of rectified inputs
    # cancels and the output depends strongly on the image.
    fan_in = math.prod(noise.shape[1:])
    if fan_in > 1:
        filters = noise.reshape(noise.shape[0], fan_in)
        noise = (filters - np.roll(filters, 1, axis=1)).reshape(noise.shape)
    return noise / math.sqrt(fan_in)


def _absolute_offset_index(positions: int) -> Tensor:
    side = math.isqrt(positions)
    y, x = np.divmod(np.arange(positions), side)
    return torch.from_numpy(np.abs(y[:, None] - y[None]) * side + np.abs(x[:, None] - x[None]))


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]
