# Swin on Fashion-MNIST: 14 x 14 tokens in four windows of 7 x 7, one block shifted, then 7 x 7 in one window.
_base_ = ['../_base_/models/flash_swin.py', '../_base_/fashion_mnist.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=64, depths=[2, 2], num_heads=[2, 4]),
        img_size=28,
        patch_size=2,
        window_size=7,
        drop_path_rate=0.1,
    ),
    head=dict(num_classes=10, in_channels=128),
    # Swin's initial weights of 0.02 are those of its widths; at these they learn too slowly.
    init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
)
