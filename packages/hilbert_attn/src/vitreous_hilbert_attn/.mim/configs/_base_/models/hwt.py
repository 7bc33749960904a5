# HWT-tiny at 224 x 224 with windows of 7 x 7 tokens' area, as arXiv 2511.05832 publishes it.
custom_imports = dict(imports=['vitreous_hilbert_attn.mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='HilbertWindowTransformer',
        arch='tiny',
        img_size=224,
        window_size=7,
        order='hilbert',
        relative_bias=True,
        drop_path_rate=0.1,
        backend='auto',
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        cal_acc=False,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
)
