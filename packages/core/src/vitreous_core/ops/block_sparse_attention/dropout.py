"""Attention dropout that every backend draws alike: Philox 4x32-10 (Salmon et al., SC 2011), a counter per pair.

The weight of (query token, key token) in head `b * H + h` is dropped iff the first word of
`philox(key=seed, counter=(key token, query token, b * H + h, 0))` is below `dropout_p * 2^32`. The kernels use
Triton's generator with the same counters; this module is the truth in integer torch arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The argument `dropout_seed` of an operation as int64 `[]` on a device; None draws one from PyTorch's generator.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 0 or seed.device != device:
            raise ValueError(
                f"dropout_seed must be an int or an int64 tensor of shape () on {device}; got {seed.dtype} "
                f"{tuple(seed.shape)} on {seed.device}"
            )
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"dropout_seed must be an int, an int64 tensor or None; got {seed!r}")
    return torch.tensor(seed, dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """Random words below it are dropped."""
    return min(round(dropout_p * 2**32), _LOW)


def philox_words(seed: Tensor, query: Tensor, key: Tensor, batch_head: Tensor) -> Tensor:
    """First random word of each pair, int64 holding 32 bits, for broadcastable int64 counters."""
    counter = list(torch.broadcast_tensors(key, query, batch_head, torch.zeros_like(batch_head)))
    low, high = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        upper0, lower0 = _multiply(counter[0], _MULTIPLIERS[0])
        upper1, lower1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [upper1 ^ counter[1] ^ low, lower1, upper0 ^ counter[3] ^ high, lower0]
        low, high = (low + _WEYL[0]) & _LOW, (high + _WEYL[1]) & _LOW
    return counter[0]


def keep_mask(seed: Tensor, dropout_p: float, batch: int, heads: int, length: int) -> Tensor:
    """Which weights are kept, bool `[batch, heads, length, length]`."""
    token = torch.arange(length, device=seed.device)
    batch_head = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1, 1)
    return philox_words(seed, token[:, None], token[None, :], batch_head) >= threshold(dropout_p)


def _multiply(number: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of two 32-bit numbers, without leaving int64."""
    low, high = number & 0xFFFF, number >> 16
    below = low * multiplier
    middle = high * multiplier + (below >> 16)  # below 2^49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (below & 0xFFFF)
