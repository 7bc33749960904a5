"""Distillation against hand-computed losses, with a tiny teacher and a student of one linear map each."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models import ClsHead, ImageClassifier
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from vitreous_core.mm.distillation import Distillation, DistillationLossMixin, DistilledImageClassifier

CLASSES = 3
SWAPPING_SEED = 1  # makes Mixup pair the two images with each other, not with themselves
LABELS = [2, 0]
TEACHER_LOGITS = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])


class PixelBackbone(nn.Module):
    """The image itself as the only map."""

    def __init__(self, init_cfg: object = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images * self.gain,)


class PlainHead(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, distillation: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.classifiers = nn.ModuleList(nn.Linear(in_channels, num_classes) for _ in range(1 + distillation))

    def scores(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pooled = feats[-1].mean(dim=(2, 3))
        return tuple(classifier(pooled) for classifier in self.classifiers)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(self.scores(feats)).mean(0)


class MMPlainHead(DistillationLossMixin, PlainHead, ClsHead):
    pass


class StoredTeacher(nn.Module):
    """Gives `TEACHER_LOGITS` and remembers what it was asked."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.table = nn.Parameter(TEACHER_LOGITS.repeat(1, 2)[:, :classes].clone())
        self.norm = nn.BatchNorm2d(CLASSES)

    def forward(self, images: Tensor, mode: str) -> Tensor:
        assert mode == "tensor"
        self.seen = images
        self.grad_was_enabled = torch.is_grad_enabled()
        return self.table + 0 * self.norm(images).mean()


for module in (PixelBackbone, MMPlainHead, StoredTeacher):
    MODELS.register_module(module=module, name=f"Test{module.__name__}", force=True)


@pytest.fixture
def samples() -> list[DataSample]:
    return [DataSample().set_gt_label(label) for label in LABELS]


def build_student(**settings: object) -> DistilledImageClassifier:
    torch.manual_seed(0)
    config = {
        "backbone": {"type": "TestPixelBackbone"},
        "head": {
            "type": "TestMMPlainHead",
            "num_classes": CLASSES,
            "in_channels": CLASSES,
            "distillation": True,
        },
        "teacher": {"type": "TestStoredTeacher"},
    }
    return DistilledImageClassifier(**{**config, **settings})


def with_logits(*rows: list[float]) -> tuple[MMPlainHead, list[Tensor]]:
    """A head whose first and second classifier give these rows for any images."""
    head = MMPlainHead(CLASSES, CLASSES, distillation=True)
    tables = [torch.tensor([row, row], requires_grad=True) for row in rows]
    head.scores = lambda feats: tuple(tables)
    return head, tables


def test_hard_loss_by_hand(samples: list[DataSample]) -> None:
    head, _ = with_logits([0.0, 0.0, math.log(2.0)], [0.0, math.log(3.0), 0.0])
    losses = head.loss((), samples, teacher_logits=TEACHER_LOGITS)
    # First: probabilities 1/4 1/4 1/2, labels 2 and 0. Second: 1/5 3/5 1/5, the teacher says 1 and 0.
    base = -(math.log(1 / 2) + math.log(1 / 4)) / 2
    teacher = -(math.log(3 / 5) + math.log(1 / 5)) / 2
    assert losses["loss"].item() == pytest.approx(0.5 * base + 0.5 * teacher, abs=1e-6)
    assert losses["label_term"].item() == pytest.approx(base, abs=1e-6)
    assert losses["teacher_term"].item() == pytest.approx(teacher, abs=1e-6)


