"""Fashion-MNIST from Debian's files, or from files like them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from mmpretrain.registry import DATASETS

from vitreous_core.errors import UserError
from vitreous_core.mm.fashion_mnist import DEBIAN_FOLDER, GzippedFashionMNIST

NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures to train on and three to test on, with values that say which is which."""
    for split, count in (("train", 5), ("t10k", 3)):
        images = np.arange(count, dtype=np.uint8)[:, None, None] + np.zeros((28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) + (0 if split == "train" else 5)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return tmp_path


def test_the_split_decides_alone(folder: Path) -> None:
    for split, labels in (("train", [0, 1, 2, 3, 4]), ("test", [5, 6, 7])):
        for test_mode in (False, True):
            dataset = GzippedFashionMNIST(split, str(folder), test_mode=test_mode)
            assert list(dataset.get_gt_labels()) == labels
            assert dataset.test_mode is test_mode
    with pytest.raises(ValueError, match="split must be 'train' or 'test'; got 'val'"):
        GzippedFashionMNIST("val", str(folder))


def test_samples_and_pipelines(folder: Path) -> None:
    sample = GzippedFashionMNIST("train", str(folder))[3]
    assert sample["img"].shape == (28, 28, 3)
    assert sample["img"].dtype == np.uint8
    assert (sample["img"] == 3).all()
    pipeline = [{"type": "Resize", "scale": 32}, {"type": "PackInputs"}]
    dataset = DATASETS.build(
        {"type": "GzippedFashionMNIST", "split": "test", "data_root": str(folder), "indices": 2, "pipeline": pipeline}
    )
    assert len(dataset) == 2
    assert tuple(dataset[0]["inputs"].shape) == (3, 32, 32)
    assert dataset.metainfo["classes"][9] == "Ankle boot"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_one_line_with_a_way_out(folder: Path, name: str) -> None:
    (folder / f"{name}-ubyte.gz").unlink()
    with pytest.raises(UserError, match=rf"no .*{name}-ubyte.gz.*apt install dataset-fashion-mnist") as caught:
        GzippedFashionMNIST("train" if "train" in name else "test", str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    not Path(DEBIAN_FOLDER).is_dir(), reason=f"Fashion-MNIST is not in {DEBIAN_FOLDER}: install dataset-fashion-mnist"
)
def test_debians_files_are_the_published_ones() -> None:
    train, test = GzippedFashionMNIST("train"), GzippedFashionMNIST("test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert set(np.bincount(train.get_gt_labels())) == {6_000}
    assert set(np.bincount(test.get_gt_labels())) == {1_000}
    mean = np.mean([test[i]["img"].mean() for i in range(0, 10_000, 10)])
    assert mean == pytest.approx(72.9, abs=1.5)  # the mean that the configs subtract
