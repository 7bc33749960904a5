# NAT-mini with neighbourhoods of 7 x 7 pixels, as arXiv 2204.07143 publishes it.
custom_imports = dict(imports=['vitreous_hilbert_attn.mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='NeighborhoodAttentionTransformer',
        arch='mini',
        kernel_size=7,
        order='hilbert',
        relative_bias=True,
        drop_path_rate=0.2,
        backend='auto',
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=512,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        cal_acc=False,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
)
