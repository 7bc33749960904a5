"""What backbones check alike."""

from __future__ import annotations

import pytest

from vitreous_core.backbone import stage_indices


@pytest.mark.parametrize(("given", "expected"), [(-1, (3,)), (0, (0,)), ([2, 0], (0, 2)), ((-1, 3, 1), (1, 3))])
def test_stage_indices(given: object, expected: tuple[int, ...]) -> None:
    assert stage_indices(given, 4) == expected


@pytest.mark.parametrize(
    ("given", "error"),
    [(4, ValueError), ((0, -5), ValueError), ((), TypeError), ("last", TypeError), ([1.0], TypeError)],
)
def test_bad_stage_indices(given: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="out_indices must"):
        stage_indices(given, 4)