def test_soft_loss_by_hand(samples: list[DataSample]) -> None:
    head, _ = with_logits([0.0, 0.0, math.log(2.0)], [0.0, math.log(3.0), 0.0])
    head.distillation = Distillation(mode="soft", alpha=0.3, tau=2.0)
    teacher_logits = torch.tensor([[0.0, 0.0, 2 * math.log(2.0)]] * 2)
    losses = head.loss((), samples, teacher_logits=teacher_logits)
    # At tau 2 the teacher's logits are 0 0 ln2 and the second classifier's are 0 ln3/2 0.
    target = [1 / 4, 1 / 4, 1 / 2]
    total = 2 + math.sqrt(3)
    student = [1 / total, math.sqrt(3) / total, 1 / total]
    divergence = 2 * sum(t * math.log(t / s) for t, s in zip(target, student, strict=True))
    base = -(math.log(1 / 2) + math.log(1 / 4)) / 2
    expected = 0.7 * base + 0.3 * 4 * divergence / (2 * CLASSES)
    assert losses["loss"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_alpha_limits_train_one_classifier_each(samples: list[DataSample], mode: str) -> None:
    for alpha, trained, idle in ((0.0, 0, 1), (1.0, 1, 0)):
        head, tables = with_logits([0.1, 0.2, 0.3], [0.3, 0.1, 0.2])
        head.distillation = Distillation(mode=mode, alpha=alpha)
        losses = head.loss((), samples, teacher_logits=TEACHER_LOGITS)
        losses["loss"].backward()
        assert tables[trained].grad.abs().max() > 0
        assert not tables[idle].grad.any()
        term = losses["label_term" if alpha == 0.0 else "teacher_term"]
        assert losses["loss"].item() == pytest.approx(term.item(), abs=1e-7)


def test_without_a_teacher_both_classifiers_fit_the_labels(samples: list[DataSample]) -> None:
    head, tables = with_logits([0.0, 0.0, math.log(2.0)], [0.0, math.log(3.0), 0.0])
    losses = head.loss((), samples)
    target = torch.tensor(LABELS)
    expected = (F.cross_entropy(tables[0], target) + F.cross_entropy(tables[1], target)) / 2
    assert losses["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    losses["loss"].backward()
    assert all(table.grad.abs().max() > 0 for table in tables)


def test_teacher_none_trains_on_labels_alone(samples: list[DataSample]) -> None:
    for distillation in (False, True):
        head = {
            "type": "TestMMPlainHead",
            "num_classes": CLASSES,
            "in_channels": CLASSES,
            "distillation": distillation,
        }
        student = build_student(teacher=None, head=head)
        student.init_weights()
        images = torch.randn(2, CLASSES, 4, 4)
        losses = student(images, samples, mode="loss")
        assert torch.equal(losses["loss"], student.head.loss(student.extract_feat(images), samples)["loss"])
        assert student.teacher is None


def test_mixed_and_smoothed_labels_reach_only_the_label_term() -> None:
    mixed = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    samples = [DataSample().set_gt_score(score) for score in mixed]
    loss = {"type": "LabelSmoothLoss", "label_smooth_val": 0.3, "mode": "original"}
    head = MMPlainHead(CLASSES, CLASSES, distillation=True, loss=loss)
    scores = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]] * 2)
    head.scores = lambda feats: scores
    losses = head.loss((), samples, teacher_logits=TEACHER_LOGITS)
    smoothed = 0.7 * mixed + 0.3 / CLASSES
    label_term = -(smoothed * scores[0].log_softmax(1)).sum(1).mean()
    teacher_term = F.cross_entropy(scores[1], torch.tensor([1, 0]))
    assert losses["loss"].item() == pytest.approx((0.5 * label_term + 0.5 * teacher_term).item(), abs=1e-6)


def test_batch_augments_reach_student_and_teacher_alike(samples: list[DataSample]) -> None:
    student = build_student(
        train_cfg={"augments": {"type": "Mixup", "alpha": 1.0}}, data_preprocessor={"num_classes": CLASSES}
    )
    images = torch.randint(0, 255, (2, CLASSES, 4, 4), dtype=torch.uint8)
    np.random.seed(0)
    torch.manual_seed(SWAPPING_SEED)
    data = student.data_preprocessor({"inputs": list(images), "data_samples": samples}, training=True)
    losses = student(**data, mode="loss")
    assert (data["inputs"] - images).abs().max() > 1
    assert torch.equal(student.teacher.seen, data["inputs"])
    assert losses["loss"].isfinite()


def test_teacher_is_frozen_and_invisible(samples: list[DataSample]) -> None:
    student = build_student().train()
    images = torch.randn(2, CLASSES, 4, 4, requires_grad=True)
    before = copy.deepcopy(student.teacher.state_dict())
    student(images, samples, mode="loss")["loss"].backward()
    teacher = student.teacher
    assert not teacher.training
    assert not teacher.norm.training
    assert not teacher.grad_was_enabled
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    visible = [
        *student.state_dict(),
        *(n for n, _ in student.named_parameters()),
        *dict(student.named_modules()),
    ]
    assert not [name for name in visible if "teacher" in name]
    assert copy.deepcopy(student).teacher is teacher


