# Mask R-CNN on SwiftFormer-L1 for MMDetection 3, as the paper trains it: 12 epochs, 1333x800, batch 32, AdamW at 2e-4.
# The weights are a classifier's checkpoint, from `vitreous convert` or `vitreous train`.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]

custom_imports = dict(imports=['vitreous_swiftformer.mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwiftFormer',
        arch='l1',
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='swiftformer-l1.pth', prefix='backbone.'),
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)

# For 8 GPUs.
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05)
)
auto_scale_lr = dict(base_batch_size=32)
