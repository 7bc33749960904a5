"""`shifted_window_attention`: the dense truth on the whole image, gradients, V1 and V2, padding, bad input."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from vitreous_core.errors import BackendUnsupported
from vitreous_flash_window import shifted_window_attention


def dense(qkv, table, num_heads, window, shift, pad=None, scale=None, logit_scale=None):
    """Softmax over all pixels of the padded image, pair by pair, without rolling or cutting anything."""
    batch, height, width, packed = qkv.shape
    padded_height, padded_width = (math.ceil(n / window) * window for n in (height, width))
    image = torch.zeros(batch, padded_height, padded_width, packed, dtype=qkv.dtype)
    if pad is not None:
        image = image + pad
    image[:, :height, :width] = qkv
    query, key, value = image.view(batch, padded_height * padded_width, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    if logit_scale is None:
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    else:
        factor = logit_scale.clamp(max=math.log(100.0)).exp().view(num_heads, 1, 1)
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT * factor
    pixels = list(itertools.product(range(padded_height), range(padded_width)))
    bias = torch.full((num_heads, len(pixels), len(pixels)), -math.inf, dtype=qkv.dtype)
    for (i, q), (j, k) in itertools.product(enumerate(pixels), enumerate(pixels)):
        # Windows start `shift` pixels in, and the last one of an axis continues at its beginning.
        places = [
            [(n - shift) % size for n, size in zip(p, (padded_height, padded_width), strict=True)] for p in (q, k)
        ]
        if any(a // window != b // window for a, b in zip(*places, strict=True)):
            continue
        dy, dx = (a - b + window - 1 for a, b in zip(*places, strict=True))
        wrapped = [[n < shift for n in p] for p in (q, k)]
        entry = 0.0 if table is None else table[dy * (2 * window - 1) + dx]
        bias[:, i, j] = entry - 100.0 * (wrapped[0] != wrapped[1])
    out = torch.softmax(scores + bias, -1) @ value
    out = out.transpose(1, 2).reshape(batch, padded_height, padded_width, -1)
    return out[:, :height, :width]


# More than one window row and column, non-square maps (which Microsoft's CUDA extension gets wrong), a map no window
# divides, one window per axis, a map smaller than the window.
SHAPES = [(8, 8), (4, 12), (5, 7), (4, 9), (2, 3)]


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_equals_dense_attention_on_the_image(draw, version, shape, shift):
    qkv, table, pad = draw(2, *shape, 3 * 8), draw(49, 2), draw(3 * 8)
    extra = {"scale": 0.9} if version == "v1" else {"logit_scale": torch.tensor([2.0, 6.0], dtype=torch.float64)}
    out = shifted_window_attention(
        qkv, table, num_heads=2, window_size=4, shift_size=shift, pad_qkv=pad, backend="torch", **extra
    )
    torch.testing.assert_close(out, dense(qkv, table, 2, 4, shift, pad, **extra), rtol=0, atol=1e-13)
    assert out.is_contiguous()


def test_defaults_no_bias_zero_padding(draw):
    qkv = draw(1, 5, 3, 3 * 6)
    out = shifted_window_attention(qkv, num_heads=3, window_size=2, shift_size=1, backend="auto")
    torch.testing.assert_close(out, dense(qkv, None, 3, 2, 1), rtol=0, atol=1e-14)


def test_the_region_mask_is_there(draw):
    # The official kernel takes no mask (defect 1): a pixel at one edge must not see the other edge.
    qkv = draw(1, 8, 8, 3 * 4)
    options = {"num_heads": 1, "window_size": 4, "shift_size": 2, "backend": "torch"}
    out = shifted_window_attention(qkv, **options)
    changed = qkv.clone()
    changed[0, 7] += 5.0
    different = (shifted_window_attention(changed, **options) - out).abs().amax(-1)[0]
    assert (different[6:] > 1e-3).all()
    assert torch.equal(different[:6], torch.zeros(6, 8, dtype=torch.float64))


def test_penalty_is_minus_100_and_not_infinite():
    # V2 scores span 200: a key across the wrap that points the same way beats visible ones that point away.
    qkv = torch.zeros(1, 4, 4, 3, 2, dtype=torch.float64)
    qkv[..., 0, 0] = 1.0
    qkv[..., 1, 0] = -1.0
    qkv[0, 0, 0, 1, 0] = 1.0  # the only key along the queries
    qkv[0, 0, 0, 2, 1] = 1.0  # and the only one with a value
    out = shifted_window_attention(
        qkv.flatten(3), num_heads=1, window_size=2, shift_size=1, logit_scale=torch.full((1,), 9.0).double(),
        backend="torch",
    )  # fmt: skip
    # Pixel (0, 3) shares a window with (0, 0), (3, 0), (3, 3). Scores: own side -100, (0, 0) across 100 - 100 = 0.
    assert out[0, 0, 3, 1] > 1 - 1e-12
    # In a window with no penalty the value of (0, 0) is not seen at all.
    assert not out[0, 1:3, 1:3].any()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gradients_of_every_input(draw, version):
    qkv, table = draw(1, 3, 5, 3 * 4, grad=True), draw(9, 2, grad=True)
    pad = draw(3 * 4, grad=True)
    logit_scale = torch.tensor([[[1.5]], [[4.0]]], dtype=torch.float64, requires_grad=True)
    inputs = (qkv, table, pad) if version == "v1" else (qkv, table, pad, logit_scale)

    def run(qkv, table, pad, logit_scale=None):
        return shifted_window_attention(
            qkv, table, num_heads=2, window_size=2, shift_size=1, pad_qkv=pad, logit_scale=logit_scale, backend="torch"
        )

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_logit_scale_gradient_stops_above_the_clamp_and_passes_on_it(draw):
    qkv = draw(1, 4, 4, 3 * 12)
    limit = math.log(100.0)
    logit_scale = torch.tensor([limit - 1.0, limit, limit + 1.0], dtype=torch.float64, requires_grad=True)
    out = shifted_window_attention(qkv, num_heads=3, window_size=2, logit_scale=logit_scale, backend="torch")
    (grad,) = torch.autograd.grad(out.square().sum(), logit_scale)
    assert grad[0] != 0
    assert grad[1] != 0
    assert grad[2] == 0


def test_zero_vectors_normalise_to_zero(draw):
    # The keys of padded V2 tokens are zero: their score is the bias, and the gradient is finite.
    qkv = draw(1, 3, 3, 3 * 2, grad=True)
    pad = torch.zeros(3 * 2, dtype=torch.float64, requires_grad=True)
    out = shifted_window_attention(
        qkv, num_heads=1, window_size=2, pad_qkv=pad, logit_scale=torch.ones(1).double(), backend="torch"
    )
    expected = dense(qkv.detach(), None, 1, 2, 0, pad.detach(), logit_scale=torch.ones(1).double())
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=1e-14)
    assert torch.autograd.grad(out.sum(), qkv)[0].isfinite().all()


def test_padding_sees_and_is_seen(draw):
    # Padded tokens are keys, so the gradient of the padding token is theirs; without padding it is zero.
    pad = draw(3 * 4, grad=True)
    for width, needed in ((4, False), (5, True)):
        qkv = draw(1, 4, width, 12, grad=True)
        out = shifted_window_attention(qkv, num_heads=2, window_size=4, pad_qkv=pad, backend="torch")
        (grad,) = torch.autograd.grad(out.square().sum(), pad, allow_unused=True)
        if needed:
            assert not grad[:4].any(), "cropped queries send nothing"
            assert grad[4:].all(), "keys and values do"
        else:
            assert grad is None


def test_table_gradient_is_summed_in_float32_and_deterministic(draw):
    qkv = draw(16, 28, 28, 3 * 32, dtype=torch.bfloat16)
    table = draw(169, 1, dtype=torch.bfloat16, grad=True)
    cotangent = draw(16, 28, 28, 32, dtype=torch.bfloat16)

    def grad(qkv, table, cotangent):
        out = shifted_window_attention(qkv, table, num_heads=1, window_size=7, shift_size=3, backend="torch")
        return torch.autograd.grad(out, table, cotangent)[0]

    first, *others = (grad(qkv, table, cotangent) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)
    expected = grad(qkv.double(), table.detach().double().requires_grad_(), cotangent.double())
    # Twice the emulated 3.0e-3; summing 256 windows in bfloat16 gives 1.9e-2.
    assert (first.double() - expected).norm() / expected.norm() < 6e-3


def test_any_strides_and_changing_sizes(draw):
    for batch, height, width in ((3, 6, 9), (1, 9, 6), (0, 4, 4)):
        qkv = draw(height, 12, batch, width).permute(2, 0, 3, 1)
        options = {"num_heads": 2, "window_size": 3, "shift_size": 1, "backend": "torch"}
        out = shifted_window_attention(qkv, draw(25, 2), **options)
        assert out.shape == (batch, height, width, 4)
        torch.testing.assert_close(
            shifted_window_attention(qkv, **options), shifted_window_attention(qkv.contiguous(), **options)
        )


def test_autocast_takes_float32_parameters(draw):
    qkv, table, pad = (draw(*s, dtype=torch.float32) for s in ((1, 5, 5, 24), (9, 2), (24,)))
    options = {
        "num_heads": 2,
        "window_size": 2,
        "shift_size": 1,
        "pad_qkv": pad,
        "logit_scale": torch.ones(2),
        "backend": "torch",
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shifted_window_attention(qkv, table, **options)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, shifted_window_attention(qkv.bfloat16(), table, **options))


def test_only_one_score_array_is_kept_for_the_backward_pass(draw):
    qkv, table = draw(2, 14, 14, 3 * 8, dtype=torch.float32, grad=True), draw(169, 2, dtype=torch.float32, grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault((t.data_ptr(), t.numel()), t), lambda t: t):
        shifted_window_attention(
            qkv, table, num_heads=2, window_size=7, shift_size=3, logit_scale=torch.ones(2, requires_grad=True),
            backend="torch",
        )  # fmt: skip
    assert sum(t.numel() >= 8 * 2 * 49 * 49 for t in kept.values()) == 1


def test_whole_graph_compiles(draw):
    qkv, table, pad = draw(2, 5, 7, 24), draw(49, 2), draw(24)
    options = {"num_heads": 2, "window_size": 4, "shift_size": 2, "pad_qkv": pad, "backend": "auto"}
    compiled = torch.compile(shifted_window_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(qkv, table, **options), shifted_window_attention(qkv, table, **options))


def test_triton_refuses(draw):
    with pytest.raises(BackendUnsupported, match="CUDA"):
        shifted_window_attention(draw(1, 4, 4, 12), num_heads=1, window_size=2, backend="triton")


QKV = torch.zeros(1, 4, 4, 3 * 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": QKV[0]}, ValueError, r"qkv must be \[B, height, width, 3 \* C\]"),
        ({"qkv": QKV[..., :-1]}, ValueError, "qkv must be"),
        ({"qkv": QKV.int()}, TypeError, "qkv must be a floating tensor"),
        ({"num_heads": 3}, ValueError, "num_heads must divide the 8 channels; got 3"),
        ({"num_heads": 0}, ValueError, "num_heads must be positive"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int"),
        ({"window_size": (2, 2)}, TypeError, "window_size must be an int; got tuple"),
        ({"shift_size": 2}, ValueError, r"shift_size must be in \[0, window_size = 2\); got 2"),
        ({"shift_size": -1}, ValueError, "shift_size must be in"),
        ({"shift_size": None}, TypeError, "shift_size must be an int"),
        ({"bias_table": torch.zeros(25, 2)}, ValueError, r"bias_table must have shape \(9, 2\); got \(25, 2\)"),
        ({"bias_table": torch.zeros(9, 2).double()}, TypeError, "bias_table must be torch.float32"),
        ({"pad_qkv": torch.zeros(8)}, ValueError, r"pad_qkv must have shape \(24,\)"),
        ({"pad_qkv": torch.zeros(24, device="meta")}, ValueError, "pad_qkv must be on the device of qkv"),
        ({"logit_scale": torch.zeros(2, 1)}, ValueError, r"logit_scale must have shape \(2, 1, 1\)"),
        ({"logit_scale": torch.zeros(2), "scale": 1.0}, ValueError, "exclude each other"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
        ({"backend": "best"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        shifted_window_attention(**{"qkv": QKV, "num_heads": 2, "window_size": 2, "backend": "torch", **changes})
