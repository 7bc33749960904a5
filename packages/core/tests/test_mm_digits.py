"""The digits: real, split without leaks, the same on every machine."""

import hashlib

import numpy as np
import pytest
from mmpretrain.registry import DATASETS

from vitreous_core.mm import DigitsDataset


@pytest.fixture(scope="module")
def splits():
    return DigitsDataset("train"), DigitsDataset("val")


def _pixels(dataset):
    return [dataset[i]["img"].tobytes() for i in range(len(dataset))]


def test_split_is_complete_and_disjoint(splits):
    from sklearn.datasets import load_digits

    train, val = splits
    assert (len(train), len(val)) == (1437, 360)
    images = load_digits().images
    originals = {np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in images}
    kept = {np.ascontiguousarray(d[i]["img"][:, :, 0]).tobytes() for d in splits for i in range(len(d))}
    assert kept == originals
    assert not set(_pixels(train)) & set(_pixels(val))


def test_split_is_stratified(splits):
    train, val = splits
    shares = np.bincount(val.get_gt_labels()) / (np.bincount(train.get_gt_labels()) + np.bincount(val.get_gt_labels()))
    assert shares.shape == (10,)
    # 20 % of about 180 images per class, to the nearest image.
    np.testing.assert_allclose(shares, 0.2, atol=1 / 174)


def test_split_is_fixed(splits):
    digest = hashlib.sha256(b"".join(_pixels(splits[1]))).hexdigest()
    assert digest.startswith("d9b12cc0a51b1337"), "the held-back images changed: published accuracies no longer compare"


def test_sample_and_metainfo(splits):
    sample = splits[0][0]
    assert sample["img"].shape == (8, 8, 3)
    assert sample["img"].dtype == np.uint8
    assert max(splits[0][i]["img"].max() for i in range(20)) == 255  # full ink
    assert splits[0].metainfo["classes"][3] == "three"
    assert len(splits[0].CLASSES) == 10


def test_builds_from_a_config_with_a_pipeline():
    dataset = DATASETS.build(
        {"type": "DigitsDataset", "split": "val", "indices": 7,
         "pipeline": [{"type": "Resize", "scale": 32}, {"type": "PackInputs"}]}
    )  # fmt: skip
    assert len(dataset) == 7
    assert dataset[0]["inputs"].shape == (3, 32, 32)
    assert dataset[0]["data_samples"].gt_label.item() in range(10)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split must be one of .*train.*; got 'test'"):
        DigitsDataset("test")
