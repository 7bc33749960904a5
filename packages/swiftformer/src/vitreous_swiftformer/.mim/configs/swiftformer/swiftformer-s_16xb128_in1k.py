# SwiftFormer-S with the paper's recipe: no Mixup, no CutMix, hard distillation.
_base_ = [
    '../_base_/models/swiftformer_distilled.py',
    '../_base_/schedules/swiftformer.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='s'), head=dict(in_channels=224))
