"""Fashion-MNIST from the compressed files that Debian's package dataset-fashion-mnist installs."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmpretrain.datasets import FashionMNIST
from mmpretrain.registry import DATASETS

from ..errors import UserError

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"


@DATASETS.register_module()
class GzippedFashionMNIST(FashionMNIST):
    """60,000 and 10,000 grey pictures of clothes, 28x28 (Xiao et al., arXiv 1708.07747), in three channels.

    MMPretrain's `FashionMNIST`, but it reads the four `.gz` files where they lie, never downloads, and goes by `split`
    alone (MMPretrain's goes by `test_mode` alone). Pipelines start from `img`, uint8 `[28, 28, 3]`.

    Args:
        split: `"train"` or `"test"`.
        data_root: folder of the four files.
        pipeline: MMPretrain transforms.
        indices: use only the first so many images, or those at the given positions.
        test_mode: as in MMEngine's `BaseDataset`; it does not choose the split.
        metainfo: overrides of `METAINFO`.

    Raises:
        UserError: when a file is missing.
    """

    def __init__(
        self,
        split: str,
        data_root: str = DEBIAN_FOLDER,
        pipeline: Sequence = (),
        indices: int | Sequence[int] | None = None,
        test_mode: bool = False,
        metainfo: dict | None = None,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test'; got {split!r}")
        # MMPretrain warns of a training split in test mode, which is not ambiguous here.
        super().__init__(
            data_root=data_root, split=split, pipeline=pipeline, indices=indices, test_mode=split == "test",
            metainfo=metainfo, download=False,
        )  # fmt: skip
        self.test_mode = test_mode

    def load_data_list(self) -> list[dict[str, Any]]:
        """Images and labels of the split, in the order of the files."""
        files = self.train_list if self.split == "train" else self.test_list
        paths = [Path(self.data_prefix["root"]) / name for name, _ in files]
        for path in paths:
            if not path.is_file():
                raise UserError(
                    f"Fashion-MNIST is not here: no {path}. Debian and Ubuntu install it with `apt install "
                    "dataset-fashion-mnist`; for another folder with its four .gz files give --cfg-options "
                    "train_dataloader.dataset.data_root=FOLDER, and the same for val_dataloader and test_dataloader"
                )
        images, labels = (_read_idx(path) for path in paths)
        return [{"img": image, "gt_label": int(label)} for image, label in zip(images, labels, strict=True)]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """One sample, its grey repeated in three channels only now: a third of the memory."""
        info: dict[str, Any] = super().get_data_info(idx)
        info["img"] = np.repeat(info["img"][:, :, None], 3, axis=2)
        return info


def _read_idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file (LeCun's format): a type, a number of dimensions, their sizes, the values."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", count=dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)
