# SwiftFormer-L1 with the paper's recipe: all augmentation, hard distillation.
_base_ = [
    '../_base_/models/swiftformer_distilled.py',
    '../_base_/schedules/swiftformer.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='l1'), head=dict(in_channels=384), train_cfg=_base_.batch_augments)
