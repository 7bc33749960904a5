"""What `vitreous bench hilbert_attn` measures: the paper's comparisons, aligned, and the parts of a module.

Core's suite holds the marks H1 to H4, at 56 x 56, 64 x 64 and 128 x 128, against FlexAttention. Here are

* `WSA`, `SA`, `NA`: windows, slides and neighbourhoods at the paper's own sizes and up to 256 x 256, each pattern of
  the curve beside its square namesake in row-major order, in Hilbert order, and for windows in window order: that
  order has the sparsity of the curve with true square windows, and `sdpa-window-order` is PyTorch's fused attention on
  it.
* `H7`: whole networks, HWT beside Swin, HNT beside the same network with square neighbourhoods in FlexAttention.
* `parts`: what reordering and projections cost beside the attention.
* `sides`, `batches`: sweeps over the image side and over the batch.

Inputs are those of the paper's notebook: half precision, 16 images, 128 channels in 2 heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from vitreous_core.bench.attention import (
    BOTH,
    EAGER_WINDOWS,
    FLEX,
    FLEX_BLOCK,
    FORWARD,
    UNFOLD,
    AttentionProblem,
    attention_provider,
    compiled_flex,
    flex,
    flex_mask,
    ours,
    relative_error,
    windowed,
)
from vitreous_core.bench.case import Case, Gate, Goal, Prepared, Provider, Unavailable, Work
from vitreous_core.bench.models import INFER, TRAIN, ModelProblem, model_provider
from vitreous_core.patterns import Neighborhood1d, Neighborhood2d, Pattern, Slide1d, Slide2d, Window1d, Window2d

from .attention import Backend, CurveAttention, HilbertNeighborhoodAttention, HilbertWindowAttention
from .attention_2d import NeighborhoodAttention2d

MODES = (FORWARD, BOTH)


def cases() -> Sequence[Case]:
    """All of them."""
    return [
        *network_cases("eager"), *window_cases(), *neighborhood_cases(), *slide_cases(), *part_cases(),
        *network_cases("compiled"), *network_cases("graphs"), *side_cases(), *batch_cases(),
    ]  # fmt: skip


# Whole networks.


def network_cases(how: str) -> Iterator[Case]:
    """H7: a training step of HWT beside Swin's, and of HNT beside NAT's; inference too.

    NAT is what HNT is with square neighbourhoods: `na2d-flex-bias` is that network through FlexAttention. The gradient
    of the bias costs it several times the rest, so that `na2d-flex` does without one, as `triton-no-bias` does.

    Args:
        how: `"eager"`, `"compiled"`, or `"graphs"`: compiled, and replayed as CUDA graphs, which a host that takes long
            over a launch does not slow down. Inference is timed eager alone: compiling takes long.
    """
    modes = (TRAIN, INFER) if how == "eager" else (TRAIN,)
    run = {"compiled": how != "eager", "compile_mode": "reduce-overhead" if how == "graphs" else None}
    hwt, hnt, nat = "hwt-tiny_8xb128_in1k", "hnt-mini_8xb128_in1k", "nat2d-mini_8xb128_in1k"

    problem = ModelProblem("hwt-tiny", _network(hwt, backend="torch"), series="HWT-tiny")
    providers = [
        model_provider("triton", _network(hwt, backend="triton"), **run),
        _other("swin", "swin-tiny_16xb64_in1k", run),
    ]
    if how == "eager":
        providers.append(_other("flash-swin", "flash-swin-tiny_16xb64_in1k", run))
    goals = tuple(Goal(mode, "speed-up", 1.0, over="swin") for mode in modes)
    yield Case(f"H7/hwt-tiny/{how}", "H7", problem, tuple(providers), modes, goals=goals, clock="wall")

    rows = {"order": "row_major"}
    bare, bare_rows = {"relative_bias": False}, {"relative_bias": False, **rows}
    problem = ModelProblem("hnt-mini", _network(hnt, backend="torch"), series="HNT-mini")
    without = ModelProblem("hnt-mini without bias", _network(hnt, backend="torch", **bare))
    squares = ModelProblem("nat2d-mini", _network(nat, backend="torch", **rows))
    bare_squares = ModelProblem("nat2d-mini without bias", _network(nat, backend="torch", **bare_rows))
    providers = [
        model_provider("triton", _network(hnt, backend="triton"), **run),
        model_provider("triton-no-bias", _network(hnt, backend="triton", **bare), instead=without, **run),
        model_provider("na2d-flex", partial(_nat_by_flex, nat, bare_rows), instead=bare_squares, **run),
    ]
    if how == "eager":
        providers += [
            model_provider("na2d-flex-bias", partial(_nat_by_flex, nat, rows), instead=squares),
            model_provider("na2d-triton", _network(nat, backend="triton", **bare_rows), instead=bare_squares),
        ]
    goals = tuple(Goal(mode, "speed-up", 1.0, over="na2d-flex") for mode in modes)
    if how == "eager":
        goals += tuple(Goal(mode, "speed-up", 1.0, over="na2d-flex-bias") for mode in modes)
    yield Case(f"H7/hnt-mini/{how}", "H7", problem, tuple(providers), modes, goals=goals, clock="wall")


def _other(name: str, network: str, run: Mapping[str, Any]) -> Provider:
    """Another paper's network, which is compared with nothing here."""
    return model_provider(name, _network(network), instead=ModelProblem(network), **run)


