# HWT on the digits: one token per pixel of the scan, then 4 x 4, 2 x 2 and 1 x 1 tokens; shifted windows in stage one.
_base_ = ['../_base_/models/hwt.py', '../_base_/digits.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=24, depths=[2, 2, 1, 1], num_heads=[2, 4, 8, 16]),
        img_size=32,
        window_size=4,
    ),
    head=dict(num_classes=10, in_channels=192),
)

train_cfg = dict(max_epochs=15)
