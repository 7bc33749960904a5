"""Core's cases: the marks H1 to H6 of the block-sparse attention, its layouts and its curves, and first calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from ..patterns import Neighborhood1d, Neighborhood2d, Pattern, Slide1d, Slide2d, Window1d, Window2d
from .attention import (
    BOTH,
    EAGER,
    EAGER_WINDOWS,
    FLEX,
    FORWARD,
    SDPA,
    SDPA_WINDOWS,
    TRITON,
    UNFOLD,
    AttentionProblem,
    attention_provider,
    ours,
    windowed,
)
from .case import Case, Goal
from .first_calls import BACKWARD, COLD_CURVE, FIRST_CALL, ColdCurveProblem, FirstCallProblem
from .host_tables import (
    BUILD,
    CREATE_BLOCK_MASK,
    HILBERTSFC,
    HILBERTSFC_PARALLEL,
    NUMBA_CURVE,
    NUMBA_LAYOUT,
    PYTHON_CURVE,
    CurveProblem,
    LayoutProblem,
)

MODES = (FORWARD, BOTH)
SIZES = ((56, 7, 7), (64, 8, 9), (128, 16, 17))
"""Image side, window side, kernel side. On the curve a kernel has its square of keys."""


def cases() -> Sequence[Case]:
    """All of them."""
    return [
        *flex_cases(), *window_cases(), *slide_cases(), *neighborhood_cases(), *layout_cases(), *mask_cases(),
        *curve_cases(), *first_call_cases(), *smoke_cases(),
    ]  # fmt: skip


def flex_cases() -> Iterator[Case]:
    """H1: every pattern against FlexAttention. Patterns on the image are in row-major order for all providers."""
    goals = tuple(Goal(mode, "speed-up", 1.5, over="flex", mean=2.0) for mode in MODES)
    for side, window, kernel in SIZES:
        for series, pattern, order in (
            ("WSA", Window2d(window), "row_major"),
            ("HWA", Window1d(window**2), "hilbert"),
            ("SA", Slide2d(kernel), "row_major"),
            ("HSA", Slide1d(kernel**2), "hilbert"),
            ("NA2D", Neighborhood2d(kernel), "row_major"),
            ("HNA", Neighborhood1d(kernel**2), "hilbert"),
        ):
            providers = [TRITON, FLEX]
            if series in ("WSA", "HWA"):
                providers.append(SDPA_WINDOWS)
            # Over all pairs every pattern costs the same, and at 128 x 128 a lot: two patterns say it.
            if side < 128 or series in ("WSA", "NA2D"):
                providers += [SDPA, EAGER]
            problem = AttentionProblem(pattern, side, side, order, series=series)
            size = window if series in ("WSA", "HWA") else kernel
            name = f"H1/{series.lower()}-{size}/{side}"
            yield Case(name, "H1", problem, tuple(providers), MODES, goals=goals)


def window_cases() -> Iterator[Case]:
    """H2: windows on the curve against dense attention on cut windows, 128 x 128, window 16.

    On this grid a window of the curve is a window of the image, so all providers compute the same. The baselines'
    tensors are in window-partition order: no copies for them.
    """
    side, window = 128, 16
    problem = AttentionProblem(Window2d(window), side, side, series="HWA")
    sdpa = attention_provider("sdpa-windows", partial(windowed, fused=True), order="window", tile=window)
    eager = attention_provider("eager-windows", partial(windowed, fused=False), order="window", tile=window)
    claim = tuple(Goal(mode, "speed-up", 4.0, over="eager-windows") for mode in MODES)
    fused = (Goal(FORWARD, "speed-up", 1.0, over="sdpa-windows"), Goal(BOTH, "speed-up", 1.5, over="sdpa-windows"))
    hwa = attention_provider("triton", ours, order="hilbert", pattern=Window1d(window**2))
    yield Case(f"H2/hwa-{window}/{side}", "H2", problem, (hwa, sdpa, eager), MODES, goals=claim + fused)

    with_bias = replace(problem, bias_extent=(window, window), series="HWA + bias")
    fused_with_bias = tuple(Goal(mode, "speed-up", 2.0, over="sdpa-windows") for mode in MODES)
    # A window bias goes with windows of the image; along the curve these are runs of tokens here.
    hwa = attention_provider("triton", ours, order="hilbert")
    goals = claim + fused_with_bias
    yield Case(f"H2/hwa-{window}-bias/{side}", "H2", with_bias, (hwa, sdpa, eager), MODES, goals=goals)


def slide_cases() -> Iterator[Case]:
    """H3: the slide on the curve against slide attention by unfolding, as the paper compares them."""
    side, kernel = 128, 17
    # Unfolded keys and values are 289 times the image: four images fit.
    slide = AttentionProblem(Slide2d(kernel), side, side, batch=4, series="SA")
    on_curve = AttentionProblem(Slide1d(kernel**2), side, side, "hilbert", batch=4, series="HSA")
    goals = tuple(Goal(mode, "speed-up", 18.0, over="unfold") for mode in MODES)
    hsa = attention_provider("triton", ours, instead=on_curve)
    exact = attention_provider("triton-sa", ours)
    yield Case(f"H3/hsa-{kernel}/{side}", "H3", slide, (hsa, exact, UNFOLD), MODES, goals=goals)


def neighborhood_cases() -> Iterator[Case]:
    """H4: the exact 2-D neighbourhood with a trainable bias, ours in Hilbert order against Flex in row-major order."""
    on_curve = attention_provider("triton", ours, order="hilbert")
    in_rows = attention_provider("triton-rows", ours)
    for side, kernel, bound in ((56, 7, 1.4), (64, 9, 1.6), (128, 17, 2.5), (128, 33, 2.5)):
        series = "NA2D + bias" if kernel < 33 else "NA2D-33 + bias"
        problem = AttentionProblem(Neighborhood2d(kernel), side, side, bias_extent=(kernel, kernel), series=series)
        goals = tuple(Goal(mode, "speed-up", bound, over="flex") for mode in MODES)
        yield Case(f"H4/na2d-{kernel}/{side}", "H4", problem, (on_curve, in_rows, FLEX), MODES, goals=goals)


def layout_cases() -> Iterator[Case]:
    """H5: layouts on one CPU core."""
    on_sequence: tuple[tuple[str, Pattern], ...] = (
        ("hwa", Window1d(256)), ("hsa", Slide1d(289)), ("hna", Neighborhood1d(289)),
    )  # fmt: skip
    on_image: tuple[tuple[str, Pattern], ...] = (
        ("wsa", Window2d(16)), ("swsa", Window2d(16, 8)), ("sa", Slide2d(17)), ("dilated-sa", Slide2d(17, 2)),
        ("na2d", Neighborhood2d(17)), ("na2d-33", Neighborhood2d(33)),
    )  # fmt: skip
    for side, limit_ms in ((128, 20.0), (256, 100.0)):
        for patterns, orders in ((on_sequence, ("hilbert",)), (on_image, ("row_major", "hilbert", "morton", "random"))):
            for name, pattern in patterns:
                for order in orders:
                    yield Case(
                        f"H5/{name}-{order}/{side}", "H5", LayoutProblem(pattern, side, side, order),
                        (NUMBA_LAYOUT,), (BUILD,), "cpu", "numba", (Goal(BUILD, "milliseconds", limit_ms),),
                        clock="processor",
                    )  # fmt: skip


def mask_cases() -> Iterator[Case]:
    """What FlexAttention's own mask builder takes on the GPU for masks that H1 makes from our layouts."""
    for side, _, kernel in SIZES:
        for name, pattern, order in (
            ("hna", Neighborhood1d(kernel**2), "hilbert"),
            ("na2d", Neighborhood2d(kernel), "row_major"),
        ):
            problem = LayoutProblem(pattern, side, side, order)
            providers = (NUMBA_LAYOUT, CREATE_BLOCK_MASK)
            yield Case(f"H5/mask-{name}-{kernel}/{side}", "H5", problem, providers, (BUILD,), "cuda", "numba",
                       clock="wall")  # fmt: skip


