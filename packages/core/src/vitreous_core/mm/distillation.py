"""Training a two-headed classifier against a frozen teacher, with the losses of DeiT.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention", section 4:
one head learns from the labels, a second one from the teacher, and evaluation averages the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint
from mmpretrain.apis import ModelHub, get_model
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

_CROSS_ENTROPY = {"type": "CrossEntropyLoss", "loss_weight": 1.0}


@dataclass(frozen=True)
class Distillation:
    """How the second head learns from the teacher.

    Args:
        mode: `"hard"` (the teacher's most likely class is a label) or `"soft"` (its distribution is one).
        alpha: weight of the teacher's term, in [0, 1]; the labels' term has `1 - alpha`.
        tau: temperature of the soft mode, positive.
    """

    mode: str = "hard"
    alpha: float = 0.5
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in ("hard", "soft"):
            raise ValueError(f"distillation mode must be 'hard' or 'soft'; got {self.mode!r}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"distillation alpha must lie in [0, 1]; got {self.alpha}")
        if not self.tau > 0.0:
            raise ValueError(f"distillation tau must be positive; got {self.tau}")

    @classmethod
    def parse(cls, setting: bool | Mapping[str, Any]) -> Distillation | None:
        """`False` is None (one head), `True` the defaults, a mapping the arguments of this class."""
        if isinstance(setting, bool):
            return cls() if setting else None
        if not isinstance(setting, Mapping):
            raise TypeError(f"distillation must be a bool or a dict of mode, alpha, tau; got {type(setting).__name__}")
        if surplus := setting.keys() - {"mode", "alpha", "tau"}:
            raise ValueError(f"distillation takes mode, alpha and tau; got also {sorted(surplus)}")
        return cls(**setting)

    def teacher_term(self, scores: Tensor, teacher_scores: Tensor) -> Tensor:
        """The teacher's term of the loss, without its weight.

        DeiT section 4, eq. 2 and 3, with the soft term reduced as DeiT's released code does: summed and
        divided by the number of *entries* (images x classes), so it is smaller than the equation's mean over
        images by the number of classes. So published alpha and tau mean here what they meant there.

        Args:
            scores: `[B, classes]`, logits of the second head.
            teacher_scores: `[B, classes]`, logits of the teacher.
        """
        if self.mode == "hard":
            return F.cross_entropy(scores, teacher_scores.argmax(dim=1))
        divergence = F.kl_div(
            F.log_softmax(scores / self.tau, dim=1),
            F.log_softmax(teacher_scores / self.tau, dim=1),
            reduction="sum",
            log_target=True,
        )
        return divergence * self.tau**2 / scores.numel()


class DistillationLossMixin:
    """Makes an MMPretrain head of a plain one with one or two classifiers. Goes first in the bases:

        class MMSwiftFormerHead(DistillationLossMixin, SwiftFormerHead, ClsHead): ...

    The plain head takes `distillation: bool` (two classifiers) among its own arguments, calls
    `super().__init__()` without any, and gives `scores(feats) -> tuple[Tensor, ...]`: the
    logits of each classifier, the one for labels first.

    The loss is `(1 - alpha) * base(first) + alpha * teacher_term(second)`, `base` being the head's `loss`
    module, so label smoothing and mixed labels apply to it alone. Two classifiers *without* teacher logits
    (fine-tuning a distilled checkpoint) train with the mean of their two base losses: evaluation averages
    them, so both must fit the labels.

    Args:
        distillation: `False`, `True` (hard, alpha 0.5) or `dict(mode="hard"|"soft", alpha=0.5, tau=1.0)`.
        loss, topk, cal_acc, init_cfg: as in MMPretrain's `ClsHead`. `cal_acc` reports the first classifier.
    """

    scores: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    _get_loss: Callable[..., dict[str, Tensor]]

    def __init__(
        self,
        *args: Any,
        distillation: bool | Mapping[str, Any] = False,
        loss: Mapping[str, Any] | nn.Module = _CROSS_ENTROPY,
        topk: int | tuple[int, ...] = (1,),
        cal_acc: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        settings = Distillation.parse(distillation)
        kwargs["distillation"] = settings is not None
        super().__init__(*args, **kwargs)
        # ClsHead's constructor ran with its defaults at the end of that chain.
        self.loss_module = loss if isinstance(loss, nn.Module) else MODELS.build(dict(loss))
        self.topk = topk
        self.cal_acc = cal_acc
        self.init_cfg = copy.deepcopy(init_cfg)
        self.distillation = settings

    def loss(
        self,
        feats: tuple[Tensor, ...],
        data_samples: Sequence[DataSample],
        teacher_logits: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """The loss under `loss`, and its two parts, without their weights and gradients, for the log.

        Args:
            feats: the backbone's maps.
            data_samples: labels, or mixed labels as scores.
            teacher_logits: `[B, classes]`, the teacher's logits for the same images.

        Raises:
            ValueError: when the teacher knows another number of classes, or there is no second classifier.
        """
        first, *rest = self.scores(feats)
        losses = self._get_loss(first, data_samples, **kwargs)
        if teacher_logits is not None:
            settings = self._settings_for(teacher_logits, first)
            base, teacher = losses["loss"], settings.teacher_term(rest[0], teacher_logits)
            losses["loss"] = (1.0 - settings.alpha) * base + settings.alpha * teacher
            losses.update(label_term=base.detach(), teacher_term=teacher.detach())
        elif rest:
            losses["loss"] = 0.5 * (losses["loss"] + self._get_loss(rest[0], data_samples, **kwargs)["loss"])
        return losses

    def _settings_for(self, teacher_logits: Tensor, scores: Tensor) -> Distillation:
        if self.distillation is None:
            raise ValueError(
                "head must have a second classifier to learn from a teacher; got distillation=False. "
                "Set distillation=True in the head"
            )
        if teacher_logits.shape[1] != scores.shape[1]:
            raise ValueError(
                f"teacher must know the head's {scores.shape[1]} classes; it gives {teacher_logits.shape[1]} "
                "logits. Choose a teacher for this data set or set its number of classes"
            )
        return self.distillation


@MODELS.register_module()
class DistilledImageClassifier(ImageClassifier):
    """An `ImageClassifier` that trains against a frozen teacher.

    The teacher is built when training starts, never for inference. It is in evaluation mode, has no gradient
    and no place in the state dict (nor in an EMA copy, which shares it), and follows the inputs' device and
    dtype. It sees exactly the student's inputs, after normalization and batch augmentation.

    Args:
        backbone, head, and `**kwargs`: as in `ImageClassifier`; the head has `distillation` switched on.
        teacher: any MMPretrain classifier config, a model name for `mmpretrain.get_model`, or None to train on
            the labels alone (the way to drop the teacher of a config: `--cfg-options model.teacher=None`).
        teacher_checkpoint: file or URL, loaded strictly. Without it a named teacher takes the weights that
            its model index names, and a config brings its own (`init_cfg`, or `pretrained` of timm).
    """

    def __init__(
        self,
        backbone: dict[str, Any] | nn.Module,
        head: dict[str, Any] | nn.Module,
        teacher: dict[str, Any] | str | None,
        teacher_checkpoint: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(teacher, (str, Mapping, type(None))):
            raise TypeError(f"teacher must be a model config, a model name or None; got {type(teacher).__name__}")
        super().__init__(backbone=backbone, head=head, **kwargs)
        if teacher is not None and not getattr(self.head, "distillation", None):
            raise ValueError(
                "head must have distillation switched on to learn from a teacher; got "
                f"{type(self.head).__name__} with distillation=False"
            )
        self._teacher = None if teacher is None else _Teacher(teacher, teacher_checkpoint)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher; built at the first access."""
        return None if self._teacher is None else self._teacher.module

    def init_weights(self) -> None:
        """As always, and build the teacher, so that a missing checkpoint shows before the first step."""
        super().init_weights()
        if self._teacher is not None:
            self._check_same_normalization(self._teacher.module)

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Losses of a batch: the head's, with the teacher's logits for the same inputs."""
        feats = self.extract_feat(inputs)
        given = {} if self._teacher is None else {"teacher_logits": self._teacher.logits(inputs)}
        losses: dict[str, Tensor] = self.head.loss(feats, data_samples, **given)
        return losses

    def _check_same_normalization(self, teacher: nn.Module) -> None:
        ours, theirs = self.data_preprocessor, getattr(teacher, "data_preprocessor", None)
        for name in ("mean", "std"):
            mine, other = getattr(ours, name, None), getattr(theirs, name, None)
            if mine is not None and other is not None and not torch.equal(mine.cpu(), other.cpu()):
                raise ValueError(
                    f"teacher must expect the student's normalized inputs; its {name} is "
                    f"{other.flatten().tolist()}, the student's {mine.flatten().tolist()}. "
                    "Give both the same data_preprocessor"
                )


class _Teacher:
    """Not a module, so that the student's state dict, optimizer and DDP wrapper never see the weights."""

    def __init__(self, model: dict[str, Any] | str, checkpoint: str | None) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._module: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Teacher:
        return self  # frozen, so an EMA copy of the student may share it

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            self._module = self._build().eval().requires_grad_(False)
        return self._module

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        scores = self.module.to(device=inputs.device, dtype=inputs.dtype)(inputs, mode="tensor")
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            shown = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"teacher must give logits [B, classes]; got {shown}. Give it a classification head")
        return scores

    def _build(self) -> nn.Module:
        teacher: Any
        if isinstance(self._model, str):
            published = self._checkpoint is None
            if published and ModelHub.get(self._model).weights is None:
                raise ValueError(f"teacher {self._model!r} has no published weights; set teacher_checkpoint")
            teacher = get_model(self._model, pretrained=published)
        else:
            teacher = MODELS.build(copy.deepcopy(dict(self._model)))
            if _mentions(self._model, "init_cfg"):
                teacher.init_weights()
        if self._checkpoint is not None:
            load_checkpoint(teacher, self._checkpoint, map_location="cpu", strict=True)
        elif not isinstance(self._model, str) and not _mentions(self._model, "init_cfg", "pretrained"):
            MMLogger.get_current_instance().warning(
                "teacher has random weights: its config names none. Set teacher_checkpoint"
            )
        module: nn.Module = teacher
        return module


def _mentions(config: object, *keys: str) -> bool:
    if isinstance(config, Mapping):
        return any((key in keys and value) or _mentions(value, *keys) for key, value in config.items())
    return isinstance(config, (list, tuple)) and any(_mentions(item, *keys) for item in config)
