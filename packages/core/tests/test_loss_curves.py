"""Loss curves of several seeds and backends: what is read, and what they are judged by."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vitreous_core.loss_curves import curves_figure, curves_table, read_loss_curves


def record(folder: Path, config: str, run: str, backend: str | None, seed: int, losses: list[float]) -> None:
    name = run if backend is None else f"{run}-{backend}-seed{seed}"
    (folder / config / name).mkdir(parents=True)
    facts = {"backend": backend, "seed": seed, "device": "gpu", "best": 90.0 + seed, "commit": "0123456789"}
    settings = (
        f"lr = 1\nmodel = dict(\n    backend={backend!r},\n)\nrandomness = dict(seed={seed})\nwork_dir = {name!r}\n"
    )
    (folder / config / name / "config.py").write_text(settings)
    (folder / config / name / "run.json").write_text(json.dumps(facts))
    rows = [{"split": "train", "step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    rows.append({"split": "val", "step": 1, "accuracy/top1": 90.0})
    (folder / config / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, losses in enumerate(([2.0, 1.0], [2.2, 1.2], [2.4, 1.4])):
        record(tmp_path, "net_digits", "2026-01-02-abc", "torch", seed, losses)
        record(tmp_path, "net_digits", "2026-01-02-abc", "triton", seed, [loss + 0.05 for loss in losses])
    record(tmp_path, "net_digits", "2026-01-02-abc", "triton", 7, [0.0, 0.0])  # torch has no such seed
    for backend in ("torch", "triton"):  # an older set
        for seed in range(2):
            record(tmp_path, "net_digits", "2026-01-01-abc", backend, seed, [9.0, 9.0])
    record(tmp_path, "net_digits", "2026-01-03-abc", None, 0, [1.0, 1.0])  # an ordinary run
    record(tmp_path, "alone_digits", "2026-01-02-abc", "torch", 0, [1.0, 1.0])
    return tmp_path


def test_runs_of_other_configs_are_not_compared(folder: Path) -> None:
    config = folder / "net_digits" / "2026-01-02-abc-triton-seed1" / "config.py"
    config.write_text(config.read_text().replace("lr = 1", "lr = 2"))
    with pytest.raises(ValueError, match="differ in backend and seed alone"):
        read_loss_curves(folder)


def test_the_newest_run_of_each_seed_is_read(folder: Path) -> None:
    (entry,) = read_loss_curves(folder)
    assert entry.config == "net_digits"
    assert list(entry.steps) == [10, 20]
    assert {backend: losses.shape for backend, losses in entry.losses.items()} == {"torch": (3, 2), "triton": (3, 2)}
    assert entry.scores["triton"] == [90.0, 91.0, 92.0]
    assert read_loss_curves(folder / "nowhere") == []


def test_difference_is_judged_by_the_seeds_noise(folder: Path) -> None:
    (entry,) = read_loss_curves(folder)
    assert entry.noise() == pytest.approx(0.2)
    assert entry.difference("triton") == pytest.approx(0.05)
    assert entry.expected() == pytest.approx(0.2 * math.sqrt(2 / 3) * math.sqrt(2 / math.pi))
    # Two sets of three runs that differ by their seeds alone are as far apart as `expected` says.
    draws = np.random.default_rng(0).normal(0, 0.2, (2, 20000, 3)).mean(2)
    assert np.abs(draws[0] - draws[1]).mean() == pytest.approx(entry.expected(), rel=0.02)


def test_table_and_figure(folder: Path) -> None:
    curves = read_loss_curves(folder)
    table = curves_table(curves)
    judged = "| net_digits | triton | 3 | 20 | 0.0500 | 0.1303 | 0.2000 | 91.00 ± 1.00 | 91.00 ± 1.00 | gpu |"
    assert f"{judged} 0123456 | 0123456 |" in table
    top, bottom = curves_figure(curves).axes
    assert [line.get_label() for line in top.get_lines()] == ["torch", "triton"]
    np.testing.assert_allclose(bottom.get_lines()[0].get_ydata(), [0.05, 0.05])