def curve_cases() -> Iterator[Case]:
    """H6: the Hilbert order of one grid."""
    goals = [Goal(BUILD, "speed-up", 100.0, over="python")]
    on_squares = [Goal(BUILD, "speed-up", 1.0, over=name) for name in ("hilbertsfc", "hilbertsfc-parallel")]
    for height, width in ((56, 56), (64, 64), (128, 128), (224, 224), (256, 256), (720, 1280), (1024, 1024)):
        is_square = height == width and height & (height - 1) == 0
        providers = (NUMBA_CURVE, PYTHON_CURVE, *((HILBERTSFC, HILBERTSFC_PARALLEL) if is_square else ()))
        asked = goals + (on_squares if is_square else [])
        if height == 1024:
            asked = [*asked, Goal(BUILD, "milliseconds", 10.0)]
        yield Case(f"H6/hilbert/{height}x{width}", "H6", CurveProblem(height, width), providers, (BUILD,), "cpu",
                   "numba", tuple(asked))  # fmt: skip


def first_call_cases() -> Iterator[Case]:
    """What compiling costs: classes of dtype, head dimension and bias that bring kernels of their own."""
    goals = tuple(Goal(mode, "milliseconds", 3000.0) for mode in (FORWARD, BACKWARD))
    for dtype, head_dim, kernel in (
        ("float16", 64, None), ("float16", 64, 9), ("float16", 128, 9), ("float16", 256, 9),
        ("float32", 64, None), ("float32", 64, 9), ("float32", 128, 9), ("float32", 256, 9),
    ):  # fmt: skip
        bias_extent = None if kernel is None else (kernel, kernel)
        problem = AttentionProblem(
            Neighborhood2d(9), 64, 64, "hilbert", batch=1, head_dim=head_dim, dtype=dtype, bias_extent=bias_extent
        )
        name = f"first-call/na2d-{dtype}-{head_dim}{'' if kernel is None else '-bias'}/64"
        yield Case(name, "first-call", FirstCallProblem(problem), (FIRST_CALL,), (FORWARD, BACKWARD), goals=goals,
                   clock="wall")  # fmt: skip
    yield Case("first-call/hilbert/1024x1024", "first-call", ColdCurveProblem(CurveProblem(1024, 1024)), (COLD_CURVE,),
               (BUILD,), "cpu", "numba", (Goal(BUILD, "milliseconds", 2000.0),), clock="wall")  # fmt: skip


def smoke_cases() -> Iterator[Case]:
    """Small enough for a CPU, so that the harness can be tried anywhere; nothing is claimed from them."""
    for name, problem in (
        ("wsa-4", AttentionProblem(Window2d(4), 8, 8, batch=2, head_dim=16, dtype="float32", series="WSA")),
        (
            "na2d-3",
            AttentionProblem(
                Neighborhood2d(3), 8, 8, batch=2, head_dim=16, dtype="float32", bias_extent=(3, 3), series="NA2D"
            ),
        ),
        ("sa-3", AttentionProblem(Slide2d(3), 8, 8, batch=2, head_dim=16, dtype="float32", series="SA")),
    ):
        providers = [TRITON, FLEX, SDPA, EAGER]
        if name == "wsa-4":
            providers += [SDPA_WINDOWS, EAGER_WINDOWS]
        if name == "sa-3":
            providers.append(UNFOLD)
        yield Case(f"smoke/{name}/8", "smoke", problem, tuple(providers), MODES, "cpu")
