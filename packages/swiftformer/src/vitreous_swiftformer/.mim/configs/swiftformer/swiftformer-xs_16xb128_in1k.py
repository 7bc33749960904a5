# SwiftFormer-XS with the paper's recipe: no RandAugment, Mixup or CutMix, hard distillation.
_base_ = [
    '../_base_/models/swiftformer_distilled.py',
    '../_base_/schedules/swiftformer.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='xs'), head=dict(in_channels=220))

# Without RandAugment the official script jitters colours instead.
train_pipeline = [
    *_base_.train_pipeline[:3],
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, backend='pillow'),
    *_base_.train_pipeline[4:],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