def _nat_by_flex(name: str, backbone: Mapping[str, Any]) -> nn.Module:
    """NAT with compiled FlexAttention, written as its users write it: see `vitreous_core.bench.attention.flex`."""
    network = _build_network(name, {"backbone": {**backbone, "backend": "flex"}})
    masks = flex_masks(7)
    for module in network.modules():
        if isinstance(module, NeighborhoodAttention2d):
            module.attend = partial(_attend_by_flex, module, masks)
    # Four maps, with gradients and without, and the gate's few images: more variants than Dynamo allows by default,
    # beyond which it would run FlexAttention uncompiled.
    torch._dynamo.config.recompile_limit = 4 * 4
    return network


def flex_masks(kernel: int) -> dict[tuple[int, int], BlockMask]:
    """FlexAttention's masks of neighbourhoods for the four maps of a 224-pixel image, on the default device."""
    masks = {}
    for side in (56, 28, 14, 7):
        problem = AttentionProblem(Neighborhood2d(kernel), side, side)
        block = {"query_block": FLEX_BLOCK, "key_block": FLEX_BLOCK}
        mask = problem.pattern.layout(side, side, **block).to(torch.get_default_device()).to_flex()
        mask.mask_mod = flex_mask(problem)
        assert mask.mask_mod is not None
        masks[side, side] = mask
    return masks


def _attend_by_flex(
    module: NeighborhoodAttention2d, masks: Mapping[tuple[int, int], BlockMask], qkv: Tensor, size: tuple[int, int]
) -> Tensor:
    heads = qkv.unflatten(2, (3, module.num_heads, module.head_dim)).unbind(2)
    query, key, value = (part.transpose(1, 2) for part in heads)
    # Below 128 queries it would take the kernel made for decoding.
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    out = compiled_flex()(
        query, key, value, score_mod=_flex_bias(module.rpb, size[1]), block_mask=masks[size], scale=module.scale,
        kernel_options=options,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2)


