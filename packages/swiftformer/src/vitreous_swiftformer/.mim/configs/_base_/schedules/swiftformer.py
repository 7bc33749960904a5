# What the recipes of all four variants share on ImageNet-1k, for a total batch of 2048 (16 GPUs with 128 images).
_base_ = '../imagenet.py'

train_dataloader = dict(batch_size=128, sampler=dict(type='RepeatAugSampler', num_repeats=3))

optim_wrapper = dict(
    type='AGCOptimWrapper',
    # Not scaled by the batch. Layer scales and w_g have more than one dimension and do decay, as officially.
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.025),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(type='agc', clip_factor=0.01),
)
auto_scale_lr = dict(base_batch_size=2048)
param_scheduler = [
    # Five epochs up from 1e-6, on a cosine that counts from the first epoch.
    dict(type='LinearLR', start_factor=5e-4, by_epoch=True, begin=0, end=6),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0, T_max=300),
]
train_cfg = dict(max_epochs=300, val_interval=20)

# Averaged weights are kept but not evaluated.
custom_hooks = [
    dict(
        type='EMAHook',
        momentum=4e-5,
        update_buffers=True,
        evaluate_on_ema=False,
        evaluate_on_origin=True,
        priority='ABOVE_NORMAL',
    )
]
