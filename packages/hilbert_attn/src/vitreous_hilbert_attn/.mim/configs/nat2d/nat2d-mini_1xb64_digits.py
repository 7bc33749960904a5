# NAT on the digits: levels of 8 x 8, 4 x 4, 2 x 2 and 1 x 1 tokens, 3 x 3 neighbourhoods where there are as many.
_base_ = ['../_base_/models/nat2d.py', '../_base_/digits.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=24, depths=[2, 1, 1, 1], num_heads=[2, 4, 8, 16]),
        kernel_size=3,
    ),
    head=dict(num_classes=10, in_channels=192),
)

train_cfg = dict(max_epochs=15)
