"""`BlockLayout`: which key blocks each query block must visit, and the rule inside partly visible blocks.

A layout is data, not policy: `vitreous_core.patterns` builds it from geometry, kernels read it. It never holds an
`L x L` array; `to_dense` makes one for tests and small problems.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .schedule import Schedule

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class IntervalRule:
    """Query `i` sees key `j` iff `start[i] <= j < stop[i]`, in token order.

    Args:
        start: int32 `[L]`.
        stop: int32 `[L]`, never below `start`.
    """

    start: Tensor
    stop: Tensor

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool, for broadcastable integer token indices."""
        return (key >= self.start[query]) & (key < self.stop[query])

    def pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        return int((self.stop - self.start).sum(dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class BoxRule:
    """Query `i` sees key `j` iff the cell of `j` lies in the box of `i`.

    Coordinates are residue-major: with dilation `d` the cells 0, d, 2d, ... of an axis come first, then 1, d+1, ...
    so that a dilated neighbourhood is a plain box. With dilation 1 they are image rows and columns.

    Args:
        y, x: int32 `[L]`, the token's own cell.
        y_start, y_stop, x_start, x_stop: int32 `[L]`, half-open bounds of what the token sees.
    """

    y: Tensor
    x: Tensor
    y_start: Tensor
    y_stop: Tensor
    x_start: Tensor
    x_stop: Tensor

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool, for broadcastable integer token indices."""
        y, x = self.y[key], self.x[key]
        inside_rows = (y >= self.y_start[query]) & (y < self.y_stop[query])
        return inside_rows & (x >= self.x_start[query]) & (x < self.x_stop[query])

    def pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        rows, columns = (self.y_stop - self.y_start).long(), (self.x_stop - self.x_start).long()
        return int((rows * columns).sum())


@dataclass(frozen=True, eq=False)
class BitRule:
    """One bit per pair of each partial block, for predicates that have no geometry.

    Args:
        bits: uint8 `[P, query_block, ceil(key_block / 8)]`, least significant bit first.
        block: int32 `[Nq, Nk]`, the row of `bits` for a pair of blocks; -1 where the block is empty, -2 where full.
        query_block, key_block: block sizes the bits were cut for.
    """

    bits: Tensor
    block: Tensor
    query_block: int
    key_block: int

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool, for broadcastable integer token indices."""
        query, key = torch.broadcast_tensors(query, key)
        block = self.block[query // self.query_block, key // self.key_block]
        inner = key % self.key_block
        byte = self.bits[block.clamp(min=0), query % self.query_block, inner // 8]
        return torch.where(block >= 0, (byte >> (inner % 8).to(torch.uint8)) & 1 == 1, block == _FULL)

    def pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        weights = 1 << torch.arange(8, device=self.bits.device)
        partial = sum(int(((self.bits & int(w)) != 0).sum()) for w in weights)
        return partial + int((self.block == _FULL).sum()) * self.query_block * self.key_block


_EMPTY, _FULL = -1, -2

Rule = IntervalRule | BoxRule | BitRule


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Block sparsity of one pattern on one grid under one token order.

    Blocks cut the token sequence evenly; the last ones may reach past `L` and then count as partial. Lists are
    ascending; entries past a count are 0 and meaningless.

    Args:
        height, width: sides of the grid; `L = height * width` tokens.
        query_block, key_block: tokens per block.
        counts: int32 `[Nq]`, listed key blocks of each query block.
        indices: int32 `[Nq, K]`, the key blocks.
        partial: bool `[Nq, K]`, whether the rule must be asked inside that block (False: every pair is visible).
        key_counts, key_indices, key_partial: the same lists transposed (`[Nk]`, `[Nk, Q]`, `[Nk, Q]`), for the
            backward pass over key blocks.
        rule: decides single pairs.
        schedule: the walk of the Triton kernels, which need no block lists.
        reach: `(rows, columns)` such that no visible pair is further apart in the image.
        token_reach: no visible pair is further apart in the token sequence.
        step: `(rows, columns)`; offsets of visible pairs in the image are multiples of it (dilation).

    Raises:
        ValueError: when shapes contradict each other.
    """

    height: int
    width: int
    query_block: int
    key_block: int
    counts: Tensor
    indices: Tensor
    partial: Tensor
    key_counts: Tensor
    key_indices: Tensor
    key_partial: Tensor
    rule: Rule
    schedule: Schedule
    reach: tuple[int, int]
    token_reach: int
    step: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        expected = (-(-self.length // self.query_block), -(-self.length // self.key_block))
        given = (len(self.counts), len(self.key_counts))
        if given != expected:
            raise ValueError(
                f"counts and key_counts must have {expected} entries for {self.height} x {self.width} tokens in "
                f"blocks of {self.query_block} and {self.key_block}; got {given}"
            )
        for lists, flags, count in (
            (self.indices, self.partial, self.counts),
            (self.key_indices, self.key_partial, self.key_counts),
        ):
            if lists.shape != flags.shape or len(lists) != len(count):
                raise ValueError(
                    "indices and partial must be two arrays of one shape with a row per block; "
                    f"got {tuple(lists.shape)} and {tuple(flags.shape)} for {len(count)} blocks"
                )

    @property
    def length(self) -> int:
        """Tokens `L`."""
        return self.height * self.width

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.counts.device

    @property
    def density(self) -> float:
        """Visible pairs over `L^2`."""
        return self.rule.pairs() / self.length**2

    @property
    def block_ratios(self) -> tuple[float, float, float]:
        """Empty, partial and full blocks over all blocks (the three sum to 1)."""
        blocks = len(self.counts) * len(self.key_counts)
        listed = torch.arange(self.indices.shape[1], device=self.device) < self.counts[:, None]
        partial = int((self.partial & listed).sum())
        full = int(self.counts.sum()) - partial
        return 1 - (partial + full) / blocks, partial / blocks, full / blocks

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with every tensor on `device`."""
        if torch.device(device) == self.device:
            return self
        rule = replace(self.rule, **_moved(self.rule, device))
        return replace(self, **_moved(self, device), rule=rule, schedule=self.schedule.to(device))

    def to_dense(self) -> Tensor:
        """Bool `[L, L]`: listed blocks, filled or asked of the rule. Slow; for tests and the torch backend."""
        slots = torch.arange(self.indices.shape[1], device=self.device)
        block, slot = torch.nonzero(slots < self.counts[:, None], as_tuple=True)
        states = torch.zeros(len(self.counts), len(self.key_counts), dtype=torch.uint8, device=self.device)
        states[block, self.indices[block, slot].long()] = 1 + self.partial[block, slot].to(torch.uint8)
        token = torch.arange(self.length, device=self.device)
        state = states[(token // self.query_block)[:, None], token // self.key_block]
        return (state == 1) | ((state == 2) & self.rule.allows(token[:, None], token[None, :]))

    def to_flex(self) -> BlockMask:
        """FlexAttention's block mask made from these lists, without its own builder that looks at every pair."""
        from torch.nn.attention.flex_attention import BlockMask

        # Both directions are given: PyTorch 2.11 transposes wrongly unless lists are as wide as there are blocks.
        queries, keys = len(self.counts), len(self.key_counts)
        lists = _flex_lists(self.counts, self.indices, self.partial, keys)
        transposed = _flex_lists(self.key_counts, self.key_indices, self.key_partial, queries)

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.rule.allows(query, key)

        return BlockMask(
            (self.length, self.length),
            *lists,
            *transposed,
            BLOCK_SIZE=(self.query_block, self.key_block),
            mask_mod=mask_mod,
        )

    def validate(self) -> None:
        """Check the lists' values (synchronises the device).

        Raises:
            ValueError: when a count or index is out of range or the two sets of lists disagree.
        """
        blocks = torch.zeros(2, len(self.counts), len(self.key_counts), dtype=torch.int64)
        for side, (counts, indices, partial) in enumerate(
            ((self.counts, self.indices, self.partial), (self.key_counts, self.key_indices, self.key_partial))
        ):
            counts, indices, partial = counts.cpu(), indices.cpu(), partial.cpu()
            others = blocks.shape[2 - side]
            if bool((counts < 0).any() or (counts > indices.shape[1]).any()):
                raise ValueError("counts must lie between 0 and the lists' width; got values outside")
            block, slot = torch.nonzero(torch.arange(indices.shape[1]) < counts[:, None], as_tuple=True)
            index = indices[block, slot].long()
            if bool((index < 0).any() or (index >= others).any()):
                raise ValueError(f"indices must lie in 0..{others - 1}; got values outside")
            where = (block, index) if side == 0 else (index, block)
            blocks[side][where] += 1 + partial[block, slot].long()
        if not torch.equal(blocks[0], blocks[1]):
            raise ValueError("indices and key_indices must list the same blocks; they differ. Rebuild the layout")


def _flex_lists(counts: Tensor, indices: Tensor, partial: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and indices of the partial blocks, then of the full ones, in lists of that width."""
    listed = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
    lists: list[Tensor] = []
    for chosen in (listed & partial, listed & ~partial):
        # A stable sort by "not chosen" moves the chosen entries to the front in ascending order.
        front = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True)
        padded = torch.nn.functional.pad(indices.gather(1, front), (0, width - indices.shape[1]))
        lists += [chosen.sum(1, dtype=torch.int32)[None, None], padded[None, None]]
    return lists[0], lists[1], lists[2], lists[3]


def _moved(holder: object, device: torch.device | str) -> dict[str, Any]:
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}  # type: ignore[arg-type]
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
