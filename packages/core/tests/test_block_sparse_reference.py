"""The torch backend: by hand, against official numbers, its derivatives, and the contract of the public function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vitreous_core.curves import hilbert_order, inverse_order
from vitreous_core.errors import BackendUnsupported
from vitreous_core.ops.block_sparse_attention import (
    RelativeBias1d,
    RelativeBias2d,
    block_sparse_attention,
    choose_backend,
    packed_attention,
)
from vitreous_core.ops.block_sparse_attention.dropout import keep_mask, philox_words
from vitreous_core.patterns import (
    Neighborhood1d,
    Neighborhood2d,
    Slide1d,
    Slide2d,
    Window1d,
    Window2d,
    from_mask,
)
from vitreous_core.testing.attention import Problem
from vitreous_core.testing.budget import relative_error

SHARED = Path(__file__).parents[4] / "shared" / "golden" / "ops_12x20.npz"
PAIRS = {
    "hwa": lambda n: (Window1d(n), hilbert_order(12, 20)),
    "hswa": lambda n: (Window1d(n, n // 2), hilbert_order(12, 20)),
    "hsa": lambda n: (Slide1d(n), hilbert_order(12, 20)),
    "hna": lambda n: (Neighborhood1d(n), hilbert_order(12, 20)),
    "wsa": lambda n: (Window2d(n), None),
    "sa": lambda n: (Slide2d(n), None),
    "na": lambda n: (Neighborhood2d(n), None),
}


def attend(query, layout, **options):
    return block_sparse_attention(query, query, query, layout, **{"backend": "torch"} | options)


def test_by_hand():
    # Two tokens per window, unit vectors: scores 1 for itself and 0 for the other.
    query = torch.eye(2, dtype=torch.float64).repeat(2, 1)[None, None]
    out = attend(query, Window1d(2).layout(2, 2), scale=1.0)
    own = np.e / (np.e + 1)
    expected = torch.tensor([[own, 1 - own], [1 - own, own]], dtype=torch.float64).repeat(2, 1)
    torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=1e-15)


def test_official_numbers():
    if not SHARED.is_file():
        pytest.skip("ops_12x20.npz lies in the shared folder beside the repository, which is not here")
    golden = np.load(SHARED)
    rng = np.random.default_rng(int(golden["seed"]))
    height, width = 12, 20
    drawn = [rng.standard_normal((1, height, width, 2, 16)).astype(np.float32) for _ in range(4)]
    table = (0.5 * rng.standard_normal(((2 * height - 1) * (2 * width - 1), 2))).astype(np.float32)
    assert len(golden["names"]) > 10
    for name in golden["names"].tolist():
        operation, size, *bias = name.split("_")
        pattern, order = PAIRS[operation](int(size))
        layout = pattern.layout(height, width, order, query_block=16, key_block=32)
        assert round(layout.density * 240**2) == int(golden[f"{name}.pairs"])
        gather = np.arange(240) if order is None else order
        q, k, v, g = (
            torch.from_numpy(t).flatten(1, 2)[:, gather].transpose(1, 2).double().requires_grad_() for t in drawn
        )
        leaf = torch.from_numpy(table).double().requires_grad_()
        out = block_sparse_attention(
            q, k, v, layout, bias=RelativeBias2d(leaf, height, width, order) if bias else None, backend="torch"
        )
        out.backward(g.detach())
        back = inverse_order(gather.astype(np.int32))
        # The file is fp32: its rounding is 6e-8 of entries up to about 4, sums of the table up to about 40.
        for key, value in (("o", out), ("dq", q.grad), ("dk", k.grad), ("dv", v.grad)):
            got = value.detach().transpose(1, 2)[:, back].reshape(1, height, width, 2, 16)
            torch.testing.assert_close(got, torch.from_numpy(golden[f"{name}.{key}"]).double(), rtol=1e-6, atol=1e-6)
        if bias:
            expected = torch.from_numpy(golden[f"{name}.dtable"]).double()
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("bias", ["none", "cells", "distance", "dense"])
def test_gradients_are_derivatives(bias):
    problem = Problem(Neighborhood2d(3), 3, 4, hilbert_order(3, 4), 1, 2, 1, 3, torch.float64, bias, dropout_p=0.2)
    layout, tensors = problem.layout(), problem.tensors()
    names = [name for name in ("query", "key", "value", "bias") if name in tensors]

    def function(*leaves):
        made = dict(zip(names, leaves, strict=True))
        return block_sparse_attention(
            made["query"], made["key"], made["value"], layout, bias=problem.bias_of(made.get("bias")),
            dropout_p=0.2, dropout_seed=3, backend="torch",
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, [tensors[name].double().requires_grad_() for name in names])


def test_a_row_that_sees_nothing_is_zero_and_gives_no_gradient():
    layout = from_mask(lambda q, k: (q != 3) & (k != 5), 12).layout(3, 4)
    q, k, v = (torch.randn(1, 1, 12, 8, requires_grad=True) for _ in range(3))
    out = block_sparse_attention(q, k, v, layout, backend="torch")
    out.square().sum().backward()
    assert not out[0, 0, 3].any()
    assert not q.grad[0, 0, 3].any()
    assert not k.grad[0, 0, 5].any()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_a_dilated_bias_counts_steps():
    pattern, (height, width), order = Neighborhood2d((3, 4), (2, 3)), (7, 11), hilbert_order(7, 11)
    table = torch.randn(5 * 7, 2, dtype=torch.float64)
    bias = RelativeBias2d(table, height, width, order, extent=(3, 4), dilation=(2, 3))
    assert bias.problems(pattern.layout(height, width, order)) == []
    visible = pattern.dense(height, width, order)
    for query, key in zip(*np.nonzero(visible), strict=True):
        (yq, xq), (yk, xk) = divmod(int(order[query]), width), divmod(int(order[key]), width)
        assert (yq - yk) % 2 == 0
        assert (xq - xk) % 3 == 0
        entry = ((yq - yk) // 2 + 2) * 7 + (xq - xk) // 3 + 3
        assert torch.equal(bias.dense()[:, query, key], table[entry])


def test_flex_agrees_and_its_bias_too():
    for bias, pattern in (("none", Neighborhood2d(5)), ("cells", Neighborhood2d(5)), ("steps", Slide2d(3, (2, 3)))):
        problem = Problem(pattern, 9, 14, hilbert_order(9, 14), bias=bias, groups=1)
        layout, tensors = problem.layout(32), problem.tensors()
        q, k, v = (tensors[name] for name in ("query", "key", "value"))
        made = [
            block_sparse_attention(q, k, v, layout, bias=problem.bias_of(tensors.get("bias")), backend=backend)
            for backend in ("flex", "torch")
        ]
        # Measured 1e-7 (fp32 rounding).
        assert relative_error(made[0], made[1]) < 1e-6


def test_philox_gives_the_published_word():
    # Random123's known answer for philox4x32-10 with counter and key zero.
    zero = torch.tensor(0)
    assert int(philox_words(zero, zero, zero, zero)) == 0x6627E8D5


def test_dropout_keeps_its_share_and_depends_on_the_seed_alone():
    keep = keep_mask(torch.tensor(5), 0.3, 2, 3, 64)
    # Standard deviation of the share of 24576 draws: 0.003.
    assert abs(float(keep.float().mean()) - 0.7) < 0.015
    assert torch.equal(keep, keep_mask(torch.tensor(5), 0.3, 2, 3, 64))
    assert not torch.equal(keep, keep_mask(torch.tensor(6), 0.3, 2, 3, 64))
    query = torch.randn(1, 2, 64, 8)
    layout = Window1d(16).layout(8, 8)
    torch.manual_seed(0)
    first = attend(query, layout, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(first, attend(query, layout, dropout_p=0.5))
    assert not torch.equal(first, attend(query, layout, dropout_p=0.5))
    seeded = attend(query, layout, dropout_p=0.5, dropout_seed=torch.tensor(9))
    assert torch.equal(seeded, attend(query, layout, dropout_p=0.5, dropout_seed=9))


def test_autocast_decides_the_dtype():
    query, layout = torch.randn(1, 1, 16, 8), Window1d(4).layout(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(query, layout).dtype == torch.bfloat16
        mixed = block_sparse_attention(query.bfloat16(), query, query.bfloat16(), layout, backend="torch")
        assert mixed.dtype == torch.bfloat16
        assert attend(query.double(), layout).dtype == torch.float64


def test_empty_batch():
    query = torch.randn(0, 2, 16, 8, requires_grad=True)
    out = attend(query, Window1d(4).layout(4, 4))
    assert out.shape == (0, 2, 16, 8)


@pytest.mark.parametrize("backend", ["torch", "flex"])
def test_packed_is_the_same_attention(backend):
    problem = Problem(Neighborhood2d(3), 5, 7, hilbert_order(5, 7), 2, 3, 3, 8, torch.float32, "cells")
    layout, tensors = problem.layout(), problem.tensors()
    apart = problem.run(tensors, layout, "torch")
    if backend == "torch":
        packed = problem.run_packed(tensors, layout, "torch")
        assert packed.keys() == apart.keys()
    else:
        qkv = torch.cat([tensors[name].transpose(1, 2).flatten(2) for name in ("query", "key", "value")], 2)
        bias = problem.bias_of(tensors["bias"])
        out = packed_attention(qkv, layout, num_heads=3, bias=bias, backend="flex")
        packed = {"out": out.unflatten(2, (3, 8)).transpose(1, 2)}
    for name, result in packed.items():
        # Measured 1e-7 (fp32 rounding).
        assert relative_error(result, apart[name]) < 1e-6


def test_packed_keeps_dropout_autocast_and_empty_batches():
    layout, qkv = Window1d(8).layout(4, 4), torch.randn(2, 16, 48)
    query, key, value = qkv.view(2, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    dropout = {"dropout_p": 0.5, "dropout_seed": 3}
    out = packed_attention(qkv, layout, num_heads=2, backend="torch", **dropout)
    apart = block_sparse_attention(query, key, value, layout, backend="torch", **dropout)
    assert torch.equal(out, apart.transpose(1, 2).flatten(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_attention(qkv, layout, num_heads=2, backend="torch").dtype == torch.bfloat16
    assert packed_attention(qkv[:0], layout, num_heads=2, backend="torch").shape == (0, 16, 16)


LAYOUT = Window1d(4).layout(4, 4)
Q = torch.randn(1, 2, 16, 8)
QKV = torch.randn(1, 16, 48)


def packed(qkv=QKV, layout=LAYOUT, num_heads=2, backend="triton", **settings):
    return packed_attention(qkv, layout, num_heads=num_heads, backend=backend, **settings)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: packed(backend="auto"), ValueError, "backend must be one of"),
        (lambda: packed([QKV]), TypeError, "qkv must be a tensor; got list"),
        (lambda: packed(QKV[0]), ValueError, r"qkv must have shape \[B, L, 3 \* C\]"),
        (lambda: packed(QKV.long()), TypeError, "qkv must be floating point"),
        (lambda: packed(num_heads=5), ValueError, r"3 \* num_heads = 15 times the head dimension; got 48"),
        (lambda: packed(num_heads=0), ValueError, "num_heads"),
        (lambda: packed(num_heads=2.0), TypeError, "num_heads must be an integer"),
        (lambda: packed(QKV[..., :0]), ValueError, "got 0"),
        (lambda: packed(layout=Window1d(4).layout(4, 5)), ValueError, "layout must be of the 16 tokens"),
        (lambda: packed(layout=None), TypeError, "layout must be a BlockLayout"),
        (lambda: packed(dropout_p=1.0), ValueError, "dropout_p must lie"),
        (lambda: packed(bias=torch.zeros(3, 16, 16)), ValueError, "bias must have shape"),
        (lambda: packed(bias=torch.zeros(2, 16, 16, device="meta")), ValueError, "bias must be on the device"),
        (lambda: packed(QKV.double()), BackendUnsupported, "float64"),
        (lambda: packed(num_heads=4), BackendUnsupported, "head_dim must be a multiple of 8"),
    ],
)
def test_bad_packed_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: attend(Q, LAYOUT, backend="cuda"), ValueError, "backend must be one of"),
        (lambda: attend(Q[0], LAYOUT), ValueError, r"query must have shape \[B, H, L, D\]"),
        (lambda: attend(Q.long(), LAYOUT), TypeError, "query must be floating point"),
        (lambda: block_sparse_attention(Q, Q.half(), Q, LAYOUT, backend="torch"), TypeError, "key must have the dtype"),
        (lambda: block_sparse_attention(Q, Q[:, :, :8], Q, LAYOUT, backend="torch"), ValueError, "one shape"),
        (
            lambda: block_sparse_attention(Q, *[torch.randn(1, 3, 16, 8)] * 2, LAYOUT, backend="torch"),
            ValueError,
            "must divide the 2 heads",
        ),
        (lambda: attend(Q, Window1d(4).layout(4, 5)), ValueError, "layout must be of the 16 tokens"),
        (lambda: attend(Q, None), TypeError, "layout must be a BlockLayout"),
        (lambda: attend(Q, LAYOUT, dropout_p=1.0), ValueError, "dropout_p must lie"),
        (lambda: attend(Q, LAYOUT, dropout_p=0.5, dropout_seed=1.5), TypeError, "dropout_seed must be"),
        (lambda: attend(Q, LAYOUT, dropout_p=0.5, dropout_seed=torch.zeros(2)), ValueError, "dropout_seed must be"),
        (lambda: attend(Q, LAYOUT, bias=torch.zeros(2, 8, 8)), ValueError, "bias must have shape"),
        (lambda: attend(Q, LAYOUT, bias=RelativeBias1d(torch.zeros(2, 5))), ValueError, "7|2 \\* 4"),
        (lambda: attend(Q, LAYOUT, bias=RelativeBias1d(torch.zeros(3, 7))), ValueError, "one entry per head"),
        (lambda: attend(Q, LAYOUT, bias=RelativeBias2d(torch.zeros(81, 2), 5, 5)), ValueError, "4 x 4 grid"),
        (lambda: RelativeBias2d(torch.zeros(48, 2), 4, 4), ValueError, "49"),
        (lambda: RelativeBias2d(torch.zeros(49, 2), 4, 4, dilation=0), ValueError, "dilation must be at least 1"),
        (
            lambda: attend(
                Q, Neighborhood2d(2, 3).layout(4, 4), bias=RelativeBias2d(torch.zeros(49, 2), 4, 4, dilation=2)
            ),
            ValueError,
            r"must divide the pattern's dilation \(3, 3\)",
        ),
        (
            lambda: attend(
                Q,
                Neighborhood2d(2, 2).layout(4, 4),
                bias=RelativeBias2d(torch.zeros(1, 2), 4, 4, extent=(1, 1), dilation=2),
            ),
            ValueError,
            "must exceed the layout's largest visible offset",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_named_backend_gives_every_reason_and_never_falls_back():
    with pytest.raises(BackendUnsupported) as flex:
        attend(Q.double().requires_grad_(), LAYOUT, backend="flex", dropout_p=0.1)
    assert len(flex.value.reasons) == 3
    with pytest.raises(BackendUnsupported) as triton:
        attend(torch.randn(1, 1, 16, 12, dtype=torch.float64), LAYOUT, backend="triton")
    assert any("head_dim" in reason for reason in triton.value.reasons)
    assert any("float64" in reason for reason in triton.value.reasons)
    assert choose_backend(Q, LAYOUT) == "torch"
