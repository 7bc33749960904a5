# Swin on the digits: 8 x 8 tokens, one per pixel of the scan, then 4 x 4; windows of 4 x 4, one block shifted.
_base_ = ['../_base_/models/flash_swin.py', '../_base_/digits.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depths=[2, 2], num_heads=[2, 4]),
        img_size=32,
        window_size=4,
        drop_path_rate=0.0,
    ),
    head=dict(num_classes=10, in_channels=64),
    # Swin's initial weights of 0.02 are those of its widths; at these they learn too slowly.
    init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
)
