# SwiftFormer-XS with the paper's recipe: no RandAugment, Mixup or CutMix, hard distillation.
_base_ = [
    '../_base_/models/swiftformer_distilled.py',
    '../_base_/schedules/swiftformer.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='xs'), head=dict(in_channels=220))

# Without RandAugment the official script jitters colours instead.
_base_.train_dataloader.dataset.pipeline[3] = dict(
    type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, backend='pillow'
)
