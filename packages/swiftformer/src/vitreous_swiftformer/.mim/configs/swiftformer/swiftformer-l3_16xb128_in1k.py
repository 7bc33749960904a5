# SwiftFormer-L3 with the paper's recipe: all augmentation, hard distillation.
_base_ = [
    '../_base_/models/swiftformer_distilled.py',
    '../_base_/schedules/swiftformer.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='l3'), head=dict(in_channels=512), train_cfg=_base_.batch_augments)
