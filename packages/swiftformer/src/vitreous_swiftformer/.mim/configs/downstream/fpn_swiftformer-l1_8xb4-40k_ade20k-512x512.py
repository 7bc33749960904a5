# Semantic FPN on SwiftFormer-L1 for MMSegmentation 1, as the paper trains it: 40k iterations at 512x512, batch 32,
# AdamW at 2e-4, polynomial decay. The weights are a classifier's checkpoint, from `vitreous convert` or
# `vitreous train`.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/schedules/schedule_40k.py',
    'mmseg::_base_/default_runtime.py',
]

custom_imports = dict(imports=['vitreous_swiftformer.mm'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwiftFormer',
        arch='l1',
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='swiftformer-l1.pth', prefix='backbone.'),
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
    decode_head=dict(num_classes=150),
)

train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4), clip_grad=None
)
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]
