"""Kernels of additive attention against fp64: output and every gradient, in awkward shapes and strides."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vitreous_core.testing.budget import assert_within_budget, relative_error
from vitreous_swiftformer.ops import additive_attention, additive_attention_packed

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

both_devices = pytest.mark.parametrize(
    "where", [pytest.param("interpreter", marks=pytest.mark.interpret), pytest.param("gpu", marks=pytest.mark.gpu)]
)


@dataclass(frozen=True)
class Problem:
    """One case; `strides`: "contiguous", "packed" (halves of one tensor), "map" (channels first) or "strided"."""

    batch: int
    tokens: int
    channels: int
    dtype: torch.dtype = SINGLE
    strides: str = "contiguous"
    magnitude: float = 1.0
    w_dtype: torch.dtype = SINGLE

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype).to(DEVICE)

        shape = (self.batch, self.tokens, self.channels)
        made = {name: draw(*shape) for name in ("query", "key", "dunit", "dmixed")}
        # Not centred, so that the weights do not look like noise.
        made["query"] = self.magnitude * (made["query"] + 0.5)
        made["key"] = self.magnitude * made["key"]
        if self.strides == "packed":
            for first, second in (("query", "key"), ("dunit", "dmixed")):
                made[first], made[second] = torch.cat([made[first], made[second]], -1).chunk(2, -1)
        elif self.strides == "map":
            made = {name: tensor.mT.contiguous().mT for name, tensor in made.items()}
        elif self.strides == "strided":
            wide = torch.full((2 * self.tokens, self.batch, 3 * self.channels), torch.nan, dtype=self.dtype)
            wide = wide.to(DEVICE)
            for name in made:
                made[name] = wide.clone()[::2, :, ::3].transpose(0, 1).copy_(made[name])
            made["dunit"] = made["dunit"][:1].expand(self.batch, -1, -1)
            made["dmixed"] = made["dmixed"][..., :1].expand(shape)
        made["w_g"] = draw(self.channels).to(self.w_dtype)
        return made

    def run(self, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Results and every gradient, by name; `dtype` promotes all inputs first (fp64 for the truth)."""
        cast = {name: t if dtype is None else t.to(dtype) for name, t in tensors.items()}
        leaves = {name: cast[name].detach().requires_grad_() for name in ("query", "key", "w_g")}
        results = additive_attention(*leaves.values(), backend=backend)
        gradients = torch.autograd.grad(results, list(leaves.values()), [cast["dunit"], cast["dmixed"]])
        named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {"unit": results[0].detach(), "mixed": results[1].detach(), **named}


def check(problem: Problem) -> dict[str, Tensor]:
    tensors = problem.tensors()
    truth, baseline = problem.run(tensors, "torch", torch.float64), problem.run(tensors, "torch")
    actual = problem.run(tensors, "triton")
    assert {name: t.dtype for name, t in actual.items()} == {name: t.dtype for name, t in baseline.items()}
    # The gradient of w_g can be wider than what it is made from: its budget is that of the inputs' precision.
    assert_within_budget(actual, truth, baseline, precision=problem.dtype)
    again = problem.run(tensors, "triton")
    assert all(torch.equal(again[name], actual[name]) for name in actual)
    return actual


SMALL = {
    "one-token": Problem(2, 1, 16),
    "two-tokens": Problem(8, 2, 16),
    "prime-split": Problem(1, 331, 48),
    "packed-half": Problem(3, 49, 56, HALF, "packed", w_dtype=HALF),
    "packed-bfloat": Problem(9, 49, 20, BRAIN, "packed"),
    "map": Problem(2, 97, 24, SINGLE, "map"),
    "strided": Problem(2, 61, 12, HALF, "strided"),
    "large-half": Problem(1, 31, 64, HALF, magnitude=8e3),
    "small-half": Problem(1, 31, 64, HALF, magnitude=1e-4),
    "wide": Problem(9, 13, 220, SINGLE, "packed"),
}