def test_teacher_follows_dtype_and_device(samples: list[DataSample]) -> None:
    student = build_student().double()
    images = torch.randn(2, CLASSES, 4, 4, dtype=torch.float64)
    assert student(images, samples, mode="loss")["loss"].dtype == torch.float64
    assert student.teacher.table.dtype == torch.float64


def test_teacher_is_built_for_training_only(samples: list[DataSample], tmp_path: Path) -> None:
    student = build_student(teacher_checkpoint=str(tmp_path / "absent.pth")).eval()
    images = torch.randn(2, CLASSES, 4, 4)
    assert student(images, mode="tensor").shape == (2, CLASSES)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        student.init_weights()


def test_teacher_checkpoint_is_loaded_strictly(tmp_path: Path) -> None:
    weights = StoredTeacher().state_dict()
    weights["table"] += 1
    torch.save({"state_dict": weights}, tmp_path / "teacher.pth")
    student = build_student(teacher_checkpoint=str(tmp_path / "teacher.pth"))
    student.init_weights()
    assert torch.equal(student.teacher.table, TEACHER_LOGITS + 1)
    del weights["table"]
    torch.save({"state_dict": weights}, tmp_path / "partial.pth")
    with pytest.raises(RuntimeError, match="table"):
        build_student(teacher_checkpoint=str(tmp_path / "partial.pth")).init_weights()


def test_teacher_of_another_class_count_names_both_numbers(samples: list[DataSample]) -> None:
    student = build_student(teacher={"type": "TestStoredTeacher", "classes": 5})
    with pytest.raises(ValueError, match=r"3 classes.* 5 logits"):
        student(torch.randn(2, CLASSES, 4, 4), samples, mode="loss")


def test_teacher_by_model_name(tmp_path: Path, samples: list[DataSample]) -> None:
    from mmpretrain import get_model

    name = "resnet18_8xb16_cifar10"
    expected = get_model(name)
    torch.save({"state_dict": expected.state_dict()}, tmp_path / "teacher.pth")
    head = {"type": "TestMMPlainHead", "num_classes": 10, "in_channels": 3, "distillation": True}
    student = build_student(head=head, teacher=name, teacher_checkpoint=str(tmp_path / "teacher.pth"))
    images = torch.randn(2, 3, 32, 32)
    student(images, samples, mode="loss")["loss"].backward()
    assert isinstance(student.teacher, ImageClassifier)
    with torch.no_grad():
        assert torch.equal(student.teacher(images), expected(images))


def test_teacher_with_another_normalization_is_refused() -> None:
    teacher = {
        "type": "ImageClassifier",
        "backbone": {"type": "TestPixelBackbone"},
        "head": {"type": "TestMMPlainHead", "num_classes": CLASSES, "in_channels": CLASSES},
        "data_preprocessor": {"mean": [1.0, 1.0, 1.0], "std": [2.0, 2.0, 2.0]},
    }
    student = build_student(teacher=teacher, data_preprocessor={"mean": [0.0] * 3, "std": [2.0] * 3})
    with pytest.raises(ValueError, match=r"its mean is \[1.0, 1.0, 1.0\], the student's \[0.0, 0.0, 0.0\]"):
        student.init_weights()


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"mode": "medium"}, ValueError, "'hard' or 'soft'; got 'medium'"),
        ({"alpha": 1.5}, ValueError, r"alpha must lie in \[0, 1\]; got 1.5"),
        ({"tau": 0.0}, ValueError, "tau must be positive; got 0.0"),
        ({"temperature": 2.0}, ValueError, "got also .'temperature'."),
        ("hard", TypeError, "bool or a dict"),
    ],
)
def test_bad_distillation_settings(setting: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MMPlainHead(CLASSES, CLASSES, distillation=setting)


def test_bad_students(samples: list[DataSample]) -> None:
    one_classifier = {"type": "TestMMPlainHead", "num_classes": CLASSES, "in_channels": CLASSES}
    with pytest.raises(ValueError, match="distillation=False"):
        build_student(head=one_classifier)
    with pytest.raises(ValueError, match="second classifier"):
        MODELS.build(one_classifier).loss((torch.ones(2, CLASSES, 1, 1),), samples, teacher_logits=TEACHER_LOGITS)
    with pytest.raises(TypeError, match="teacher must be a model config, a model name or None"):
        build_student(teacher=3)
    with pytest.raises(ValueError, match="published weights"):
        build_student(teacher="hivit-tiny-p16_16xb64_in1k").init_weights()
