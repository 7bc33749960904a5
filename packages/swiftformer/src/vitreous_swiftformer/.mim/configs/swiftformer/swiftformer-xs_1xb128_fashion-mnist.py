# A small SwiftFormer on Fashion-MNIST at twice its size, what the ablations beside it are compared with: attention over
# 14 x 14, 7 x 7 and 4 x 4 tokens, one classifier. One pass over the 60,000 images.
_base_ = ['../_base_/models/swiftformer.py', '../_base_/fashion_mnist.py', '../_base_/default_runtime.py']

_base_.train_dataloader.dataset.pipeline[-2].scale = 56
_base_.val_dataloader.dataset.pipeline[-2].scale = 56
_base_.test_dataloader.dataset.pipeline[-2].scale = 56

model = dict(
    backbone=dict(arch=dict(_delete_=True, channels=[32, 64, 128], depths=[2, 2, 2])),
    head=dict(num_classes=10, in_channels=128),
)

train_cfg = dict(max_epochs=1)
