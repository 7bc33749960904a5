# Swin's ImageNet-1k recipe (arXiv 2103.14030), which HWT's release keeps, with its drop path of 0.1.
_base_ = ['../_base_/models/hwt.py', '../_base_/imagenet.py', '../_base_/default_runtime.py']

model = dict(train_cfg=_base_.batch_augments)

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'.relative_position_bias_table': dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    # From 5e-7 to 1e-3 over 20 epochs, then down to 5e-6.
    dict(type='LinearLR', start_factor=5e-4, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=5e-6, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]
