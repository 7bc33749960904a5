# A small EfficientViT on the digits, with every kind of layer of the large ones. On maps of 7x7, 4x4 and 2x2
# its windows of 4x4 are cut from a padded map, then the whole map, then smaller.
_base_ = [
    '../_base_/models/efficientvit-msra.py',
    '../_base_/digits.py',
    '../_base_/default_runtime.py',
]

_base_.train_dataloader.dataset.pipeline[-2].scale = 112
_base_.val_dataloader.dataset.pipeline[-2].scale = 112
_base_.test_dataloader.dataset.pipeline[-2].scale = 112

model = dict(
    backbone=dict(
        _delete_=True,
        type='EfficientViTMSRA',
        arch=dict(
            channels=(32, 48, 64),
            depths=(1, 1, 1),
            num_heads=(2, 2, 2),
            kernel_sizes=(5, 3),
            window_size=4,
        ),
        img_size=112,
    ),
    head=dict(num_classes=10, in_channels=64),
)

train_cfg = dict(max_epochs=8)
