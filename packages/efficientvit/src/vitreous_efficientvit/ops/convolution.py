"""Convolutions between two batch norms as they train: those that cuDNN computes at a fraction of what memory allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitreous_core.autocast import autocast_dtype, to_autocast
from vitreous_core.errors import BackendUnsupported
from vitreous_core.triton_support import device_reasons, dtype_reasons

from . import convolution_contract
from .api import Backend, check_backend

_SIDES = 3, 5, 7
_MOST_CHANNELS, _MOST_OUTPUTS = 32, 64
_IMAGE_CHANNELS = 3
_WIDE_ON_LARGE_MAPS = 56**2
"""Cells of a map below which cuDNN's gradients of more than `NARROW` channels are the faster ones."""
_MOST_CELLS = 2**30
"""Half of what 32 bits count: the last walk over cells goes beyond their number."""
_WORTH_A_LAUNCH = 2**23
"""Elements of a map from which the GPU's time saved is more than the host's time lost, where nothing compiles."""


class Convolution(nn.Conv2d):
    """`nn.Conv2d` without bias that runs `convolution` where that has a kernel and `backend` takes it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups: as for `nn.Conv2d`; kernels pad by half a side.
        backend: see `convolution`. A convolution that has no kernel is PyTorch's with any backend.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        check_backend(backend)
        self.backend = backend
        side = self.kernel_size[0]
        self.has_kernel = padding == side // 2 and not shape_reasons(tuple(self.weight.shape), stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        # A bias comes from tools that fold batch norms in place.
        if not self.has_kernel or self.backend == "torch" or self.bias is not None:
            return super().forward(x)
        return convolution(x, self.weight, self.stride[0], backend=self.backend)


def convolution(x: Tensor, weight: Tensor, stride: int = 1, *, backend: Backend) -> Tensor:
    """`conv2d(x, weight, stride=stride, padding=k // 2)`, depthwise, or dense with k = 3 and stride 2.

    Args:
        x: `[B, C, height, width]`, floating.
        weight: `[C, 1, k, k]`, depthwise, k 3, 5 or 7; or `[O, C, 3, 3]`, dense, 1 < C <= 32, O <= 64. Floating.
        stride: 1 or 2; 2 with k = 3 alone, 2 where dense.
        backend: `"torch"`, `"triton"` or `"auto"` (`choose_convolution_backend`).

    Returns:
        `[B, O, ceil(height / stride), ceil(width / stride)]`, dtype of x; from Triton channels-last.

    Raises:
        TypeError, ValueError: for shapes, dtypes or devices that do not fit together, or an unknown backend.
        BackendUnsupported: when `backend="triton"` cannot run this.

    Numerics: kernels sum in fp32 and round once; depthwise products are in fp32, dense ones have the weight in the
    dtype of x, in fp32 as `torch.set_float32_matmul_precision` has it. Their gradients are deterministic; no second
    derivative. Forwards by depth and of more than 16 channels are PyTorch's on both paths, and in fp32 the gradients of
    more than 16 channels too. Under autocast x is cast to its dtype first.
    """
    if autocast_dtype(x.device) is not None:
        x = to_autocast(x)
    groups = _check(x, weight, stride)
    if resolve_convolution(backend, x, tuple(weight.shape), stride, groups) == "triton":
        return convolution_contract.convolution(x, weight, stride)
    return F.conv2d(x, weight.to(x.dtype), None, stride, weight.shape[-1] // 2, groups=groups)


def choose_convolution_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: int,
    *,
    compiling: bool = False,
) -> Backend:
    """What `backend="auto"` runs for a channels-last map: `"triton"` on GPUs that can, in half precision.

    Outside `torch.compile` from 2^23 elements of input or output on: below, the host takes longer to call an operator
    from Python than the GPU takes longer for cuDNN's. Maps whose channels lie apart stay with PyTorch, but for images
    under `torch.compile`: turned at the first convolution, all maps behind it are channels-last, as that compiler would
    have them. Dense convolutions of more than 16 channels take maps of 56 x 56 and larger: M4's third (32 channels)
    wins there by a sixth, M0's fourth (28 x 28) loses by a third (`E2-convolutions`).

    Args:
        device, dtype, shape: of the map.
        weight_shape: of the weight.
        stride: of the convolution.
        compiling: whether `torch.compile` traces the call.
    """
    device = torch.device(device)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or device_reasons(device):
        return "torch"
    batch, channels, height, width = shape
    groups = channels if weight_shape[1] == 1 else 1
    if shape_reasons(weight_shape, stride, groups) or size_reasons(shape):
        return "torch"
    if groups == 1 and channels > convolution_contract.NARROW and height * width < _WIDE_ON_LARGE_MAPS:
        return "torch"
    if compiling:
        return "triton"
    outputs = batch * weight_shape[0] * -(-height // stride) * -(-width // stride)
    return "triton" if max(batch * channels * height * width, outputs) >= _WORTH_A_LAUNCH else "torch"


def resolve_convolution(
    backend: Backend, x: Tensor, weight_shape: tuple[int, ...], stride: int, groups: int
) -> Backend:
    """The backend that runs: `"auto"` chosen, a named one checked and never replaced.

    Raises:
        ValueError: for an unknown backend.
        BackendUnsupported: with every reason why the named backend cannot run this.
    """
    check_backend(backend)
    if backend == "torch":
        return "torch"
    if backend == "auto":
        compiling = torch.compiler.is_compiling()
        is_turned = compiling and x.shape[1] <= _IMAGE_CHANNELS
        if x.device.type != "cuda" or not (is_turned or convolution_contract.pixel_of(x)):
            return "torch"
        return choose_convolution_backend(x.device, x.dtype, x.shape, weight_shape, stride, compiling=compiling)
    reasons = device_reasons(x.device) + dtype_reasons(x.device, x.dtype)
    reasons += shape_reasons(weight_shape, stride, groups) + size_reasons(x.shape)
    if reasons:
        raise BackendUnsupported(backend, reasons)
    return "triton"


def shape_reasons(weight_shape: tuple[int, ...], stride: int, groups: int) -> list[str]:
    """Why there is no kernel for a weight, a stride and groups; empty where there is one."""
    outputs, channels, *sides = weight_shape
    reasons = []
    if sides[0] != sides[1] or sides[0] not in _SIDES:
        reasons.append(f"the kernel must be square with a side in {_SIDES}; got {tuple(sides)}")
    if groups == outputs > 1 and channels == 1:
        if stride != 1 and (stride, sides[0]) != (2, 3):
            reasons.append(f"stride must be 1, or 2 with 3x3 kernels; got {stride} with {sides[0]}x{sides[1]}")
        return reasons
    is_narrow = 1 < channels <= _MOST_CHANNELS and outputs <= _MOST_OUTPUTS
    if groups != 1 or stride != 2 or sides[0] != 3 or not is_narrow:
        got = f"weight {tuple(weight_shape)}, stride {stride}, groups {groups}"
        reasons.append(
            f"a convolution that is not depthwise must be dense, 3x3, of stride 2, of 2 to {_MOST_CHANNELS} channels "
            f"and at most {_MOST_OUTPUTS} outputs; got {got}"
        )
    return reasons


def size_reasons(shape: tuple[int, ...]) -> list[str]:
    """Why a map is too large: cells of all images, and elements of one, are counted in 32 bits."""
    batch, channels, height, width = shape
    if max(batch, channels) * height * width < _MOST_CELLS:
        return []
    return [f"x must have fewer than 2^30 cells, and each image fewer than 2^30 elements; got {tuple(shape)}"]


def _check(x: Tensor, weight: Tensor, stride: int) -> int:
    """Raise for what no backend computes; the number of groups."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be [B, C, height, width], only B may be 0; got {tuple(x.shape)}")
    channels = x.shape[1]
    is_depthwise = weight.ndim == 4 and weight.shape[1] == 1 and weight.shape[0] == channels > 1
    if weight.ndim != 4 or weight.shape[0 if is_depthwise else 1] != channels or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"weight must be [{channels}, 1, k, k], or [O, {channels}, k, k], as x is; got {tuple(weight.shape)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2; got {stride}")
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"x and weight must be floating; got {x.dtype} and {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}; got {weight.device}. Move it")
    return channels if is_depthwise else 1
