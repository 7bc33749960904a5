"""Window attention as a benchmark problem, on cut windows and on the packed image, and the ways to compute it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import flex_attention

from vitreous_core.bench.attention import BOTH, FORWARD, relative_error
from vitreous_core.bench.case import Gate, Prepared, Provider, Unavailable, Work
from vitreous_core.bench.measure import TF32, matmul_precision

from .ops import shifted_window_attention, window_attention
from .ops.backends import Problem, resolve
from .ops.reference import NORM_EPS, gather_bias, logit_factor, region_penalty

_MIB = 2**20
_CHECKED_SCORES = 2**24
"""Scores that the gate computes at most in float64."""

Inputs = dict[str, Tensor]
"""The tensors of a problem by name; those that require gradients are its leaves."""
Attend = Callable[[Inputs], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]


class WindowProblem(Protocol):
    """What both problems have in common, for the gate and the clock."""

    dtype: str
    tf32: bool

    def draw(self, device: torch.device) -> tuple[Inputs, Tensor]: ...

    def checked(self, inputs: Inputs, cotangent: Tensor) -> Tensor: ...

    def pick(self, name: str, tensor: Tensor, chosen: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CutWindows:
    """The paper's operation: attention inside windows that are already cut, `[windows, heads, tokens, head_dim]`.

    Args:
        windows, heads, tokens, head_dim: sizes of query, key and value.
        dtype: theirs, by name.
        with_bias: a trainable bias `[heads, tokens, tokens]`.
        tf32: round the factors of float32 products to TF32, for all providers.
        series, axis: family of cases that a plot shows, and what varies within it.
    """

    windows: int
    heads: int
    tokens: int
    head_dim: int = 32
    dtype: str = "float16"
    with_bias: bool = True
    tf32: bool = False
    series: str = ""
    axis: str = "windows"

    def work(self, mode: str) -> Work:
        """q, k, v read and o written once; the backward reads q, k, v, do and writes dq, dk, dv.

        Two products per window forward, five backward. The bias is read, and its gradient written, once.
        """
        tensor = self.windows * self.heads * self.tokens * self.head_dim * getattr(torch, self.dtype).itemsize
        bias = 4 * self.heads * self.tokens**2 if self.with_bias else 0
        product = 2 * self.windows * self.heads * self.tokens**2 * self.head_dim
        if mode == FORWARD:
            return Work(4 * tensor + bias, 2 * product)
        return Work(11 * tensor + 3 * bias, 7 * product)

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {
            "series": self.series, "axis": self.axis, "windows": self.windows, "heads": self.heads,
            "tokens": self.tokens, "head dim": self.head_dim, "with_bias": self.with_bias,
            "dtype": TF32 if self.tf32 else self.dtype,
        }  # fmt: skip

    def draw(self, device: torch.device) -> tuple[Inputs, Tensor]:
        """Inputs, made on the device, and what is sent back."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)
        shape = (self.windows, self.heads, self.tokens, self.head_dim)
        inputs = {
            name: torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()
            for name in ("query", "key", "value")
        }
        cotangent = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        if self.with_bias:
            bias = torch.randn(self.heads, self.tokens, self.tokens, generator=generator, device=device)
            inputs["bias"] = bias.to(dtype).float().requires_grad_()
        return inputs, cotangent

    def checked(self, inputs: Inputs, cotangent: Tensor) -> Tensor:
        """Indices of the windows that the gate looks at, from the first to the last."""
        count = max(2, min(64, self.windows, _CHECKED_SCORES // (self.heads * self.tokens**2)))
        return torch.linspace(0, self.windows - 1, count).long().unique().to(cotangent.device)

    def pick(self, name: str, tensor: Tensor, chosen: Tensor) -> Tensor:
        """The part of a tensor that belongs to some windows."""
        return tensor if name == "bias" else tensor[chosen]


@dataclass(frozen=True)
class PackedImage:
    """All between the projections of a Swin block: packed queries, keys and values of images to their outputs.

    Args:
        batch, height, width, channels: `[batch, height, width, 3 * channels]` is read.
        heads: divides channels.
        window, shift: of the windows.
        cosine: Swin V2's attention, with a trainable scale per head.
        dtype: of the packed tensor, by name.
        series: family of cases.
    """

    batch: int
    height: int
    width: int
    channels: int
    heads: int
    window: int
    shift: int
    cosine: bool = False
    dtype: str = "float16"
    series: str = ""
    tf32: bool = False

    @property
    def head_dim(self) -> int:
        """D."""
        return self.channels // self.heads

    def work(self, mode: str) -> Work:
        """As for cut windows."""
        windows = self.batch * (self.height // self.window) * (self.width // self.window)
        cut = CutWindows(windows, self.heads, self.window**2, self.head_dim, self.dtype, with_bias=False)
        table = 4 * self.heads * (2 * self.window - 1) ** 2
        moved = cut.work(mode)
        return Work(moved.bytes + table * (1 if mode == FORWARD else 3), moved.flops)

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {
            "series": self.series, "side": self.height, "batch": self.batch, "height": self.height,
            "width": self.width, "channels": self.channels, "heads": self.heads, "window": self.window,
            "shift": self.shift, "cosine": self.cosine, "dtype": self.dtype,
        }  # fmt: skip

    def draw(self, device: torch.device) -> tuple[Inputs, Tensor]:
        """Inputs, made on the device, and what is sent back."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)
        image = (self.batch, self.height, self.width)
        qkv = torch.randn(*image, 3 * self.channels, generator=generator, device=device, dtype=dtype)
        table = torch.randn((2 * self.window - 1) ** 2, self.heads, generator=generator, device=device)
        inputs = {"qkv": qkv.requires_grad_(), "table": table.to(dtype).float().requires_grad_()}
        if self.cosine:
            scale = torch.linspace(1.0, 4.0, self.heads, device=device).to(dtype).float()
            inputs["logit_scale"] = scale.requires_grad_()
        return inputs, torch.randn(*image, self.channels, generator=generator, device=device, dtype=dtype)

    def checked(self, inputs: Inputs, cotangent: Tensor) -> Tensor:
        """Indices of the images that the gate looks at: the first and the last."""
        return torch.tensor([0, self.batch - 1]).unique().to(cotangent.device)

    def pick(self, name: str, tensor: Tensor, chosen: Tensor) -> Tensor:
        """The part of a tensor that belongs to some images."""
        return tensor if name in ("table", "logit_scale") else tensor[chosen]


def operation(
    name: str,
    build: Callable[[Any, torch.device], Attend],
    *,
    tf32: bool | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Provider:
    """A provider of either problem.

    Args:
        name: of the provider.
        build: makes the function of the inputs that is timed.
        tf32: overrides the problem's.
        facts: for the row.
    """
    return Provider(name, partial(_prepare, build=build, tf32=tf32, extra=facts or {}))


def _prepare(
    problem: Any,
    device: torch.device,
    *,
    build: Callable[[Any, torch.device], Attend],
    tf32: bool | None,
    extra: Mapping[str, Any],
) -> Prepared:
    attend = build(problem, device)
    rounded = problem.tf32 if tf32 is None else tf32
    inputs, cotangent = problem.draw(device)

    def forward() -> Tensor:
        with torch.no_grad(), products(rounded):
            return attend(inputs)

    def both() -> tuple[Tensor, ...]:
        with products(rounded):
            return torch.autograd.grad(attend(inputs), list(inputs.values()), cotangent)

    standing = sum(tensor.numel() * tensor.element_size() for tensor in inputs.values()) / _MIB
    gate = partial(_gate, problem, inputs, cotangent, forward, attend, rounded)
    return Prepared({FORWARD: forward, BOTH: both}, gate, facts={"standing_mib": standing, "tf32": rounded, **extra})


def products(tf32: bool) -> AbstractContextManager[None]:
    """How float32 products are computed."""
    return matmul_precision("high" if tf32 else "highest")


# The gate.


def _gate(
    problem: WindowProblem,
    inputs: Inputs,
    cotangent: Tensor,
    forward: Callable[[], Tensor],
    attend: Attend,
    tf32: bool,
    modes: Collection[str],
) -> Gate:
    """Compare a sample of windows or images; a cotangent that is zero elsewhere sees to the shared gradients."""
    chosen = problem.checked(inputs, cotangent)
    truth, limits = _truth(problem, cotangent.device)
    got = {}
    if FORWARD in modes:
        got["out"] = forward()[chosen]
    if BOTH in modes:
        sparse = torch.zeros_like(cotangent)
        sparse[chosen] = cotangent[chosen]
        with products(tf32):
            out = attend(inputs)
            gradients = torch.autograd.grad(out, list(inputs.values()), sparse)
        got["out_trained"] = out.detach()[chosen]
        for name, gradient in zip(inputs, gradients, strict=True):
            got[f"d{name}"] = problem.pick(name, gradient, chosen)
    errors = {name: relative_error(tensor, truth[name.removesuffix("_trained")]) for name, tensor in got.items()}
    allowed = {name: limits[name.removesuffix("_trained")] for name in errors}
    return Gate(errors, allowed, f"eager attention in float64 on {len(chosen)} of {len(cotangent)}")


@lru_cache(1)
def _truth(problem: WindowProblem, device: torch.device) -> tuple[Inputs, dict[str, float]]:
    """Eager attention on the sample in float64, and twice its error in the problem's own precision."""
    truth = _sampled(problem, device, torch.float64, torch.matmul)
    # cuBLAS rounds to TF32 only where sizes suit it, so its error would be no measure of TF32's.
    product = tf32_product if problem.tf32 else torch.matmul
    own = _sampled(problem, device, getattr(torch, problem.dtype), product)
    rounding = 2**-11 if problem.tf32 else torch.finfo(getattr(torch, problem.dtype)).eps / 2
    return truth, {name: 2 * (relative_error(tensor, truth[name]) + rounding) for name, tensor in own.items()}


def _sampled(problem: WindowProblem, device: torch.device, dtype: torch.dtype, product: Product) -> Inputs:
    inputs, cotangent = problem.draw(device)
    chosen = problem.checked(inputs, cotangent)
    leaves = {}
    for name, tensor in inputs.items():
        part = problem.pick(name, tensor.detach(), chosen)
        # What all windows share is float32 in every low precision.
        wide = dtype if len(part) == len(chosen) and part is not tensor else torch.promote_types(dtype, part.dtype)
        leaves[name] = part.to(wide).requires_grad_()
    with products(tf32=False):
        if isinstance(problem, CutWindows):
            out = eager(problem, device, product)(leaves)
        else:
            assert isinstance(problem, PackedImage)
            out = eager_image(problem, device)(leaves)
        gradients = torch.autograd.grad(out, list(leaves.values()), cotangent[chosen].to(dtype))
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def tf32_product(a: Tensor, b: Tensor) -> Tensor:
    """A product of float32 factors rounded to TF32, forward and backward."""
    product: Tensor = _Tf32Product.apply(a, b)
    return product


def round_to_tf32(tensor: Tensor) -> Tensor:
    """To the nearest number with 10 bits behind the leading one."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class _Tf32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = round_to_tf32(a), round_to_tf32(b)
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad = round_to_tf32(grad)
        return grad @ b.mT, a.mT @ grad


# Cut windows. Each takes the problem and returns the function to time.


def triton(problem: CutWindows, device: torch.device) -> Attend:
    """`window_attention(backend="triton")`."""
    resolve("triton", Problem(device, getattr(torch, problem.dtype), problem.tokens, problem.head_dim))
    return lambda x: window_attention(x["query"], x["key"], x["value"], x.get("bias"), backend="triton")


def eager(problem: CutWindows, device: torch.device, product: Product = torch.matmul) -> Attend:
    """Plain PyTorch in the inputs' dtype, as Swin implementations write it."""
    scale = problem.head_dim**-0.5

    def attend(x: Inputs) -> Tensor:
        scores = product(x["query"] * scale, x["key"].transpose(-2, -1))
        if "bias" in x:
            scores = scores + x["bias"].to(scores.dtype)
        return product(torch.softmax(scores, dim=-1), x["value"])

    return attend


def sdpa(problem: CutWindows, device: torch.device) -> Attend:
    """PyTorch's fused attention with the bias as its mask."""

    def attend(x: Inputs) -> Tensor:
        mask = x["bias"].to(x["query"].dtype)[None] if "bias" in x else None
        return F.scaled_dot_product_attention(x["query"], x["key"], x["value"], mask)

    return attend


def flex(problem: CutWindows, device: torch.device) -> Attend:
    """Compiled FlexAttention with the bias as score modification."""
    if device.type != "cuda":
        raise Unavailable("compiled FlexAttention has no backward on a CPU")

    def attend(x: Inputs) -> Tensor:
        bias = x.get("bias")

        def add_bias(score: Tensor, window: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score if bias is None else score + bias[head, q, k]

        return _compiled_flex()(x["query"], x["key"], x["value"], score_mod=add_bias)

    return attend


def compiled_eager(problem: CutWindows, device: torch.device) -> Attend:
    """`eager` under `torch.compile`."""
    return torch.compile(eager(problem, device), dynamic=False)


def official(problem: CutWindows, device: torch.device) -> Attend:
    """The paper's release, where it is installed. Its gradients of queries and keys lack the scale: give it none."""
    try:
        release = import_module("flash_swin_attn")
    except ImportError as error:
        raise Unavailable(f"the paper's release (flash_swin_attn) is not installed: {error}") from error
    scale = problem.head_dim**-0.5

    def attend(x: Inputs) -> Tensor:
        query = x["query"] * scale
        bias = x["bias"].to(query.dtype) if "bias" in x else None
        return release.flash_swin_attn_func(query, x["key"], x["value"], bias, 1.0)

    return attend


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


# The packed image.


def triton_image(problem: PackedImage, device: torch.device) -> Attend:
    """`shifted_window_attention(backend="triton")`."""
    resolve("triton", Problem(device, getattr(torch, problem.dtype), problem.window**2, problem.head_dim))
    settings = {"num_heads": problem.heads, "window_size": problem.window, "shift_size": problem.shift}
    return lambda x: shifted_window_attention(
        x["qkv"], x["table"], logit_scale=x.get("logit_scale"), backend="triton", **settings
    )


def eager_image(problem: PackedImage, device: torch.device) -> Attend:
    """Roll, partition, split, eager attention with bias and region mask, merge, reverse and roll, as in MMPretrain."""

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        scores = (query * scale) @ key.transpose(-2, -1) + bias.to(query.dtype)
        if mask is not None:
            windows = scores.unflatten(0, (-1, len(mask)))
            scores = (windows + mask[:, None].to(scores.dtype)).flatten(0, 1)
        return torch.softmax(scores, dim=-1) @ value

    return _around(problem, device, attend)


def sdpa_image(problem: PackedImage, device: torch.device) -> Attend:
    """The same copies around PyTorch's fused attention, with bias and region mask added up into one mask."""

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        combined = bias.to(query.dtype)[None]
        if mask is not None:
            combined = combined + mask[:, None].to(query.dtype)
            combined = combined.repeat(query.shape[0] // len(mask), 1, 1, 1)
        return F.scaled_dot_product_attention(query, key, value, combined, scale=scale)

    return _around(problem, device, attend)


def triton_windows(problem: PackedImage, device: torch.device) -> Attend:
    """The same copies around `window_attention(backend="triton")`: what the fused operation saves."""
    resolve("triton", Problem(device, getattr(torch, problem.dtype), problem.window**2, problem.head_dim))

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return window_attention(query, key, value, bias, mask, scale=scale, backend="triton")

    return _around(problem, device, attend)


def _around(problem: PackedImage, device: torch.device, attend: Callable[..., Tensor]) -> Attend:
    """The steps before and after attention on cut windows; the region mask is made beforehand."""
    side, shift, heads = problem.window, problem.shift, problem.heads
    rows, columns = problem.height // side, problem.width // side
    mask = region_penalty(problem.height, problem.width, side, shift, device, torch.float32) if shift else None

    def run(x: Inputs) -> Tensor:
        qkv = x["qkv"]
        if shift:
            qkv = torch.roll(qkv, (-shift, -shift), dims=(1, 2))
        parts = qkv.view(-1, rows, side, columns, side, 3, heads, problem.head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
        query, key, value = parts.reshape(3, -1, heads, side**2, problem.head_dim).unbind(0)
        scale = problem.head_dim**-0.5
        if problem.cosine:
            factor = logit_factor(x["logit_scale"]).view(heads, 1, 1).to(query.dtype)
            query = F.normalize(query, dim=-1, eps=NORM_EPS) * factor
            key, scale = F.normalize(key, dim=-1, eps=NORM_EPS), 1.0
        out = attend(query, key, value, gather_bias(x["table"], side, side), mask, scale)
        merged = out.view(-1, rows, columns, heads, side, side, problem.head_dim).permute(0, 1, 4, 2, 5, 3, 6)
        image = merged.reshape(-1, problem.height, problem.width, problem.channels)
        return torch.roll(image, (shift, shift), dims=(1, 2)) if shift else image

    return run


TRITON, EAGER, SDPA = operation("triton", triton), operation("eager", eager), operation("sdpa", sdpa)
FLEX = operation("flex", flex, facts={"compiled": "torch.compile(dynamic=False)"})
COMPILED = operation("eager-compiled", compiled_eager)
OFFICIAL = operation("official", official)
EAGER_IEEE = operation("eager-ieee", eager, tf32=False)
TRITON_IMAGE = operation("triton", triton_image)
TRITON_WINDOWS = operation("triton-windows", triton_windows)
SDPA_IMAGE = operation("sdpa-windows", sdpa_image)
EAGER_IMAGE = operation("eager", eager_image)
