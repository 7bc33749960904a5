# EfficientViT-M0 on ImageNet-1k: the recipe of the official training script. The other variants inherit it.
# The card (README.md) lists the lines that differ from the official run.
_base_ = [
    '../_base_/models/efficientvit-msra.py',
    '../_base_/imagenet.py',
    '../_base_/default_runtime.py',
]

model = dict(train_cfg=_base_.batch_augments)

# Repeated augmentation: three versions of an image, each on another GPU.
train_dataloader = dict(batch_size=256, drop_last=True, sampler=dict(_delete_=True, type='RepeatAugSampler'))
val_dataloader = dict(batch_size=256)
test_dataloader = val_dataloader

# The learning rate belongs to a total batch of 2048: 1e-3 for every 512 images.
optim_wrapper = dict(
    type='AGCOptimWrapper',
    optimizer=dict(lr=4e-3, weight_decay=0.025),
    # Bias tables have two dimensions, so no other rule spares them.
    paramwise_cfg=dict(custom_keys={'attention_biases': dict(decay_mult=0.0)}),
    clip_grad=dict(type='agc', clip_factor=0.02),
)
auto_scale_lr = dict(base_batch_size=2048)

# By epoch: a cosine over all 300 epochs, its first five multiplied by a ramp from 1e-6.
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0, end=300, T_max=300),
    dict(type='LinearLR', start_factor=2.5e-4, by_epoch=True, begin=0, end=6),
]

# Kept and saved, never evaluated, as officially. A checkpoint holds the average under `state_dict` and the
# trained weights under `ema_state_dict`.
custom_hooks = [
    dict(
        type='EMAHook',
        momentum=4e-5,
        update_buffers=True,
        evaluate_on_ema=False,
        evaluate_on_origin=True,
    ),
]

randomness = dict(diff_rank_seed=True)
