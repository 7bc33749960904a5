# The larger published HWT-tiny: 256 x 256 images, windows of 8 x 8 tokens' area, otherwise the recipe of 224.
_base_ = ['./hwt-tiny_8xb128_in1k.py']

model = dict(backbone=dict(img_size=256, window_size=8))

_base_.train_dataloader.dataset.pipeline[1].scale = 256
# The same share of the image as at 224, where the short side is 256.
_base_.val_dataloader.dataset.pipeline[1].scale = 292
_base_.val_dataloader.dataset.pipeline[2].crop_size = 256
_base_.test_dataloader.dataset.pipeline[1].scale = 292
_base_.test_dataloader.dataset.pipeline[2].crop_size = 256
