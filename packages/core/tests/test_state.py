"""State-dict checks name what is wrong."""

import pytest
import torch

from vitreous_core.errors import StateMismatch
from vitreous_core.state import check_state, unwrap_state

A, B = torch.zeros(2), torch.zeros(3)


@pytest.mark.parametrize(
    "checkpoint", [{"a": A}, {"model": {"a": A}, "epoch": 3}, {"state_dict": {"a": A}, "meta": {}}]
)
def test_unwrap_finds_the_state(checkpoint):
    assert list(unwrap_state(checkpoint)) == ["a"]


@pytest.mark.parametrize("checkpoint", [{}, {"epoch": 3}, {"model": {"a": A, "b": "text"}}, {"state_dict": {}}])
def test_unwrap_refuses_what_holds_no_state(checkpoint):
    with pytest.raises(StateMismatch, match="mapping from names to tensors"):
        unwrap_state(checkpoint)


def test_equal_states_pass():
    check_state({"a": A, "b": B}, {"b": B, "a": A})


def test_every_kind_of_difference_is_named():
    with pytest.raises(StateMismatch) as error:
        check_state({"a": A, "b": B, "c": B}, {"a": B, "b": B, "d": A})
    assert str(error.value) == (
        "state dict does not fit the model; missing: c; surplus: d; wrong shape: a (needs (2,), got (3,))"
    )


def test_long_lists_are_cut():
    with pytest.raises(StateMismatch, match=r"missing: k0, .*, k7 and 12 more$"):
        check_state({f"k{i}": A for i in range(20)}, {})
