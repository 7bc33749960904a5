# Swin-base with its ImageNet-1k recipe (arXiv 2103.14030, appendix A2.1).
_base_ = ['../_base_/models/flash_swin.py', '../_base_/schedules/swin.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.5),
    head=dict(in_channels=1024),
    train_cfg=_base_.batch_augments,
)
