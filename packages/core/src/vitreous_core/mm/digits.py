"""The small data set of real images: the 8x8 digit scans that ship inside scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

_SPLITS = ("train", "val")
_VAL_SHARE = 0.2
_FULL_SCALE = 16  # the scans count ink in 4x4 blocks of a 32x32 bitmap, so 0 to 16


@DATASETS.register_module()
class DigitsDataset(BaseDataset):
    """1,797 hand-written digits (Alpaydin and Kaynak, UCI 1998) of 8x8 pixels, grey in three channels.

    The split is stratified by class with a fixed seed: 1,437 images to train on, 360 held back.
    Pipelines start from `img` (uint8 `[8, 8, 3]`, ink is white) and need no loading step.

    Args:
        split: `"train"` or `"val"`.
        pipeline: MMPretrain transforms.
        metainfo: overrides of `METAINFO`.
        indices: use only the first so many images, or those at the given positions.
        test_mode: as in MMEngine's `BaseDataset`; it does not choose the split.
    """

    METAINFO = {  # noqa: RUF012 (MMEngine's convention)
        "classes": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    }

    def __init__(
        self,
        split: str,
        pipeline: Sequence = (),
        metainfo: dict | None = None,
        indices: int | Sequence[int] | None = None,
        test_mode: bool = False,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {_SPLITS}; got {split!r}")
        self.split = split
        super().__init__(ann_file="", metainfo=metainfo, indices=indices, pipeline=pipeline, test_mode=test_mode)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Images and labels of the split, in the order of the original file."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, val = train_test_split(
            np.arange(len(digits.target)), test_size=_VAL_SHARE, random_state=0, stratify=digits.target
        )
        chosen = np.sort(train if self.split == "train" else val)
        scans = np.rint(digits.images * (255 / _FULL_SCALE)).astype(np.uint8)
        return [{"img": np.repeat(scans[i, :, :, None], 3, axis=2), "gt_label": int(digits.target[i])} for i in chosen]
