# Swin V2 on Fashion-MNIST at 32 x 32: 16 x 16 tokens in four windows of 8 x 8, one block shifted, then one window.
_base_ = ['../_base_/models/flash_swin_v2.py', '../_base_/fashion_mnist.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=64, depths=[2, 2], num_heads=[2, 4], extra_norm_every_n_blocks=0),
        img_size=32,
        patch_size=2,
        window_size=8,
        drop_path_rate=0.1,
    ),
    head=dict(num_classes=10, in_channels=128),
    # Swin's initial weights of 0.02 are those of its widths; at these they learn too slowly.
    init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
)
_base_.train_dataloader.dataset.pipeline[-2].scale = 32
_base_.val_dataloader.dataset.pipeline[-2].scale = 32
_base_.test_dataloader.dataset.pipeline[-2].scale = 32