# Every stage of every SwiftFormer at 224, each dtype; few and many images; other sizes.
LARGE = {
    "xs-1": Problem(4, 3136, 48, HALF),
    "xs-2": Problem(16, 784, 56, BRAIN, "packed"),
    "xs-3": Problem(8, 196, 112, HALF, "packed"),
    "xs-4": Problem(128, 49, 220, HALF, "packed"),
    "s-3": Problem(128, 196, 168, BRAIN),
    "l1-1": Problem(128, 3136, 48, BRAIN, "packed"),
    "l1-1-one-image": Problem(1, 3136, 48, HALF, "packed"),
    "l1-2-map": Problem(32, 784, 96, HALF, "map"),
    "l1-3-single": Problem(64, 196, 192, SINGLE),
    "l1-4": Problem(1500, 49, 384, BRAIN, "packed"),
    "l3-1-single": Problem(4, 3136, 64, SINGLE, "packed"),
    "l3-3-strided": Problem(4, 1021, 320, HALF, "strided"),
    "l3-4": Problem(2, 1024, 512, BRAIN),
    "widest": Problem(3, 67, 2048, SINGLE),
    "one-token": Problem(5, 1, 384, HALF),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name: str) -> None:
    check(SMALL[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_on_gpu(name: str) -> None:
    check(LARGE[name])


@both_devices
def test_one_launch_and_two_agree_with_the_truth_alike(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitreous_swiftformer.ops.triton import arguments, backward, configs, forward

    problem = Problem(2, 139, 48)
    for module in (forward, backward):  # each plan is made anew, by the numbers below
        monkeypatch.setattr(module, "plan_passes", arguments.plan_passes.__wrapped__)
    tensors = problem.tensors()
    truth = problem.run(tensors, "torch", torch.float64)
    for programs in (1, 1000):
        monkeypatch.setattr(configs, "_PROGRAMS_PER_MULTIPROCESSOR", programs)
        monkeypatch.setattr(configs, "_ELEMENTS", 1024)
        plan = configs.make_plan(2, 139, 48, 1)
        assert (plan.parts > 1) == (programs > 1)
        actual = problem.run(tensors, "triton")
        # Measured: 2e-7 at most.
        assert all(relative_error(actual[name], truth[name]) < 1e-6 for name in truth)


@both_devices
def test_what_is_remembered_of_one_call_is_not_taken_for_another(where: str) -> None:
    problems = [Problem(2, 21, 20, HALF, strides) for strides in ("contiguous", "packed", "map")]
    for problem in (*problems, Problem(2, 20, 21, HALF), Problem(3, 21, 20, HALF), *problems):
        check(problem)


@both_devices
@pytest.mark.parametrize("shape", [(0, 7, 8), (2, 0, 8)])
def test_nothing_to_do(where: str, shape: tuple[int, ...]) -> None:
    actual = Problem(*shape).run(Problem(*shape).tensors(), "triton")
    assert actual["unit"].shape == actual["mixed"].shape == actual["dquery"].shape == shape
    assert not actual["dw_g"].any()


@both_devices
def test_zero_vectors_are_as_the_truth_has_them(where: str) -> None:
    # The floor replaces lengths of zero: finite results, and gradients without the term of the length.
    problem = Problem(2, 7, 16)
    tensors = problem.tensors()
    tensors["query"][0] = 0.0
    tensors["query"][1, 3] = 0.0
    tensors["key"][1, :2] = 0.0
    assert_within_budget(
        problem.run(tensors, "triton"), problem.run(tensors, "torch", torch.float64), problem.run(tensors, "torch")
    )


@pytest.mark.parametrize(
    ("channels", "shift", "lean"),
    [
        pytest.param(192, -0.5, 1, marks=pytest.mark.interpret, id="interpreter-192"),
        pytest.param(192, -0.5, 1, marks=pytest.mark.gpu, id="gpu-192"),
        # Run once on a GPU: 1.4e-6, which nobody has explained; here it is 3.2e-7 at most.
        pytest.param(24, 0.0, 2, marks=pytest.mark.interpret, id="interpreter-24"),
    ],
)
def test_the_gradient_of_w_keeps_its_digits_where_its_terms_cancel(channels: int, shift: float, lean: int) -> None:
    """Queries that lean towards `w_g` have weights nearly alike, and the gradients of those are small differences."""
    tensors, problem = Problem(8, 196, channels).tensors(), Problem(1, 196, channels)
    tensors["query"] = tensors["query"] + shift + lean * tensors["w_g"]
    for image in range(8):
        one = {name: tensor if name == "w_g" else tensor[image : image + 1] for name, tensor in tensors.items()}
        actual, truth = problem.run(one, "triton"), problem.run(one, "torch", torch.float64)
        # 192 channels: over twenty draws on a GPU at most 3.0e-7, and 1.9e-6 on the plain path.
        assert relative_error(actual["dw_g"], truth["dw_g"]) <= 1e-6


@both_devices
def test_results_keep_the_order_of_their_inputs_dimensions(where: str) -> None:
    problem = Problem(2, 15, 8, strides="map")
    tensors = problem.tensors()
    actual = problem.run(tensors, "triton")
    for name, source in (("unit", "query"), ("mixed", "key"), ("dquery", "query"), ("dkey", "key")):
        assert actual[name].stride() == tensors[source].stride()


@both_devices
@pytest.mark.parametrize("strides", ["contiguous", "map"])
def test_packed_is_the_same_side_by_side(where: str, strides: str) -> None:
    problem = Problem(2, 21, 20, HALF)
    tensors = problem.tensors()
    packed = torch.cat([tensors["query"], tensors["key"]], -1)
    if strides == "map":
        packed = packed.mT.contiguous().mT
    expected = torch.cat(additive_attention(*packed.chunk(2, -1), tensors["w_g"], backend="triton"), -1)
    actual = additive_attention_packed(packed, tensors["w_g"], backend="triton")
    assert actual.stride() == packed.stride()
    assert torch.equal(actual, expected)
    leaf = packed.clone().requires_grad_()
    additive_attention_packed(leaf, tensors["w_g"], backend="triton").float().square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.gpu
def test_offsets_beyond_31_bits(large_memory: Callable[[int], None]) -> None:
    """More than 2^31 elements between two images, and between two tokens."""
    large_memory(5)
    near = Problem(2, 2, 64, HALF).tensors()
    buffer = torch.empty(2**31 + 2**20, device=DEVICE, dtype=HALF)
    for strides in ((2**31, 64, 1), (64, 2**31, 1)):
        far = {**near}
        for i, name in enumerate(("query", "key", "dunit", "dmixed")):
            far[name] = buffer.as_strided((2, 2, 64), strides, 1024 * i).copy_(near[name])
        expected, actual = (Problem(2, 2, 64, HALF).run(tensors, "triton") for tensors in (near, far))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.gpu
def test_number_of_images_and_tokens_compiles_nothing_anew() -> None:
    from vitreous_swiftformer.ops.triton.backward import _additive_bwd_kernel
    from vitreous_swiftformer.ops.triton.forward import _additive_fwd_kernel

    def compiled() -> int:
        kernels = (_additive_fwd_kernel, _additive_bwd_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    counts = []
    for batch, tokens in ((2048, 196), (1999, 784), (2047, 3136)):
        problem = Problem(batch, tokens, 16, HALF)
        problem.run(problem.tensors(), "triton")
        counts.append(compiled())
    assert len(set(counts)) == 1
