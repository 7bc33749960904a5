# Swin-large fine-tuned from ImageNet-22k weights; the paper does not train it on ImageNet-1k alone.
_base_ = ['../_base_/models/flash_swin.py', '../_base_/schedules/swin_finetune.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(arch='large'),
    head=dict(in_channels=1536),
    train_cfg=_base_.batch_augments,
)
