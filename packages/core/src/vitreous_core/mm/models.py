"""Models built from configs: their size, their cost, and what they say about images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmpretrain import ImageClassificationInferencer, get_model
from torch import Tensor, nn

from ..errors import UserError
from ..zoo import models
from .checkpoints import load_weights
from .train import quiet_log

_ATTENTION = "scaled_dot_product_attention"
_COUNTED = ("conv", "linear", "addmm", "matmul", "mm", "bmm", "einsum", _ATTENTION)


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image.

    Args:
        labels: class indices, best first.
        names: their names, empty when the config knows none.
        scores: their probabilities.
    """

    labels: tuple[int, ...]
    names: tuple[str, ...]
    scores: tuple[float, ...]


def build_model(config: Config, checkpoint: str | Path | None = None, device: Any = None) -> nn.Module:
    """The config's classifier in evaluation mode, with a checkpoint's weights if one is given.

    Raises:
        CheckpointError, vitreous_core.errors.StateMismatch: when the checkpoint is broken or does not fit.
    """
    model = get_model(config, device=device)
    if checkpoint is not None:
        meta = load_weights(model, checkpoint)
        if meta.get("dataset_meta"):
            model._dataset_meta = meta["dataset_meta"]
    return model


def named_model(name: str, **changes: Any) -> nn.Module:
    """The untrained classifier of that name, MMPretrain's own or a packaged one, on the default device.

    Args:
        name: what `mmpretrain.get_model` takes; the package of a paper need not be imported before.
        changes: of its config, e.g. `backbone=dict(drop_path_rate=0.0)`.
    """
    for card in models():
        if card.name == name:
            card.paper.module("mm")
    quiet_log()
    return get_model(name, **changes)


class Logits(nn.Module):
    """A classifier as a plain map from normalized images `[B, 3, height, width]` to logits `[B, classes]`.

    Args:
        classifier: an MMPretrain classifier with a head, whose parts it shares.

    Raises:
        UserError: when it has no head.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        if getattr(classifier, "head", None) is None:
            raise UserError("the model has no head, so it has no logits")
        self.backbone: Any = classifier.backbone
        self.neck: Any = getattr(classifier, "neck", None)
        self.head: Any = classifier.head

    def forward(self, images: Tensor) -> Tensor:
        feats = self.backbone(images)
        logits: Tensor = self.head(feats if self.neck is None else self.neck(feats))
        return logits


def preprocessing(model: nn.Module) -> str:
    """How pixels become the model's input, in words: order of the channels, mean and standard deviation."""
    step: Any = model.data_preprocessor
    text = f"{'RGB' if getattr(step, 'to_rgb', False) else 'BGR'}, 0 to 255"
    if not getattr(step, "_enable_normalize", False):
        return text
    mean, std = (", ".join(f"{value:g}" for value in values.flatten().tolist()) for values in (step.mean, step.std))
    return f"{text}, minus ({mean}), divided by ({std})"


def input_size(config: Config) -> tuple[int, int]:
    """(height, width) of the images that the config's test pipeline makes.

    Raises:
        UserError: when no transform of the pipeline fixes a size.
    """
    for transform in reversed(config.test_dataloader.dataset.pipeline):
        match transform.type:
            case "CenterCrop" | "RandomCrop":
                size = transform.crop_size
            case "Resize":
                size = transform.scale
            case _:
                continue
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    raise UserError("the config's test pipeline must end in a CenterCrop or a Resize of fixed size")


def complexity(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Parameters and multiply-accumulate operations for one image of `(height, width)`."""
    device = next(model.parameters()).device
    analyzer = FlopAnalyzer(model, (torch.zeros(1, 3, *size, device=device),))
    analyzer.set_op_handle(f"aten::{_ATTENTION}", _count_attention)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # As the papers' tables do: convolutions, linear layers and attention, but not norms and the like.
    macs = sum(analyzer.by_operator()[kind] for kind in _COUNTED)
    return sum(parameter.numel() for parameter in model.parameters()), int(macs)


def predict(model: nn.Module, images: Sequence[str | Path], top: int = 5) -> list[Prediction]:
    """The best classes of image files, through the test pipeline of the model's config.

    Args:
        model: from `build_model`.
        images: paths of image files.
        top: how many classes to report; fewer when the model has fewer.

    Raises:
        UserError: when a file is missing or is no image.
    """
    inferencer = ImageClassificationInferencer(model)
    arrays = [_read_image(Path(image).expanduser()) for image in images]
    names = inferencer.classes
    predictions = []
    for result in inferencer(arrays):
        scores = torch.from_numpy(result["pred_scores"])
        best, labels = (values.tolist() for values in scores.topk(min(top, len(scores))))
        known = tuple(names[label] for label in labels) if names is not None else ()
        predictions.append(Prediction(tuple(labels), known, tuple(best)))
    return predictions


def _count_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of both products of one traced call, which MMEngine does not count itself."""
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _read_image(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"no image is at {path}")
    image = mmcv.imread(str(path))
    if image is None:
        raise UserError(f"{path} is no image that can be read (PNG, JPEG and other formats of OpenCV can)")
    return image
