# M0 with fewer blocks on Fashion-MNIST, what the ablations beside it are compared with: 7 x 7, 4 x 4 and 2 x 2 tokens,
# each map one window. One pass over the 60,000 images.
_base_ = ['../_base_/models/efficientvit-msra.py', '../_base_/fashion_mnist.py', '../_base_/default_runtime.py']

_base_.train_dataloader.dataset.pipeline[-2].scale = 112
_base_.val_dataloader.dataset.pipeline[-2].scale = 112
_base_.test_dataloader.dataset.pipeline[-2].scale = 112

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            channels=(64, 128, 192),
            depths=(1, 2, 1),
            num_heads=(4, 4, 4),
            kernel_sizes=(5, 5, 5, 5),
        ),
        img_size=112,
    ),
    head=dict(num_classes=10, in_channels=192),
)

train_cfg = dict(max_epochs=1)
