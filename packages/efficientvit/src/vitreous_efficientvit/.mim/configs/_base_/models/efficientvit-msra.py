# EfficientViT (MSRA) with one head; a model's config sets `arch` and the head's `in_channels`.
# A child's custom_imports replaces this list.
custom_imports = dict(imports=['vitreous_efficientvit.mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='EfficientViTMSRA', arch='m0', img_size=224),
    head=dict(
        type='EfficientViTMSRAHead',
        num_classes=1000,
        in_channels=192,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
