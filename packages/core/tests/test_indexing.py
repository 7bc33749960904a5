"""Cached tables are right, survive inference mode and serve compiled graphs."""

import numpy as np
import pytest
import torch

from vitreous_core import curves, indexing
from vitreous_core.ops.block_sparse_attention import block_sparse_attention
from vitreous_core.patterns import Neighborhood2d, Window1d


@pytest.fixture(autouse=True)
def _empty_caches():
    indexing.clear_caches()
    yield
    indexing.clear_caches()


@pytest.mark.parametrize(
    ("kind", "tile"),
    [("row_major", None), ("hilbert", None), ("morton", None), ("window", 3), ("tile", (2, 5))],
)
def test_there_and_back(kind, tile):
    order, position = indexing.order_tables(kind, 6, 7, "cpu", tile)
    image = torch.arange(42)
    assert torch.equal(image[order][position], image)
    assert torch.equal(order, torch.from_numpy(indexing.build_order(kind, 6, 7, tile)).long())


@pytest.mark.parametrize(("kind", "tile"), [("spiral", None), ("window", None), ("hilbert", 4), ("tile", 3)])
def test_unknown_orders_are_refused(kind, tile):
    with pytest.raises(ValueError, match="order must be one of"):
        indexing.build_order(kind, 4, 4, tile)


def test_tables_are_built_once_and_can_be_dropped():
    first = indexing.order_tables("hilbert", 8, 8, "cpu")
    assert indexing.order_tables("hilbert", 8, 8, "cpu")[0] is first[0]
    indexing.clear_caches()
    assert indexing.order_tables("hilbert", 8, 8, "cpu")[0] is not first[0]


def test_table_first_needed_in_inference_mode_serves_training():
    with torch.inference_mode():
        order, _ = indexing.order_tables("hilbert", 4, 4, "cpu")
    weight = torch.randn(16, requires_grad=True)
    weight[order].square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_layout_follows_the_order():
    layout = indexing.layout_for(Neighborhood2d(3), "hilbert", 6, 5, "cpu", query_block=16, key_block=16)
    dense = Neighborhood2d(3).dense(6, 5, curves.hilbert_order(6, 5))
    assert np.array_equal(layout.to_dense().numpy(), dense)


@pytest.mark.compile
def test_compiles_full_graph_as_the_first_call():
    window = Window1d(5)

    def attend(tokens):
        order, position = indexing.order_tables("hilbert", 4, 6, tokens.device)
        layout = indexing.layout_for(window, "hilbert", 4, 6, tokens.device)
        tokens = tokens[:, :, order]
        return block_sparse_attention(tokens, tokens, tokens, layout, backend="torch")[:, :, position]

    tokens = torch.randn(1, 2, 24, 8)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), attend(tokens), rtol=0, atol=0)
