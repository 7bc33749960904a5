"""Sums, norms and stochastic depth of the blocks, against PyTorch's own layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vitreous_core.ops.sum_norm import add_branch
from vitreous_flash_window.layers import (
    DropPath,
    apply_drop,
    apply_norm,
    drop_rate,
    split_drop,
    sum_and_norm,
)
from vitreous_flash_window.model import SwinStage, SwinStageV2


def norm_and_inputs(draw, dtype, channels=24):
    norm = nn.LayerNorm(channels, dtype=dtype)
    nn.init.normal_(norm.weight, 1.0, 0.3), nn.init.normal_(norm.bias, 0.0, 0.3)
    return norm, draw(3, 10, channels, dtype=dtype, grad=True), draw(3, 10, channels, dtype=dtype, grad=True)


class TestSums:
    def test_a_sum_and_its_norm(self, draw):
        norm, shortcut, branch = norm_and_inputs(draw, torch.float64)
        factor = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
        total, normed = sum_and_norm(norm, shortcut, branch, factor)
        expected = shortcut + branch * factor.view(3, 1, 1)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(normed, norm(expected))
        torch.testing.assert_close(add_branch(shortcut, branch, factor), expected)
        assert sum_and_norm(norm, shortcut)[0] is shortcut

    def test_dtypes_are_what_autocast_makes_them(self, draw):
        norm, shortcut, branch = norm_and_inputs(draw, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            total, normed = sum_and_norm(norm, shortcut, branch.bfloat16())
            assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
            torch.testing.assert_close(normed, norm(shortcut + branch.bfloat16()).bfloat16())
            # A low stream of tokens grows wide where a wide branch joins it.
            total, _ = sum_and_norm(norm, shortcut.bfloat16(), branch)
            assert total.dtype == torch.float32
            assert apply_norm(norm, shortcut).dtype == torch.float32

    def test_who_listens_to_a_norm_hears_it(self, draw):
        norm, shortcut, branch = norm_and_inputs(draw, torch.float32)
        heard = []
        norm.register_forward_hook(lambda module, inputs, output: heard.append(output))
        _, normed = sum_and_norm(norm, shortcut, branch)
        assert heard[0] is normed

    @pytest.mark.parametrize("norm", [nn.Identity(), nn.RMSNorm(24), nn.LayerNorm(24, elementwise_affine=False)])
    def test_other_norms_are_called(self, draw, norm):
        shortcut, branch = draw(2, 5, 24, dtype=torch.float32), draw(2, 5, 24, dtype=torch.float32)
        torch.testing.assert_close(sum_and_norm(norm, shortcut, branch)[1], norm(shortcut + branch))
        torch.testing.assert_close(apply_norm(norm, shortcut), norm(shortcut))


class TestStochasticDepth:
    def test_factor_is_what_the_module_multiplies_by(self, draw):
        drop, branch = DropPath(0.5), draw(64, 3, 4)
        torch.manual_seed(0)
        factor = drop.factor(branch)
        torch.manual_seed(0)
        torch.testing.assert_close(drop(branch), branch * factor.view(-1, 1, 1))
        assert set(factor.tolist()) == {0.0, 2.0}
        assert drop.eval().factor(branch) is None

    def test_splitting(self, draw):
        branch = draw(8, 3, 4)
        kept, factor = split_drop(DropPath(0.5), branch)
        assert kept is branch
        assert factor.shape == (8,)
        assert split_drop(DropPath(0.5), branch, factor)[1] is factor
        dropped, factor = split_drop(nn.Dropout(1.0), branch)
        assert factor is None
        assert not dropped.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_factor_that_is_drawn_already_takes_the_place_of_the_module(self, draw, dtype):
        branch, factor = draw(8, 3, 4).to(dtype), torch.tensor([0.0, 2.0] * 4)
        assert apply_drop(DropPath(0.5).eval(), branch) is branch
        dropped = apply_drop(DropPath(0.5), branch, factor)
        assert torch.equal(dropped, (branch * factor.view(-1, 1, 1)).to(dtype))

    def test_rates(self):
        assert drop_rate(DropPath(0.5)) == 0.5
        assert drop_rate(DropPath(0.5).eval()) == 0.0
        assert drop_rate(nn.Dropout(0.5)) == 0.0

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("build", [SwinStage, SwinStageV2])
    def test_a_stage_draws_once_and_leaves_out_images_whole(self, draw, build, compiled):
        torch.manual_seed(0)
        stage = build(8, 2, 1, window_size=4, drop_paths=0.5, block_cfgs={"norm_cfg": None}).train()
        for block in stage.blocks:  # then what is not left out is not zero
            nn.init.ones_(block.ffn.layers[1].bias)
        x, drawn = draw(1024, 16, 8, dtype=torch.float32), []
        if compiled:
            stage.compile(fullgraph=True, backend=lambda graph, _: (drawn.extend(draws(graph)), graph.forward)[1])
            out = stage(x, (4, 4))
        else:
            with Draws(drawn):
                out = stage(x, (4, 4))
        assert len(drawn) == 1
        unchanged = (out == x).flatten(1).all(1).double().mean().item()
        # All four branches: five standard deviations of so many draws at 1 in 16.
        assert abs(unchanged - 1 / 16) < 5 * (1 / 16 * 15 / 16 / len(x)) ** 0.5


def is_draw(name):
    return "bernoulli" in name or "rand" in name


def draws(graph):
    return [node for node in graph.graph.nodes if is_draw(str(node.target))]


class Draws(TorchDispatchMode):
    """Notes the random operations that run."""

    def __init__(self, drawn):
        super().__init__()
        self.drawn = drawn

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_draw(func.__name__):
            self.drawn.append(func)
        return func(*args, **(kwargs or {}))


class TestStageOfBlocks:
    """A stage leaves the last sum of a block to the next block's norm, and calls a block that somebody listens to."""

    @pytest.fixture
    def stage(self, fill):
        return fill(SwinStage(8, 3, 1, window_size=4, drop_paths=0.5).double()).train()

    def run(self, stage, x):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        out = stage(leaf, (4, 4))
        return out, *torch.autograd.grad(out.square().sum(), [leaf, *stage.parameters()])

    def test_it_is_the_blocks_one_after_another(self, stage, draw):
        x = draw(4, 16, 8)
        joined, heard = self.run(stage, x), []
        for block in stage.blocks[:2]:
            block.register_forward_hook(lambda module, inputs, output: heard.append(output))
        for ours, theirs in zip(self.run(stage, x), joined, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert [type(output) for output in heard] == [torch.Tensor] * 2
        # What is heard is what follows from it.
        stage.eval()
        heard.clear()
        out = stage(x, (4, 4))
        torch.testing.assert_close(stage.blocks[2](heard[1], (4, 4)), out)

    def test_a_block_that_is_wrapped_is_called(self, stage, draw):
        class Wrapped(nn.Module):
            def __init__(self, block):
                super().__init__()
                self.block, self.calls = block, 0

            def __getattr__(self, name):
                return super().__getattr__(name) if name == "block" else getattr(self.block, name)

            def forward(self, *arguments):
                self.calls += 1
                return self.block(*arguments)

        x = draw(4, 16, 8)
        expected = self.run(stage, x)
        stage.blocks[1] = Wrapped(stage.blocks[1])
        for ours, theirs in zip(self.run(stage, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert stage.blocks[1].calls == 1


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["fp32-stream", "bf16-stream"])
    @pytest.mark.parametrize("channels", [96, 384, 1536])
    def test_sums_and_norms_under_autocast(self, stream, channels):
        torch.manual_seed(0)
        norm = nn.LayerNorm(channels).cuda()
        nn.init.normal_(norm.weight, 1.0, 0.3), nn.init.normal_(norm.bias, 0.0, 0.3)
        shortcut = torch.randn(4, 50, channels, device="cuda", dtype=stream, requires_grad=True)
        branch = torch.randn(4, 50, channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        factor = torch.tensor([0.0, 1.25, 1.25, 1.25], device="cuda")
        linear = torch.randn(8, channels, device="cuda") / channels**0.5
        leaves = (shortcut, branch, norm.weight, norm.bias)

        def run(wide):
            s, b, w, z = (leaf.double() if wide else leaf for leaf in leaves)
            if wide:
                total = s + b * factor.double().view(-1, 1, 1)
                out = F.linear(F.layer_norm(total, (channels,), w, z), linear.double())
            else:
                with torch.autocast("cuda", torch.bfloat16):
                    total, normed = sum_and_norm(norm, s, b, factor)
                    out = F.linear(normed, linear)
                    total = add_branch(total, b, factor)
                return total, torch.autograd.grad(total.double().sum() + out.double().square().sum(), leaves)
            total = total + b * factor.double().view(-1, 1, 1)
            return total, torch.autograd.grad(total.sum() + out.square().sum(), leaves)

        (total, grads), (true_total, true_grads) = run(False), run(True)
        assert total.dtype == stream
        # Roundings of bfloat16: of the norm, of the product and of what comes back.
        limit = 3 * torch.finfo(torch.bfloat16).eps
        for got, truth in zip((total, *grads), (true_total, *true_grads), strict=True):
            assert (got.double() - truth.double()).norm() <= limit * truth.double().norm()

    def test_a_plain_norm_keeps_autocasts_dtype(self):
        norm, x = nn.LayerNorm(96).cuda(), torch.randn(2, 7, 96, device="cuda", dtype=torch.float16)
        with torch.autocast("cuda", torch.float16):
            assert apply_norm(norm, x).dtype == norm(x).dtype == torch.float32
            assert apply_norm(norm, x, to_linear=True).dtype == torch.float16
            torch.testing.assert_close(apply_norm(norm, x), norm(x), rtol=1e-5, atol=1e-5)
        transposed = torch.randn(2, 96, 7, device="cuda").transpose(1, 2)
        torch.testing.assert_close(apply_norm(norm, transposed), norm(transposed), rtol=1e-5, atol=1e-5)
