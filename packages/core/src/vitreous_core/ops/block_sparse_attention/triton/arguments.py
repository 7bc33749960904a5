"""Host-side arguments that the launchers share, and what they remember between calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....schedule import IMAGE
from ..bias import residue_major
from ..contracts import CELL_BIAS, DENSE_BIAS, DISTANCE_BIAS, NO_BIAS, Facts, Inputs, Tables, read_numbers
from ..dropout import threshold
from .configs import Config, Tile, for_precision

# As in `primitives`, which is not imported here so that this module needs no Triton.
_GRID_CODES, _TABLE_CODES, _DISTANCES, _DENSE = 1, 2, 3, 4

_CACHED_TABLES, _CACHED_PLANS = 64, 256


class Signature(NamedTuple):
    """What launches depend on, apart from values: hashable, so that they are planned once.

    Args:
        packed_heads: heads of a packed input; 0 when query, key and value are tensors of their own.
        shapes: of the packed input `[B, L, 3 * C]`, or of query and key.
        strides: of the inputs, then of output and cotangent where the pass reads these.
        dtypes: of the same tensors, of the bias and of the seed; None for what is absent.
        bias_shape: None without a bias.
        tiles: how many the launches walk over.
        has_position: whether cells become tokens by a table.
        needs_bias: whether the gradient of the bias is asked for.
        device: of all tensors.
        precision: of products, see `dot_precision`.
        walk, bias_numbers, scale, dropout_p: as in `contracts`.
    """

    packed_heads: int
    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype | None, ...]
    bias_shape: torch.Size | None
    tiles: tuple[int, ...]
    has_position: bool
    needs_bias: bool
    device: torch.device
    precision: str
    walk: str
    bias_numbers: tuple[int, ...]
    scale: float
    dropout_p: float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the query, `[B, H, L, D]`."""
        if not self.packed_heads:
            batch, heads, length, head_dim = self.shapes[0]
            return batch, heads, length, head_dim
        batch, length, channels = self.shapes[0]
        return batch, self.packed_heads, length, channels // (3 * self.packed_heads)

    @property
    def kv_heads(self) -> int:
        """Heads of key and value."""
        return self.packed_heads or self.shapes[1][1]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.shape[1] // self.kv_heads

    @property
    def head_strides(self) -> list[tuple[int, ...]]:
        """Of query, key and value, then of the others, each as heads `[B, H, L, D]`."""
        if not self.packed_heads:
            return list(self.strides)
        inputs, *others = (self.as_heads(strides) for strides in self.strides)
        return [inputs, inputs, inputs, *others]

    def as_heads(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        """Strides of a tensor of the inputs' form, `[B, L, heads and channels]` when packed, as `[B, H, L, D]`."""
        if not self.packed_heads:
            return strides
        batch, token, channel = strides
        return batch, self.shape[3] * channel, token, channel

    def starts(self, names: tuple[str, str, str], strides: tuple[int, ...]) -> dict[str, int]:
        """Where query, key and value, or their gradients, begin in their tensors, which have these strides."""
        third = self.shape[1] * self.shape[3] * strides[2] if self.packed_heads else 0
        return {name: number * third for number, name in enumerate(names)}

    @property
    def facts(self) -> Facts:
        """Of the schedule and the bias."""
        return read_numbers(self.walk, self.bias_numbers)[0]

    @property
    def entries(self) -> int:
        """Of a relative bias, per head; 0 without one."""
        if self.bias_shape is None or self.facts.bias not in (CELL_BIAS, DISTANCE_BIAS):
            return 0
        return self.bias_shape[0 if self.facts.bias == CELL_BIAS else 1]

    @property
    def config(self) -> Config:
        """The tiles of every pass. Whole windows fit one at any precision; others are smaller for some."""
        tiles = read_numbers(self.walk, self.bias_numbers)[1]
        fitted = Config(*(for_precision(tile, self.shape[3], self.precision) for tile in tiles))
        return fitted._replace(closed=tiles.closed)

    def constants(self, tile: Tile, bias: BiasArguments, **more: int) -> dict[str, Any]:
        """What a kernel that walks over tiles is compiled for."""
        head_dim = self.shape[3]
        return {
            "GEOMETRY": self.facts.geometry, "HAS_POSITION": self.has_position, "BIAS": bias.kind,
            "DROPOUT": self.dropout_p > 0, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim),
            "PRECISION": self.precision, "BLOCK_M": tile.rows, **more,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip


def signature(
    inputs: Inputs, others: tuple[Tensor, ...], bias: Tensor | None, seed: Tensor | None, tiles: tuple[Tensor, ...],
    tables: Tables, walk: str, bias_numbers: tuple[int, ...], scale: float, dropout_p: float, needs_bias: bool = False,
) -> Signature:  # fmt: skip
    """Of a call; `others` are output and cotangent where the pass reads them, `tiles` the tables walked over."""
    query, key, value, heads = inputs
    tensors = (query, *others) if heads else (query, key, value, *others)
    apart = (bias, seed)
    return Signature(
        heads, (query.shape,) if heads else (query.shape, key.shape), tuple([tensor.stride() for tensor in tensors]),
        tuple([None if tensor is None else tensor.dtype for tensor in tensors + apart]),
        None if bias is None else bias.shape, tuple([table.shape[0] for table in tiles]),
        tables.position.shape[0] > 0, needs_bias, query.device, dot_precision(query.dtype),
        walk, bias_numbers, scale, dropout_p,
    )  # fmt: skip


class BiasArguments(NamedTuple):
    """What kernels are told of a bias, apart from its values.

    Args:
        kind: 0 without a bias, else one of `primitives`' kinds.
        codes: int32 `[L]`, see `primitives.bias_code`; only for a bias by cells.
        numbers: stride between heads, index of offset zero, factor on a dense bias, row length of the table.
    """

    kind: int
    codes: Tensor | None
    numbers: tuple[int, int, float, int]


def bias_arguments(of: Signature, cells: Tensor | None, tables: Tables) -> BiasArguments:
    """See `BiasArguments`."""
    facts = of.facts
    if facts.bias == NO_BIAS:
        return BiasArguments(0, None, (0, 0, 1.0, 0))
    if facts.bias == DENSE_BIAS:
        return BiasArguments(_DENSE, None, (0, 0, 1 / of.scale, 0))
    numbers = (of.entries, facts.centre, 1.0, facts.code_width)
    if facts.bias == DISTANCE_BIAS:
        return BiasArguments(_DISTANCES, None, numbers)
    codes, is_grid = _cell_codes(cells, tables, facts, of.shape[2])
    return BiasArguments(_GRID_CODES if is_grid else _TABLE_CODES, codes, numbers)


def scaled_table(bias: Tensor | None, kind: int, scale: float, like: Tensor) -> Tensor:
    """A relative bias as kernels add it to `q k^T`: over the scale, fp32 `[H, entries]`; empty for any other.

    Small, and transposed so that offsets are neighbours in memory.
    """
    if bias is None or kind in (NO_BIAS, DENSE_BIAS):
        return torch.empty(0, dtype=torch.float32, device=like.device)
    by_head = bias if kind == DISTANCE_BIAS else bias.t()
    if bias.dtype != torch.float32:
        by_head = by_head.float()
    table = torch.empty(*by_head.shape, dtype=torch.float32, device=bias.device)
    return torch.mul(by_head, _reciprocal(scale), out=table)


@lru_cache(_CACHED_TABLES)
def _reciprocal(scale: float) -> Tensor:
    """As a tensor of no dimensions, on the CPU for any device: PyTorch would make one of the number at each product."""
    with torch.inference_mode(False):
        return torch.tensor(1 / scale, dtype=torch.float32, device="cpu")


def bias_pointer(bias: Tensor | None, table: Tensor, kind: int) -> Tensor | None:
    """What kernels read of a bias: its scaled table, or the dense bias itself."""
    if bias is None or kind == NO_BIAS:
        return None
    return bias.contiguous() if kind == DENSE_BIAS else table


def coded_tensors(cells: Tensor | None, tables: Tables, kind: int) -> tuple[Tensor, ...]:
    """The tensors whose values `_cell_codes` depends on."""
    if kind != CELL_BIAS:
        return ()
    coded = (tables.position, tables.forward_tiles)
    return coded if cells is None else (cells, *coded)


def _cell_codes(cells: Tensor | None, tables: Tables, facts: Facts, length: int) -> tuple[Tensor, bool]:
    """Codes of all tokens, and whether they follow from the cells that a schedule on the image walks over."""

    def build() -> tuple[Tensor, bool]:
        token = torch.arange(length, device=tables.forward_tiles.device)
        cell = token if cells is None else cells.long()
        y = residue_major(cell // facts.image_width, facts.image_height, facts.row_step)
        codes = y * facts.code_width + residue_major(cell % facts.image_width, facts.image_width, facts.column_step)
        is_grid = False
        if facts.geometry == IMAGE:
            # Dilated patterns walk over residue-major cells; a bias of another dilation counts otherwise.
            walked = token + token // facts.width * (facts.code_width - facts.width)
            is_grid = bool((codes[tables.position.long() if len(tables.position) else token] == walked).all())
        return codes.int(), is_grid

    return cache.get(coded_tensors(cells, tables, facts.bias), ("codes", cells is None, *facts, length), build)


class TensorCache:
    """A bounded cache of what follows from tensors, found by their storage and version.

    Operators get new tensor objects at every call, so objects cannot be the key. An entry keeps its tensors alive:
    their addresses are never given to others while it is there.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: dict[tuple[Any, ...], tuple[Any, tuple[Tensor, ...]]] = {}

    def get(self, tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """What `build` returned for these tensors and numbers."""
        key = (*[_identity(tensor) for tensor in tensors], numbers)
        # Taken out and put back, entries stand in the order of their last use. The backward pass has its own thread.
        entry = self._entries.pop(key, None)
        if entry is None:
            with torch.inference_mode(False):
                entry = build(), tensors
        self._entries[key] = entry
        if len(self._entries) > self._size:
            self._entries.pop(next(iter(self._entries)), None)
        return entry[0]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


cache = TensorCache(_CACHED_TABLES)
"""Codes of cells and lists of bias gradients, which a batch or a stride does not change."""

plans = TensorCache(_CACHED_PLANS)
"""Launches of a pass."""


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    # Inference tensors have no version; they cannot be written to outside inference mode either. The address says which
    # device.
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype


def mask_level(masked: int, columns: int) -> int:
    """How much of `primitives.visible_pairs` a pass needs (see `contracts.Facts`)."""
    if masked == 0:
        return 2
    return 0 if masked % columns == 0 else 1


def padded_head_dim(head_dim: int) -> int:
    """Matrix tiles are powers of two, at least 16 wide."""
    return max(16, 1 << (head_dim - 1).bit_length())


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """Random words below the first number are dropped; the second scales what is kept."""
    return threshold(dropout_p), 1 / (1 - dropout_p)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products follow `torch.set_float32_matmul_precision`; half precision has only one way."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"
