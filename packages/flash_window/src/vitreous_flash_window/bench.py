"""The cases of this paper: marks F1 to F6, the paper's own grid and figure, every Swin stage, and whole networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from vitreous_core.bench.attention import BOTH, FORWARD
from vitreous_core.bench.case import Case, Goal, Unavailable
from vitreous_core.bench.models import INFER, TRAIN, ModelProblem, model_provider

from .bench_operations import (
    COMPILED,
    EAGER,
    EAGER_IEEE,
    EAGER_IMAGE,
    FLEX,
    OFFICIAL,
    SDPA,
    SDPA_IMAGE,
    TRITON,
    TRITON_IMAGE,
    TRITON_WINDOWS,
    CutWindows,
    PackedImage,
)
from .convert import to_official

MODES = (FORWARD, BOTH)


def cases() -> Sequence[Case]:
    """All of them."""
    return [*window_cases(), *large_window_cases(), *image_cases(), *grid_cases(), *network_cases(), *smoke_cases()]


def window_cases() -> Iterator[Case]:
    """F1 and F2: cut windows of the four stages of Swin-T at batch 128, and windows of 8 x 8."""
    shapes = (
        (8192, 3, 49, 90), (2048, 6, 49, 83), (512, 12, 49, 74), (128, 24, 49, 60), (8192, 4, 64, 95),
    )  # fmt: skip
    for windows, heads, tokens, share in shapes:
        for dtype in ("float16", "bfloat16", "float32"):
            is_first = (windows, heads) == (8192, 3)
            if dtype == "float32" and not is_first:
                continue
            problem = CutWindows(windows, heads, tokens, dtype=dtype, tf32=dtype == "float32", series=dtype)
            providers = [TRITON, EAGER, SDPA]
            if dtype == "float16":
                providers += [FLEX, COMPILED, OFFICIAL] if is_first else [OFFICIAL]
            name = f"{windows}x{heads}x{tokens}x32-{dtype}"
            bound = 85 if dtype == "float32" else share
            for mark, mode in (("F1", FORWARD), ("F2", BOTH)):
                goals = [Goal(mode, "roof", bound)]
                if is_first and dtype == "float16" and mode == BOTH:
                    goals.append(Goal(mode, "speed-up", 7.0, over="eager"))
                yield Case(f"{mark}/{name}", mark, problem, tuple(providers), (mode,), goals=tuple(goals))


def large_window_cases() -> Iterator[Case]:
    """F3: windows of 12 x 12 to 32 x 32 over the same number of tokens."""
    for side, windows in ((12, 4096), (16, 2304), (24, 1024), (32, 576)):
        problem = CutWindows(windows, 3, side**2, series="tokens constant", axis="tokens")
        goals: tuple[Goal, ...] = ()
        if side <= 16:
            goals = (Goal(BOTH, "speed-up", 2.5, over="flex"), Goal(BOTH, "speed-up", 5.0, over="eager"))
        yield Case(f"F3/{side}x{side}", "F3", problem, (TRITON, FLEX, SDPA, EAGER), MODES, goals=goals)


def image_cases() -> Iterator[Case]:
    """F4: the packed image at every stage of Swin-T and Swin-B, 224 and 384 pixels, and Swin V2's attention."""
    providers = (TRITON_IMAGE, TRITON_WINDOWS, SDPA_IMAGE, EAGER_IMAGE)
    goals = (Goal(BOTH, "speed-up", 2.5, over="triton-windows"),)
    for arch, channels, heads in (("t", 96, 3), ("b", 128, 4)):
        for size, window, batch in ((224, 7, 128), (384, 12, 32)):
            batch = batch // 2 if arch == "b" else batch
            for stage in range(4):
                side = size // 4 >> stage
                problem = PackedImage(
                    batch, side, side, channels << stage, heads << stage, window,
                    shift=window // 2 if side > window else 0, series=f"swin-{arch} {size}",
                )  # fmt: skip
                yield Case(f"F4/swin-{arch}-{size}/stage{stage + 1}", "F4", problem, providers, MODES, goals=goals)
    for window in (8, 16):
        problem = PackedImage(64, 64, 64, 96, 3, window, window // 2, cosine=True, series=f"swinv2-t w{window}")
        yield Case(f"F4/swinv2-t-w{window}/stage1", "F4", problem, (TRITON_IMAGE, SDPA_IMAGE, EAGER_IMAGE), MODES)


def grid_cases() -> Iterator[Case]:
    """The grid of the paper's own benchmark: 4 heads; in float32 with a bias, in bfloat16 without.

    `eager` and ours multiply in TF32; `eager-ieee` in full float32, as the paper's baseline did.
    """
    for dtype, counts in (("float32", (64, 256, 1024, 4096)), ("bfloat16", (64, 256, 1024))):
        providers = (TRITON, EAGER, EAGER_IEEE, OFFICIAL) if dtype == "float32" else (TRITON, EAGER, SDPA)
        for tokens in (16, 64):
            for head_dim in (16, 64, 256):
                for windows in counts:
                    problem = CutWindows(
                        windows, 4, tokens, head_dim, dtype, with_bias=dtype == "float32", tf32=dtype == "float32",
                        series=f"{tokens} tokens, head dim {head_dim}",
                    )  # fmt: skip
                    name = f"grid-{dtype}/{windows}x4x{tokens}x{head_dim}"
                    yield Case(name, f"grid-{dtype}", problem, providers, MODES)


def network_cases() -> Iterator[Case]:
    """F5 and F6: a training step and inference of Swin-T, S and B: eager, compiled, and compiled into CUDA graphs.

    A host that takes long over a launch hides what a GPU does; graphs show it. MMPretrain's Swin cannot run as a whole
    in half precision; there the other two are compared.
    """
    for arch, batch in (("tiny", 128), ("small", 128), ("base", 64)):
        networks = {
            "triton": (partial(_named, f"flash-swin-{arch}_16xb64_in1k", backend="triton"), {}),
            "mmpretrain": (partial(_named, f"swin-{arch}_16xb64_in1k"), {}),
            "timm": (partial(_timm, f"swin_{arch}_patch4_window7_224"), {"adopt": _into_timm}),
        }
        reference = partial(_named, f"flash-swin-{arch}_16xb64_in1k", backend="torch")
        for how in ("eager", "compiled", "graphs"):
            compiled = how != "eager"
            run = {"compiled": compiled, "compile_mode": "reduce-overhead" if how == "graphs" else None}
            providers = tuple(
                model_provider(name, build, **run, **extra) for name, (build, extra) in networks.items()
            )  # fmt: skip
            step = ModelProblem(f"swin-{arch}", reference, batch, dtype="bfloat16", series=f"swin-{arch}")
            goals: tuple[Goal, ...] = ()
            if arch == "tiny":
                bound = 1.35 if compiled else 1.5
                goals = (Goal(TRAIN, "speed-up", bound, over="mmpretrain"),)
                if how != "graphs":  # whose memory the allocator does not count
                    goals += (Goal(TRAIN, "memory", 0.75, over="mmpretrain"),)
            yield Case(f"F5/swin-{arch}/{how}", "F5", step, providers, (TRAIN,), goals=goals, clock="wall")

            forward = ModelProblem(f"swin-{arch}", reference, batch, dtype="float16", series=f"swin-{arch}")
            if arch == "tiny":
                goals = (Goal(INFER, "speed-up", 1.4 if compiled else 1.7, over="mmpretrain"),)
            yield Case(f"F6/swin-{arch}/{how}", "F6", forward, providers, (INFER,), goals=goals, clock="wall")

            half = ModelProblem(f"swin-{arch}", reference, batch, dtype="float16", autocast=False)
            whole = (
                model_provider("triton", networks["triton"][0], **run),
                model_provider("timm", networks["timm"][0], **run, **networks["timm"][1], channels_last=True),
            )
            yield Case(f"F6/swin-{arch}-half/{how}", "F6", half, whole, (INFER,), clock="wall")


def _named(name: str, backend: str | None = None) -> nn.Module:
    from vitreous_core.mm.models import named_model

    changes = {} if backend is None else {"backbone": {"backend": backend}}
    return named_model(name, **changes)


def _timm(name: str) -> nn.Module:
    try:
        from timm import create_model
    except ImportError as error:
        raise Unavailable(f"timm is not installed: {error}") from error
    # The rate of the other two, whose configs name it.
    rates = {"tiny": 0.2, "small": 0.3, "base": 0.5}
    return create_model(name, drop_path_rate=rates[name.split("_")[1]])


def _into_timm(module: nn.Module, state: dict[str, Tensor]) -> None:
    from timm.models.swin_transformer import checkpoint_filter_fn

    module.load_state_dict(checkpoint_filter_fn(to_official(state), module))


def smoke_cases() -> Iterator[Case]:
    """Small enough for a CPU, so that the harness can be tried anywhere; nothing is claimed from them."""
    cut = CutWindows(8, 2, 9, 16, "float32", series="smoke")
    packed = PackedImage(2, 8, 8, 16, 2, 4, 2, dtype="float32", series="smoke")
    cosine = PackedImage(2, 8, 8, 16, 2, 4, 2, cosine=True, dtype="float32", series="smoke V2")
    windows = (TRITON, EAGER, SDPA, FLEX, OFFICIAL)
    yield Case("smoke/cut", "smoke", cut, windows, MODES, "cpu", ours="eager")
    for name, problem in (("packed", packed), ("cosine", cosine)):
        providers = (TRITON_IMAGE, TRITON_WINDOWS, SDPA_IMAGE, EAGER_IMAGE)
        yield Case(f"smoke/{name}", "smoke", problem, providers, MODES, "cpu", ours="eager")
