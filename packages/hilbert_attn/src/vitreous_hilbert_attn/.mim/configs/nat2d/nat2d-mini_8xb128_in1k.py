# NAT's ImageNet-1k recipe (arXiv 2204.07143 and its release).
_base_ = ['../_base_/models/nat2d.py', '../_base_/imagenet.py', '../_base_/default_runtime.py']

model = dict(train_cfg=_base_.batch_augments)

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'.rpb': dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    # From 1e-6 to 1e-3 over 20 epochs, then down to 5e-6, where the last 10 epochs stay.
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=5e-6, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=310, val_interval=1)
