"""Comparisons of recorded runs: which are read, the interval of a change, and what confirms a claim."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vitreous_core.ablations import Comparison, read_comparison, student_quantile


def record(folder: Path, config: str, run: str, seed: int, best: float, device: str = "gpu", epochs: int = 1) -> None:
    (folder / config / f"{run}-seed{seed}").mkdir(parents=True)
    settings = (
        f"model = dict(name={config!r})\nrandomness = dict(seed={seed})\nwork_dir = {run!r}\n"
        f"train_cfg = dict(max_epochs={epochs})\n"
    )
    (folder / config / f"{run}-seed{seed}" / "config.py").write_text(settings)
    facts = {"seed": seed, "best": best, "device": device, "epochs": epochs}
    (folder / config / f"{run}-seed{seed}" / "run.json").write_text(json.dumps(facts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(3):
        record(tmp_path, "whole", "2026-01-02-abc", seed, 90.0 + seed)
        record(tmp_path, "part", "2026-01-02-abc", seed, 80.0 + seed)
    record(tmp_path, "part", "2026-01-02-abc", 7, 0.0)  # the other has no such seed
    record(tmp_path, "whole", "2026-01-01-abc", 0, 10.0)  # older
    for name in ("whole", "part"):
        for seed in range(2):
            record(tmp_path, name, "2025-12-31-abc", seed, 50.0, device="cpu")  # another machine, older
    record(tmp_path, "alone", "2026-01-02-abc", 0, 95.0)
    return tmp_path


def test_the_newest_runs_of_shared_seeds_are_compared(folder: Path) -> None:
    comparison = read_comparison(folder, "whole", "part")
    assert comparison is not None
    assert comparison.scores == ([90.0, 91.0, 92.0], [80.0, 81.0, 82.0])
    assert comparison.facts["device"] == "gpu"
    assert comparison.seeds == 3
    assert comparison.change == pytest.approx(-10.0)
    # Four degrees of freedom, one point of deviation in each: 2.7764 sqrt(2 / 3).
    assert comparison.margin == pytest.approx(2.26697, abs=1e-4)
    assert comparison.spread == "91.00 ± 1.00 → 81.00 ± 1.00"
    assert comparison.interval == "−10.00 ± 2.27"


def test_one_seed_or_none_is_no_comparison(folder: Path) -> None:
    assert read_comparison(folder, "whole", "alone") is None
    assert read_comparison(folder, "whole", "never run") is None


def test_runs_of_another_length_are_refused(folder: Path) -> None:
    for seed in range(3):
        record(folder, "longer", "2026-01-02-abc", seed, 95.0, epochs=2)
    with pytest.raises(ValueError, match=r"differ in model and seed alone; .*longer.* differs in train_cfg"):
        read_comparison(folder, "whole", "longer")


def test_what_confirms_a_claim() -> None:
    def of(change: float, noise: float) -> Comparison:
        scores = [50.0 - noise, 50.0, 50.0 + noise]
        return Comparison(("a", "b"), (scores, [score + change for score in scores]), {})

    # The interval is 2.27 times the noise to each side.
    assert of(-1.0, 0.4).confirms("lower")
    assert not of(-1.0, 0.5).confirms("lower")
    assert not of(1.0, 0.1).confirms("lower")
    assert of(1.0, 0.4).confirms("higher")
    assert not of(-1.0, 0.1).confirms("higher")
    assert of(-0.2, 0.3).confirms(1.0)
    assert not of(-0.5, 0.3).confirms(1.0)
    assert not of(0.0, 0.5).confirms(1.0), "noise alone does not show that nothing changes"
    with pytest.raises(ValueError, match="'lower', 'higher' or a number of points; got 'equal'"):
        of(0.0, 1.0).confirms("equal")


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.30265), (4, 2.77645), (8, 2.30600), (18, 2.10092)])
def test_student_quantiles(freedom: int, quantile: float) -> None:
    """Against the printed tables."""
    assert student_quantile(freedom) == pytest.approx(quantile, abs=1e-4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    pairs = [Comparison(("a", "b"), (list(a), list(b)), {}) for a, b in random.normal(size=(4000, 2, 3))]
    covered = sum(abs(comparison.change) <= comparison.margin for comparison in pairs)
    assert covered / 4000 == pytest.approx(0.95, abs=0.015)  # four standard deviations of the count