def _flex_bias(rpb: Tensor | None, width: int) -> Callable[..., Tensor] | None:
    """NAT's bias as FlexAttention takes it, for tokens in row-major order."""
    if rpb is None:
        return None
    reach = rpb.shape[1] // 2

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Masked pairs of a partial block may be further apart than the table reaches.
        row = (k // width - q // width).clamp(-reach, reach) + reach
        column = (k % width - q % width).clamp(-reach, reach) + reach
        return score + rpb[head, row, column]

    return add_bias


def _network(name: str, **backbone: Any) -> Callable[[], nn.Module]:
    """Builds a packaged classifier, of any paper here or MMPretrain's own, with changes of its backbone."""
    return partial(_build_network, name, {"backbone": backbone} if backbone else {})


def _build_network(name: str, changes: Mapping[str, Any]) -> nn.Module:
    try:
        from vitreous_core.mm.models import named_model
    except ModuleNotFoundError as error:
        raise Unavailable(f"building networks by name needs vitreous-core[mm]: {error}") from None
    try:
        return named_model(name, **changes)
    except ValueError as error:  # another paper's, which need not be installed
        raise Unavailable(str(error)) from None


# Attention alone.


@dataclass(frozen=True)
class _Sweep(AttentionProblem):
    """The same problem at several values of one fact."""

    axis: str = "side"

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {**super().facts(), "axis": self.axis}


_WITH_FLEX = (96, 256)
"""Sides of the image at which FlexAttention stands beside: core's suite has it, on the same patterns, at the others."""


def window_cases() -> Iterator[Case]:
    """Windows: true squares by every way there is, and as many tokens on the curve (HWA)."""
    for side, window in ((56, 7), (64, 8), (96, 16), (128, 16), (256, 16)):
        squares = AttentionProblem(Window2d(window), side, side, series="WSA")
        on_curve = AttentionProblem(Window1d(window**2), side, side, "hilbert", series="HWA")
        providers = [
            attention_provider("hwa", ours, instead=on_curve),
            attention_provider("wsa", ours),
            attention_provider("wsa-window-order", ours, order="window", tile=window, pattern=Window1d(window**2)),
            attention_provider("sdpa-window-order", partial(windowed, fused=True), order="window", tile=window),
            _named("eager-wsa", EAGER_WINDOWS),
        ]
        if side in _WITH_FLEX:
            providers += [_named("flex-wsa", FLEX), attention_provider("flex-hwa", flex, instead=on_curve)]
        goals = tuple(Goal(mode, "speed-up", 4.0, over="eager-wsa") for mode in MODES)
        yield Case(f"WSA/{window}/{side}", "WSA", squares, tuple(providers), MODES, ours="hwa", goals=goals)


def slide_cases() -> Iterator[Case]:
    """Slides: true squares, by our kernel and by unfolding, and as many tokens on the curve (HSA)."""
    for side, kernel in ((56, 7), (64, 7), (96, 11), (128, 17), (256, 17)):
        squares = AttentionProblem(Slide2d(kernel), side, side, series="SA")
        on_curve = AttentionProblem(Slide1d(kernel**2), side, side, "hilbert", series="HSA")
        providers = [
            attention_provider("hsa", ours, instead=on_curve),
            attention_provider("sa", ours),
        ]
        goals = []
        if side in _WITH_FLEX:
            providers += [_named("flex-sa", FLEX), attention_provider("flex-hsa", flex, instead=on_curve)]
        if side == 128:  # `NA` has the order at every size
            providers.append(attention_provider("sa-hilbert-order", ours, order="hilbert"))
        if side < 128:  # beyond, unfolded keys and values do not fit: core's H3 takes four images there
            providers.append(_named("unfold", UNFOLD))
            goals = [Goal(mode, "speed-up", 18.0, over="unfold") for mode in MODES]
        yield Case(f"SA/{kernel}/{side}", "SA", squares, tuple(providers), MODES, ours="hsa", goals=tuple(goals))


def neighborhood_cases() -> Iterator[Case]:
    """Neighbourhoods: true squares under two orders, and as many tokens on the curve (HNA)."""
    for side, kernel in ((56, 7), (96, 17), (128, 17), (256, 17)):
        squares = AttentionProblem(Neighborhood2d(kernel), side, side, series="NA")
        on_curve = AttentionProblem(Neighborhood1d(kernel**2), side, side, "hilbert", series="HNA")
        providers = [
            attention_provider("hna", ours, instead=on_curve),
            attention_provider("na2d", ours),
            attention_provider("na2d-hilbert-order", ours, order="hilbert"),
        ]
        if side in _WITH_FLEX:
            providers += [_named("flex-na2d", FLEX), attention_provider("flex-hna", flex, instead=on_curve)]
        yield Case(f"NA/{kernel}/{side}", "NA", squares, tuple(providers), MODES, ours="hna")


def side_cases() -> Iterator[Case]:
    """Time against the image side, window 8 and kernel 7."""
    for side in (64, 128, 256):
        yield from _swept("sides", side, batch=16, axis="side")


def batch_cases() -> Iterator[Case]:
    """Time against the batch, on 64 x 64 images."""
    for batch in (1, 8, 64):
        yield from _swept("batches", 64, batch=batch, axis="batch")


def _swept(mark: str, side: int, *, batch: int, axis: str) -> Iterator[Case]:
    def sweep(pattern: Pattern, order: str, series: str) -> _Sweep:
        return _Sweep(pattern, side, side, order, batch=batch, series=series, axis=axis)

    point = side if axis == "side" else batch
    squares = sweep(Window2d(8), "row_major", "window 8")
    ways = (
        attention_provider("hwa", ours, instead=sweep(Window1d(64), "hilbert", "HWA")),
        attention_provider("wsa", ours),
        attention_provider("sdpa-window-order", partial(windowed, fused=True), order="window", tile=8),
        _named("eager-wsa", EAGER_WINDOWS),
    )
    yield Case(f"{mark}/window-8/{point}", mark, squares, ways, MODES, ours="hwa")
    squares = sweep(Neighborhood2d(7), "row_major", "kernel 7")
    ways = (
        attention_provider("hna", ours, instead=sweep(Neighborhood1d(49), "hilbert", "HNA")),
        attention_provider("na2d", ours),
        attention_provider("na2d-hilbert-order", ours, order="hilbert"),
    )
    yield Case(f"{mark}/kernel-7/{point}", mark, squares, ways, MODES, ours="hna")


def _named(name: str, provider: Provider) -> Provider:
    return Provider(name, provider.prepare)


# A whole module, and its parts.


@dataclass(frozen=True)
class ModuleProblem:
    """An attention module on tokens in image order.

    Args:
        build: makes the module, given channels and heads.
        side: of the image.
        batch, dim, heads: sizes of the tokens `[batch, side^2, dim]`.
        dtype: theirs and the parameters', by name.
        series: as in `AttentionProblem`.
    """

    build: Callable[[int, int], CurveAttention]
    side: int
    batch: int = 16
    dim: int = 128
    heads: int = 2
    dtype: str = "float16"
    series: str = ""

    def module(self, device: torch.device) -> CurveAttention:
        """The module with its first weights, in the problem's dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = self.build(self.dim, self.heads)
        return built.to(device, getattr(torch, self.dtype))

    def work(self, mode: str) -> Work:
        """Tokens, and each intermediate of an unfused module, read and written once; products of the projections.

        Forward: the input, queries with keys and values, the mixed heads and the output. Backward: their gradients,
        and the input, queries, keys, values and mixed heads again.
        """
        tokens = self.batch * self.side**2
        tensor = tokens * self.dim * getattr(torch, self.dtype).itemsize
        product = 2 * tokens * 4 * self.dim**2
        forward = 1 + 3 + 3 + 1 + 1 + 1
        return Work(forward * tensor, product) if mode == FORWARD else Work(3 * forward * tensor, 3 * product)

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {"series": self.series, "side": self.side, "batch": self.batch, "heads": self.heads,
                "head_dim": self.dim // self.heads, "dtype": self.dtype}  # fmt: skip


Run = Callable[[], Tensor]


def part_cases() -> Iterator[Case]:
    """What a module costs besides its attention."""

    def hwa(dim: int, heads: int) -> CurveAttention:
        return HilbertWindowAttention(dim, heads, 16, relative_bias=False, backend="triton")

    def hna(dim: int, heads: int) -> CurveAttention:
        return HilbertNeighborhoodAttention(dim, heads, 289, relative_bias=False, backend="triton")

    def na2d(dim: int, heads: int) -> CurveAttention:
        return NeighborhoodAttention2d(dim, heads, 7, order="row_major", backend="triton")

    for name, build, side in (("hwa-16", hwa, 128), ("hna-17", hna, 96), ("na2d-7-bias", na2d, 56)):
        problem = ModuleProblem(build, side, series=name)
        providers = [
            Provider("module", partial(_prepare_module, on_curve=False)),
            Provider("module-on-curve", partial(_prepare_module, on_curve=True)),
            Provider("attention", _prepare_mixing),
            Provider("projections", _prepare_projections),
            Provider("reorder", _prepare_reorder),
        ]
        if name.startswith("na2d"):  # in row-major order already
            providers = [provider for provider in providers if provider.name not in ("module-on-curve", "reorder")]
        yield Case(f"parts/{name}/{side}", "parts", problem, tuple(providers), MODES, ours="module")


def _tokens(problem: ModuleProblem, device: torch.device, channels: int) -> tuple[Tensor, Tensor]:
    """Random tokens that require gradients, and a cotangent of `dim` channels."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, problem.dtype)
    shape = (problem.batch, problem.side**2)
    tokens, cotangent = (
        torch.randn(*shape, width, generator=generator, device=device, dtype=dtype) for width in (channels, problem.dim)
    )
    return tokens.requires_grad_(), cotangent


def _both_ways(run: Run, leaves: Sequence[Tensor], cotangent: Tensor) -> Mapping[str, Callable[[], object]]:
    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    return {FORWARD: forward, BOTH: lambda: torch.autograd.grad(run(), leaves, cotangent)}


def _prepare_module(problem: ModuleProblem, device: torch.device, *, on_curve: bool) -> Prepared:
    module, size = problem.module(device), (problem.side, problem.side)
    tokens, cotangent = _tokens(problem, device, problem.dim)
    leaves = [tokens, *module.parameters()]
    steps = _both_ways(lambda: module(tokens, size, on_curve=on_curve), leaves, cotangent)
    facts = {"reorder": "outside" if on_curve else "inside"}
    return Prepared(steps, partial(_gate_module, problem, device, on_curve), facts=facts)


def _gate_module(problem: ModuleProblem, device: torch.device, on_curve: bool, modes: Collection[str]) -> Gate:
    """Output and all gradients of the first image against the module in plain PyTorch in fp64."""
    tokens, cotangent = (tensor.detach()[:1] for tensor in _tokens(problem, device, problem.dim))

    def results(dtype: torch.dtype, backend: Backend | None = None) -> dict[str, Tensor]:
        module = problem.module(device).to(dtype)
        module.backend = backend or module.backend
        leaf = tokens.to(dtype).requires_grad_()
        out = module(leaf, (problem.side, problem.side), on_curve=on_curve)
        named = dict(module.named_parameters())
        gradients = torch.autograd.grad(out, [leaf, *named.values()], cotangent.to(dtype))
        return dict(zip(("out", "tokens", *named), (out.detach(), *gradients), strict=True))

    dtype = getattr(torch, problem.dtype)
    truth, own, got = results(torch.float64, "torch"), results(dtype, "torch"), results(dtype)
    rounding = torch.finfo(dtype).eps / 2
    errors = {name: relative_error(tensor, truth[name]) for name, tensor in got.items()}
    limits = {name: 2 * (relative_error(tensor, truth[name]) + rounding) for name, tensor in own.items()}
    return Gate(errors, limits, "the module in plain PyTorch in fp64, first image of the batch")


_PART = {"part": "of `module`, which is compared with the truth as a whole"}


def _prepare_mixing(problem: ModuleProblem, device: torch.device) -> Prepared:
    module, size = problem.module(device), (problem.side, problem.side)
    packed, cotangent = _tokens(problem, device, 3 * problem.dim)
    leaves = [packed, *(parameter for name, parameter in module.named_parameters() if name == "rpb")]
    run = partial(module.attend, packed, size)
    return Prepared(_both_ways(run, leaves, cotangent), facts=_PART)


def _prepare_projections(problem: ModuleProblem, device: torch.device) -> Prepared:
    module = problem.module(device)
    tokens, cotangent = _tokens(problem, device, problem.dim)
    mixed, _ = _tokens(problem, device, problem.dim)
    packed = torch.randn(*tokens.shape[:2], 3 * problem.dim, device=device, dtype=tokens.dtype)
    first, last = (list(layer.parameters()) for layer in (module.qkv, module.proj))

    def forward() -> object:
        with torch.no_grad():
            return module.qkv(tokens), module.proj(mixed)

    def both() -> object:
        return (
            torch.autograd.grad(module.qkv(tokens), [tokens, *first], packed),
            torch.autograd.grad(module.proj(mixed), [mixed, *last], cotangent),
        )

    return Prepared({FORWARD: forward, BOTH: both}, facts=_PART)


def _prepare_reorder(problem: ModuleProblem, device: torch.device) -> Prepared:
    module, side = problem.module(device), problem.side
    tokens, cotangent = _tokens(problem, device, problem.dim)
    run = lambda: module.curve.take_off(module.curve.put_on(tokens, side, side), side, side)  # noqa: E731
    return Prepared(_both_ways(run, [tokens], cotangent), facts=_PART)
