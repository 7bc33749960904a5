"""A block as one node of autograd's graph: bitwise what its modules give, and not taken where they do more.

In Triton's interpreter on small blocks, and on a GPU.
"""

from functools import partial

import pytest
import torch
from torch import nn

from vitreous_core.ops.sum_norm import sum_norm
from vitreous_flash_window import block_node
from vitreous_flash_window.block_node import _Block
from vitreous_flash_window.model import SwinBlock, SwinStage

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def freeze(stage, *names):
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(not name.endswith(names))


def results(monkeypatch, as_node, size, dtype, channels=16, **options):
    """Output, and gradients of tokens and parameters, of a stage of two blocks."""
    frozen, side, batch = options.pop("frozen", ()), options.pop("window_size", 4), options.pop("batch", 2)
    torch.manual_seed(0)
    stage = SwinStage(channels, 2, channels // 16, window_size=side, drop_paths=0.3, backend="triton", **options)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    if frozen:
        freeze(stage, *frozen)
    stage.train().to(DEVICE)
    leaf = torch.randn(batch, size[0] * size[1], channels).to(DEVICE).requires_grad_()
    nodes = []
    with monkeypatch.context() as patch:
        # The modules' norms run on the kernels in the interpreter too.
        patch.setattr("vitreous_flash_window.layers.sum_norm", partial(sum_norm, backend="triton"))
        run = block_node.run if as_node else lambda *_: None
        patch.setattr(block_node, "run", lambda *arguments: nodes.append(run(*arguments)) or nodes[-1])
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            torch.manual_seed(3)
            out = stage(leaf, size)
        out.float().square().mean(1).sum().backward()  # the sum over tokens would overflow float16
    assert len(nodes) >= 2
    assert all((node is not None) == as_node for node in nodes)
    return {"out": out, "tokens": leaf.grad} | {name: p.grad for name, p in stage.named_parameters()}


@pytest.mark.interpret
def test_an_empty_batch(monkeypatch):
    ours = results(monkeypatch, True, (4, 6), torch.float16, batch=0)
    assert ours.pop("out").shape == ours.pop("tokens").shape == (0, 24, 16)
    assert all(gradient.shape and not gradient.any() for gradient in ours.values())


def assert_bitwise(monkeypatch, *arguments, **options):
    ours, theirs = (results(monkeypatch, as_node, *arguments, **options) for as_node in (True, False))
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            assert ours[name].dtype == expected.dtype, name
            assert expected.isfinite().all(), name
            assert torch.equal(ours[name], expected), name


CASES = {
    "whole-fp32": ((4, 8), torch.float32, {}),
    "padded-fp16": ((6, 9), torch.float16, {}),
    "frozen": (
        (4, 6),
        torch.float16,
        {"frozen": ("qkv.weight", "norm2.bias", "table", "layers.1.bias", "proj.weight")},
    ),
    "recomputed": ((4, 5), torch.float16, {"with_cp": True}),
}


@pytest.mark.interpret
@pytest.mark.parametrize("case", CASES)
def test_bitwise_what_the_modules_give(monkeypatch, case):
    size, dtype, options = CASES[case]
    assert_bitwise(monkeypatch, size, dtype, **options)


def listen(block):
    block.ffn.layers[1].register_forward_hook(lambda module, inputs, output: None)


def adapt(block):
    class Adapted(nn.Linear):
        pass

    block.attn.w_msa.qkv = Adapted(8, 24)


def share(block):
    block.ffn.layers[1].weight = type("Shard", (nn.Parameter,), {})(torch.randn(8, 32))


CHANGES = {
    "hook": listen,
    "adapter": adapt,
    "shard": share,
    "hook-on-attention": lambda block: block.attn.register_forward_hook(lambda module, inputs, output: None),
    "other-norm": lambda block: setattr(block, "norm1", nn.RMSNorm(8)),
    "dropout": lambda block: setattr(block.ffn.layers[0][2], "p", 0.1),
    "attention-dropout": lambda block: setattr(block.attn.w_msa.attn_drop, "p", 0.1),
    "activation": lambda block: block.ffn.layers[0].__setitem__(1, nn.ReLU()),
    "double": lambda block: block.double(),
    "no-bias": lambda block: setattr(block.attn.w_msa.qkv, "bias", None),
    "mixed-dtypes": lambda block: block.ffn.layers[1].half(),
    "torch-backend": lambda block: setattr(block.attn.w_msa, "backend", "torch"),
    "compiled-layer": lambda block: block.norm2.compile(backend="eager"),
}


class TestWhatItTakes:
    @pytest.fixture(autouse=True)
    def _pretend(self, monkeypatch):
        """Kernels could run, and what takes their place says so."""
        monkeypatch.setattr(
            block_node, "_run_on_kernels", lambda settings, x, branch, norms, window: window.backend != "torch"
        )
        monkeypatch.setattr(_Block, "apply", lambda *arguments: arguments)

    def taken(self, block, x=None, shape=(4, 4)):
        x = torch.zeros(2, 16, 8) if x is None else x
        return block_node.run(block, x, None, None, shape, None) is not None

    def block(self, **options):
        return SwinBlock(8, 1, window_size=4, drop_path=0.1, **options)

    def test_a_usual_block(self):
        assert self.taken(self.block())
        assert self.taken(self.block(attn_cfgs={"attn_drop": 0.1}, ffn_cfgs={"ffn_drop": 0.1}).eval())

    @pytest.mark.parametrize("change", CHANGES)
    def test_not_a_block_whose_modules_do_more(self, change):
        block = self.block()
        CHANGES[change](block)
        assert not self.taken(block)

    def test_not_other_tensors_or_modes(self):
        block = self.block()
        assert not self.taken(block, torch.zeros(2, 16, 8, dtype=torch.float64))
        assert not self.taken(block, torch.zeros(2, 15, 8))
        assert not self.taken(block, torch.zeros(2, 16, 9))
        with torch.no_grad():
            assert not self.taken(block)
        assert not self.taken(self.block(ffn_cfgs={"num_fcs": 3}))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((56, 56), {}),
        ((15, 17), {}),
        ((14, 14), {"with_cp": True}),
        ((14, 14), {"frozen": CASES["frozen"][2]["frozen"]}),
        ((24, 24), {"window_size": 12}),
    ],
    ids=["whole", "padded", "recomputed", "frozen", "large-windows"],
)
def test_bitwise_what_the_modules_give_on_a_gpu(monkeypatch, size, options, dtype):
    assert_bitwise(monkeypatch, size, dtype, channels=96, **{"window_size": 7, **options})
