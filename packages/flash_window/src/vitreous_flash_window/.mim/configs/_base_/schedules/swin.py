# What Swin's ImageNet-1k training from scratch adds to imagenet.py: 16 GPUs with 64 images each, i.e. a total batch of
# 1024 and a rate of 5e-4 * 1024 / 512; 20 of 300 epochs of warm-up; no decay of position biases.
_base_ = ['../imagenet.py']

train_dataloader = dict(batch_size=64)
val_dataloader = dict(batch_size=64)
test_dataloader = val_dataloader

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            '.absolute_pos_embed': dict(decay_mult=0.0),
            '.relative_position_bias_table': dict(decay_mult=0.0),
            # V2
            '.logit_scale': dict(decay_mult=0.0),
            '.cpb_mlp': dict(decay_mult=0.0),
        }
    ),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]
