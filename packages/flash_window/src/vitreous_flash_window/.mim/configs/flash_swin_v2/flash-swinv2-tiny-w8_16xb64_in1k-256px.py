# Swin V2-tiny at 256 x 256, windows of 8 x 8, with Swin's ImageNet-1k recipe (arXiv 2111.09883, section 4.1).
_base_ = ['../_base_/models/flash_swin_v2.py', '../_base_/schedules/swin.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.2),
    train_cfg=_base_.batch_augments,
)

_base_.train_dataloader.dataset.pipeline[1].scale = 256
# The same share of the image as at 224, where the short side is 256.
_base_.val_dataloader.dataset.pipeline[1].scale = 292
_base_.val_dataloader.dataset.pipeline[2].crop_size = 256
_base_.test_dataloader.dataset.pipeline[1].scale = 292
_base_.test_dataloader.dataset.pipeline[2].crop_size = 256
