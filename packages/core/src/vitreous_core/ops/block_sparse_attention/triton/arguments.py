"""Host-side arguments that the launchers share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....schedule import IMAGE
from ..bias import residue_major
from ..contracts import DENSE_BIAS, DISTANCE_BIAS, NO_BIAS, Facts, Tables
from ..dropout import threshold

# As in `primitives`, which is not imported here so that this module needs no Triton.
_GRID_CODES, _TABLE_CODES, _DISTANCES, _DENSE = 1, 2, 3, 4

_CACHED_TABLES = 64


class BiasArguments(NamedTuple):
    """A bias as kernels take it.

    Args:
        kind: 0 without a bias, else one of `primitives`' kinds.
        table: what is added to `q k^T`: fp32 `[H, entries]` over the scale; or the dense bias as it is.
        codes: int32 `[L]`, see `primitives.bias_code`; only for a bias by cells.
        numbers: stride between heads, index of offset zero, factor on a dense bias, row length of the table.
    """

    kind: int
    table: Tensor | None
    codes: Tensor | None
    numbers: tuple[int, int, float, int]

    @property
    def pointers(self) -> tuple[Tensor | None, Tensor | None]:
        """The first two arguments of a kernel about the bias."""
        return self.table, self.codes


def bias_arguments(
    bias: Tensor | None, cells: Tensor | None, tables: Tables, facts: Facts, length: int, scale: float
) -> BiasArguments:
    """Prepare a bias. A relative table is small; it is transposed so that offsets are neighbours in memory."""
    if bias is None or facts.bias == NO_BIAS:
        return BiasArguments(0, None, None, (0, 0, 1.0, 0))
    if facts.bias == DENSE_BIAS:
        return BiasArguments(_DENSE, bias.contiguous(), None, (0, 0, 1 / scale, 0))
    by_head = bias if facts.bias == DISTANCE_BIAS else bias.t()
    table = torch.empty(by_head.shape, dtype=torch.float32, device=bias.device)
    torch.mul(by_head.float(), 1 / scale, out=table)
    numbers = (table.stride(0), facts.centre, 1.0, facts.code_width)
    if facts.bias == DISTANCE_BIAS:
        return BiasArguments(_DISTANCES, table, None, numbers)
    codes, is_grid = _cell_codes(cells, tables, facts, length)
    return BiasArguments(_GRID_CODES if is_grid else _TABLE_CODES, table, codes, numbers)


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

    keyed = tuple(tensor for tensor in (cells, tables.position, tables.forward_tiles) if tensor is not None)
    return cache.get(keyed, ("codes", cells is None, *facts, length), build)


class TensorCache:
    """A bounded cache of what follows from tensors, found by their storage and version.

    Operators get new tensor objects at every call, so objects cannot be the key. An entry keeps its tensors alive:
    their addresses are never given to others while it is there.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[tuple[Any, ...], tuple[Any, tuple[Tensor, ...]]] = OrderedDict()

    def get(self, tensors: tuple[Tensor, ...], numbers: Sequence[Any], build: Callable[[], Any]) -> Any:
        """What `build` returned for these tensors and numbers."""
        key = (*(_identity(tensor) for tensor in tensors), *numbers)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        with torch.inference_mode(False):
            made = build()
        self._entries[key] = (made, tensors)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


cache = TensorCache(_CACHED_TABLES)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    # Inference tensors have no version; they cannot be written to outside inference mode either.
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current, as launches need; nothing to do on a CPU (the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
