"""Trained convolutions against fp64, output and gradients, on a GPU and in the interpreter; and in their layers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitreous_core.bench.attention import BOTH
from vitreous_core.errors import BackendUnsupported
from vitreous_core.testing.budget import TF32Products, assert_within_budget, relative_error
from vitreous_efficientvit import EfficientViTMSRA
from vitreous_efficientvit.attention import ConvBN
from vitreous_efficientvit.bench_convolutions import convolution_cases
from vitreous_efficientvit.ops import Convolution, choose_convolution_backend, convolution
from vitreous_efficientvit.ops.convolution import resolve_convolution
from vitreous_efficientvit.ops.convolution_contract import pixel_of
from vitreous_efficientvit.ops.triton.configs import depthwise_walk, strided_tile

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

both_devices = pytest.mark.parametrize(
    "where", [pytest.param("interpreter", marks=pytest.mark.interpret), pytest.param("gpu", marks=pytest.mark.gpu)]
)


@dataclass(frozen=True)
class Problem:
    """One case. `memory`: "last" (channels-last), "slice" of wider channels, or "first".

    Args:
        outputs: of a dense convolution; 0 for a depthwise one.
        tf32: products in fp32 are TF32.
    """

    batch: int
    channels: int
    height: int
    width: int
    outputs: int = 0
    side: int = 3
    stride: int = 1
    dtype: torch.dtype = HALF
    memory: str = "last"
    tf32: bool = False

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

        shape = self.batch, self.channels, self.height, self.width
        if self.memory == "first":
            x = draw(*shape)
        else:
            wider = 2 * self.channels + 8 if self.memory == "slice" else self.channels
            x = draw(self.batch, self.height, self.width, wider).permute(0, 3, 1, 2)[:, wider - self.channels :]
        kernel = (self.outputs, self.channels) if self.outputs else (self.channels, 1)
        weight = draw(*kernel, self.side, self.side, dtype=SINGLE)
        if self.memory == "last":
            weight = weight.to(memory_format=torch.channels_last)
        out_size = [-(-size // self.stride) for size in shape[2:]]
        dout = draw(self.batch, *out_size, kernel[0]).permute(0, 3, 1, 2)
        return {"x": x, "weight": weight, "dout": dout.contiguous() if self.memory == "first" else dout}

    def run(self, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output and gradients, by name; `dtype` promotes all inputs first (fp64 for the truth)."""
        x, weight = (
            (tensors[name] if dtype is None else tensors[name].to(dtype)).detach().requires_grad_()
            for name in ("x", "weight")
        )
        out = convolution(x, weight, self.stride, backend=backend)
        dx, dweight = torch.autograd.grad(out, (x, weight), tensors["dout"].to(out.dtype))
        return {"out": out.detach(), "dx": dx, "dweight": dweight}


