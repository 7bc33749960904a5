"""What several test files of core share."""

import pytest

TINY_CONFIG = """
custom_imports = dict(imports=['vitreous_core.mm'], allow_failed_imports=False)
default_scope = 'mmpretrain'
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3, save_best='auto'))
randomness = dict(seed=0)
data_preprocessor = dict(num_classes=10, mean=[127.5] * 3, std=[127.5] * 3)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32),
        img_size=8, patch_size=4, out_type='avg_featmap',
    ),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=16),
)
pipeline = [dict(type='Resize', scale=8), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=64, num_workers=0, persistent_workers=False,
    dataset=dict(type='DigitsDataset', split='train', indices=192, pipeline=pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=64, num_workers=0, persistent_workers=False,
    dataset=dict(type='DigitsDataset', split='val', indices=64, pipeline=pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
val_cfg = dict()
test_dataloader, test_evaluator, test_cfg = val_dataloader, val_evaluator, val_cfg
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-2))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(by_epoch=True, max_epochs=2)
"""


@pytest.fixture(scope="session")
def tiny_config():
    """Text of a config that trains two epochs of three iterations on a part of the digits, in about a second."""
    return TINY_CONFIG
