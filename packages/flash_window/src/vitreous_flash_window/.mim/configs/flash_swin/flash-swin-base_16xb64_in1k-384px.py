# Swin-base fine-tuned at 384 x 384 with windows of 12 x 12, from the weights of flash-swin-base_16xb64_in1k.
_base_ = ['../_base_/models/flash_swin.py', '../_base_/schedules/swin_finetune.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(
        arch='base',
        img_size=384,
        drop_path_rate=0.1,
        stage_cfgs=dict(block_cfgs=dict(window_size=12)),
    ),
    head=dict(in_channels=1024),
    train_cfg=_base_.batch_augments,
)

whole_image = dict(type='Resize', scale=384, backend='pillow', interpolation='bicubic')

_base_.train_dataloader.dataset.pipeline[1].scale = 384
# The whole image, squeezed to a square, as the release evaluates at this size.
_base_.val_dataloader.dataset.pipeline[1:3] = [whole_image]
_base_.test_dataloader.dataset.pipeline[1:3] = [whole_image]