def check(problem: Problem) -> None:
    tensors = problem.tensors()
    truth = problem.run(tensors, "torch", torch.float64)
    with TF32Products() if problem.tf32 else nullcontext():
        baseline = problem.run(tensors, "torch")
    torch.set_float32_matmul_precision("high" if problem.tf32 else "highest")
    try:
        actual, again = problem.run(tensors, "triton"), problem.run(tensors, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {name: tensor.dtype for name, tensor in actual.items()} == {n: t.dtype for n, t in baseline.items()}
    # The weight's gradient is wider than what it is made from: its budget is that of the map's precision.
    assert_within_budget(actual, truth, baseline, precision=problem.dtype)
    assert all(torch.equal(again[name], actual[name]) for name in actual)
    for name in ("out", "dx"):
        assert actual[name].is_contiguous(memory_format=torch.channels_last)


# Odd sizes, maps of one cell, more cells than one tile holds, channels that fill no block.
SMALL = {
    "depthwise": Problem(3, 24, 7, 7),
    "depthwise-wide": Problem(2, 72, 5, 6),
    "depthwise-single": Problem(1, 20, 9, 4, dtype=SINGLE),
    "depthwise-slice": Problem(3, 16, 7, 7, memory="slice"),
    "depthwise-first": Problem(2, 16, 4, 5, memory="first"),
    "depthwise-one-cell": Problem(4, 16, 1, 1),
    "depthwise-one-column": Problem(2, 16, 5, 1, memory="slice"),
    "5x5": Problem(2, 16, 4, 4, side=5),
    "7x7": Problem(2, 16, 7, 7, side=7, memory="slice"),
    "7x7-single": Problem(1, 16, 3, 8, side=7, dtype=SINGLE),
    "halved": Problem(2, 40, 7, 7, stride=2),
    "halved-even": Problem(1, 16, 6, 4, stride=2, dtype=SINGLE),
    "image": Problem(2, 3, 18, 34, outputs=16, stride=2),
    "image-odd": Problem(2, 3, 9, 7, outputs=8, stride=2),
    "image-first": Problem(1, 3, 8, 6, outputs=24, stride=2, memory="first"),
    "image-single": Problem(1, 3, 10, 12, outputs=8, stride=2, dtype=SINGLE),
    "dense": Problem(2, 16, 12, 20, outputs=32, stride=2),
    "dense-odd": Problem(1, 8, 9, 11, outputs=16, stride=2),
    "dense-24": Problem(1, 24, 6, 6, outputs=48, stride=2),
    "dense-24-single": Problem(1, 24, 5, 6, outputs=48, stride=2, dtype=SINGLE),
    "dense-one-cell": Problem(3, 8, 1, 1, outputs=16, stride=2),
    "dense-single": Problem(1, 16, 7, 4, outputs=20, stride=2, dtype=SINGLE),
    "dense-slice": Problem(1, 8, 6, 8, outputs=16, stride=2, memory="slice"),
}

# Of M0 to M5 at 224 pixels what differs most, sizes that nothing divides, and precisions.
LARGE = {
    "m4-stem1": Problem(40, 3, 224, 224, outputs=16, stride=2, dtype=BRAIN),
    "m0-stem1": Problem(24, 3, 224, 224, outputs=8, stride=2),
    "m5-stem1": Problem(16, 3, 192, 160, outputs=24, stride=2, dtype=BRAIN),
    "m4-stem2": Problem(40, 16, 112, 112, outputs=32, stride=2, dtype=BRAIN),
    "m0-stem2": Problem(33, 8, 112, 112, outputs=16, stride=2),
    "m5-stem2": Problem(20, 24, 97, 113, outputs=48, stride=2, dtype=BRAIN),
    "m4-stem3": Problem(40, 32, 56, 56, outputs=64, stride=2, dtype=BRAIN),
    "m0-stem3": Problem(64, 16, 56, 56, outputs=32, stride=2),
    "image-odd": Problem(9, 3, 131, 77, outputs=16, stride=2),
    "stem2-single": Problem(6, 16, 56, 56, outputs=32, stride=2, dtype=SINGLE),
    "m4-stem3-single": Problem(4, 32, 56, 56, outputs=64, stride=2, dtype=SINGLE),
    "stem2-tf32": Problem(6, 16, 56, 56, outputs=32, stride=2, dtype=SINGLE, tf32=True),
    "m4-1": Problem(300, 128, 14, 14, dtype=BRAIN),
    "m4-2": Problem(512, 256, 7, 7),
    "m4-3": Problem(1024, 384, 4, 4, dtype=BRAIN),
    "m3-2-odd": Problem(77, 240, 7, 9),
    "m4-merging": Problem(130, 512, 14, 14, stride=2, dtype=BRAIN),
    "m4-merging-odd": Problem(130, 1024, 7, 7, stride=2),
    "query-7": Problem(2000, 16, 7, 7, side=7, dtype=BRAIN, memory="slice"),
    "query-5": Problem(900, 16, 4, 4, side=5, memory="slice"),
    "query-3": Problem(4096, 16, 7, 7, memory="slice"),
    "depthwise-single": Problem(50, 96, 13, 17, dtype=SINGLE),
    "depthwise-first": Problem(50, 96, 13, 17, memory="first"),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name: str) -> None:
    check(SMALL[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, *(f"large-{name}" for name in LARGE)])
def test_on_gpu(name: str) -> None:
    check(SMALL[name] if name in SMALL else LARGE[name.removeprefix("large-")])


@both_devices
def test_nothing_to_do(where: str) -> None:
    for problem in (Problem(0, 16, 4, 4), Problem(0, 16, 4, 4, side=5), Problem(0, 3, 8, 8, outputs=16, stride=2)):
        actual = problem.run(problem.tensors(), "triton")
        assert actual["out"].numel() == actual["dx"].numel() == 0
        assert not actual["dweight"].any()


@both_devices
@pytest.mark.parametrize("name", ["depthwise", "7x7", "image", "dense"])
def test_only_the_gradients_asked_for(where: str, name: str) -> None:
    problem = SMALL[name]
    tensors = problem.tensors()
    everything = problem.run(tensors, "triton")
    for asked in ("x", "weight"):
        leaves = {n: tensors[n].detach().requires_grad_(n == asked) for n in ("x", "weight")}
        out = convolution(leaves["x"], leaves["weight"], problem.stride, backend="triton")
        (gradient,) = torch.autograd.grad(out, leaves[asked], tensors["dout"])
        assert torch.equal(gradient, everything[f"d{asked}"])


@both_devices
@pytest.mark.parametrize(
    "name", ["depthwise", "depthwise-slice", "5x5", "halved", "image", "dense-odd", "dense-24-single"]
)
def test_registered(where: str, name: str) -> None:
    problem = SMALL[name]
    tensors = problem.tensors()
    x, weight = tensors["x"].detach(), tensors["weight"].detach()
    operators = torch.ops.vitreous_efficientvit
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            operators.convolution_backward.default, (tensors["dout"], x, weight, problem.stride, *needs),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
    arguments = x.requires_grad_(), weight.requires_grad_(), problem.stride
    torch.library.opcheck(operators.convolution.default, arguments)


@both_devices
def test_what_is_not_finite_stays_where_it_belongs(where: str) -> None:
    """A cell that is not finite reaches the outputs that see it, and of the weight's gradient what they share."""
    problem = Problem(1, 8, 6, 10, outputs=16, stride=2, dtype=SINGLE)
    tensors = problem.tensors()
    tensors["x"][0, 3, 5, 9] = float("inf")
    expected, actual = problem.run(tensors, "torch", torch.float64), problem.run(tensors, "triton")
    for name in ("out", "dweight"):
        assert torch.equal(actual[name].isfinite(), expected[name].isfinite())


@pytest.mark.gpu
def test_offsets_beyond_31_bits(large_memory: Callable[[int], None]) -> None:
    """Maps of more than 2^31 elements: their last image comes out as it does alone."""
    large_memory(24)
    for problem in (
        Problem(1, 64, 512, 512, stride=1), Problem(1, 16, 1024, 1024, outputs=32, stride=2),
        Problem(1, 3, 1024, 1024, outputs=16, stride=2),
    ):  # fmt: skip
        tensors = problem.tensors()
        images = 2**31 // tensors["x"].numel() + 2
        expected = problem.run(tensors, "triton")
        many = {"weight": tensors["weight"]}
        for name in ("x", "dout"):
            shape = (images, *tensors[name].shape[1:])
            many[name] = torch.zeros(shape, dtype=HALF, device=DEVICE).to(memory_format=torch.channels_last)
            many[name][-1:] = tensors[name]
        actual = problem.run(many, "triton")
        # cuDNN may take another way for so many, and zeros add nothing but another order of the sums.
        assert relative_error(actual["out"][-1:], expected["out"]) < 1e-3
        assert torch.equal(actual["dx"][-1:], expected["dx"])
        assert relative_error(actual["dweight"], expected["dweight"]) < 1e-3


@both_devices
def test_autocast(where: str) -> None:
    """Computed in the dtype of autocast, with the weight as it is."""
    problem = Problem(2, 24, 5, 7, dtype=SINGLE)
    tensors = problem.tensors()
    with torch.autocast(DEVICE, HALF):
        actual = problem.run(tensors, "triton")
    assert actual["out"].dtype == HALF
    assert actual["dx"].dtype == actual["dweight"].dtype == SINGLE
    rounded = {name: tensor if name == "weight" else tensor.half() for name, tensor in tensors.items()}
    expected = problem.run(rounded, "triton")
    assert all(torch.equal(actual[name].to(tensor.dtype), tensor) for name, tensor in expected.items())


def layer(backend: str) -> nn.Module:
    torch.manual_seed(0)
    stem = ConvBN(3, 8, 3, stride=2, padding=1, backend=backend)
    return nn.Sequential(stem, nn.ReLU(), ConvBN(8, 8, 5, padding=2, groups=8, backend=backend)).to(DEVICE)


def step(module: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    out = (module if run is None else run)(x)
    (out.double() * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum().backward()
    gradients = {f"d{name}": parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    return {"out": out.detach(), **gradients}


@both_devices
def test_a_step_of_layers(where: str) -> None:
    plain, fused = layer("torch"), layer("triton")
    exact = copy.deepcopy(plain).double()
    x = torch.randn(2, 3, 12, 14, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        truth, baseline, actual = step(exact, x.double()), step(plain, x), step(fused, x)
    assert_within_budget(actual, truth, baseline)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    again = step(fused, x, compiled)
    for name, tensor in actual.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_backend_reaches_every_convolution() -> None:
    network = EfficientViTMSRA("m0", backend="torch")
    layers = [module for module in network.modules() if isinstance(module, Convolution) and module.has_kernel]
    assert all(module.backend == "torch" for module in layers)
    # The stem, the queries, those in front of FFNs, those of the mergings.
    assert len(layers) == 4 + 24 + 16 + 2


def test_a_folded_bias_is_not_lost() -> None:
    """MMEngine's and other tools put a batch norm into the convolution before it by giving that a bias."""
    conv = Convolution(8, 8, 3, padding=1, groups=8, backend="triton")
    conv.bias = nn.Parameter(torch.ones(8))
    assert torch.equal(conv(torch.zeros(1, 8, 3, 3)), torch.ones(1, 8, 3, 3))


def test_gradcheck_of_the_plain_path() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    for weight, stride in ((torch.randn(3, 1, 5, 5), 1), (torch.randn(2, 3, 3, 3), 2)):
        weight = weight.double().requires_grad_()
        run = lambda x, weight, stride=stride: convolution(x, weight, stride, backend="auto")  # noqa: E731
        assert torch.autograd.gradcheck(run, (x, weight))


def test_pixels_of_maps() -> None:
    x = torch.zeros(2, 12, 5, 4)
    last = x.to(memory_format=torch.channels_last)
    assert (pixel_of(x), pixel_of(last), pixel_of(last[:, 4:8]), pixel_of(last[:, :, :3])) == (0, 12, 12, 0)
    assert pixel_of(last[..., :2]) == 0
    assert pixel_of(torch.zeros(2, 12, 1, 1)) == 12


@pytest.mark.parametrize("compiling", [False, True])
def test_auto_turns_images_where_all_is_compiled(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network does with images as PyTorch loads them: channels-last from the first convolution on, or not."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with FakeTensorMode():
        stem, second = torch.empty(16, 3, 3, 3, device="cuda"), torch.empty(32, 16, 3, 3, device="cuda")
        images = torch.empty(64, 3, 224, 224, device="cuda", dtype=BRAIN)
        out = convolution(images, stem, 2, backend="auto")
        assert out.is_contiguous(memory_format=torch.channels_last) == compiling
        taken = resolve_convolution("auto", out, tuple(second.shape), 2, 1)
        assert taken == ("triton" if compiling else "torch")
        last = images.to(memory_format=torch.channels_last)
        assert resolve_convolution("auto", last, tuple(stem.shape), 2, 1) == "triton"


def test_tiles_fit_their_memory() -> None:
    """Cells in powers of two, 16 for a product at least, and on GPUs with less shared memory no more of them."""
    for channels, outputs in ((3, 8), (3, 64), (8, 16), (16, 32), (16, 64), (32, 64)):
        for side in (1, 7, 112):
            for of_weight in (False, True):
                sizes = channels, outputs, side, side
                large, small = (strided_tile(HALF, sizes, of_weight, memory) for memory in (227 * 1024, 99 * 1024))
                cells = [tile.rows * tile.columns for tile in (large, small)]
                assert 16 <= cells[1] <= cells[0] <= 256
                assert all(number & (number - 1) == 0 for number in cells)
                assert small.stages <= large.stages == 2
    for cells, channels in ((1, 1), (10**9, 1024), (784, 16), (200704, 128)):
        walk = depthwise_walk(cells, channels, 1, 132)
        assert walk.rows * walk.columns == 512
        assert 1 <= walk.tiles <= 128


def test_auto_takes_what_wins() -> None:
    """The rows of convolutions of 1,024 images; queries are for `torch.compile`, too small where nothing compiles."""
    file = Path(__file__).parents[3] / "docs/results/bench/nvidia-h100-80gb-hbm3/2026-11-23-174dc40.jsonl"
    if not file.exists():
        pytest.skip(f"no rows at {file}: the choice is compared with nothing")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    times = {(row["case"], row["provider"]): row["latency_ms_p50"] for row in rows if row["mode"] == BOTH}
    for case in convolution_cases():
        problem = case.problem
        shape = problem.batch, problem.channels, problem.size, problem.size
        weight_shape = problem.outputs, problem.channels // problem.groups, problem.side, problem.side
        choice = choose_convolution_backend("cuda", BRAIN, shape, weight_shape, problem.stride, compiling=True)
        wins = times[case.name, "triton"] < times[case.name, "eager"]
        assert choice == ("triton" if wins else "torch"), case.name


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.zeros(2, 3, 4), torch.zeros(3, 1, 3, 3)), ValueError, "x must be"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(4, 1, 3, 3)), ValueError, "weight must be"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(3, 1, 3, 5)), ValueError, "weight must be"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(3, 1, 3, 3), 3), ValueError, "stride must be 1 or 2; got 3"),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.int32), torch.zeros(3, 1, 3, 3)), TypeError, "must be floating"),
    ],
)
def test_bad_arguments(arguments: tuple[Tensor, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        convolution(*arguments, backend="auto")


def test_no_kernel_is_said() -> None:
    x, weight = torch.zeros(1, 4, 4, 4), torch.zeros(4, 1, 9, 9)
    with pytest.raises(BackendUnsupported, match="side in"):
        convolution(x, weight, backend="triton")
    with pytest.raises(ValueError, match="backend must be"):
        convolution(x, weight, backend="cuda")
