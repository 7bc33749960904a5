# RetinaNet on EfficientViT-M4 for MMDetection 3, as the paper trains it: 12 epochs, AdamW at 1e-4, batch norms in
# evaluation mode, five levels from stride 8 on. The weights are a classifier's checkpoint, from `vitreous convert` or
# `vitreous train`.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]

custom_imports = dict(imports=['vitreous_efficientvit.mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.EfficientViTMSRA',
        arch='m4',
        # Windows of 7x7 in every stage, as officially: the tables of a 224 checkpoint are resized where they are 4x4.
        img_size=800,
        out_indices=(0, 1, 2),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='efficientvit-msra-m4.pth', prefix='backbone.'),
    ),
    neck=[
        dict(type='mmpretrain.FinerMaps', in_channels=128, levels=1),
        dict(
            type='FPN',
            in_channels=[128, 128, 256, 384],
            out_channels=256,
            start_level=0,
            add_extra_convs='on_input',
            num_outs=5,
        ),
    ],
)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={'attention_biases': dict(decay_mult=0.0)}),
)
