# SwiftFormer with one classifier. A child config that sets custom_imports replaces these, so it repeats them.
custom_imports = dict(imports=['vitreous_swiftformer.mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='SwiftFormer', arch='xs'),
    head=dict(
        type='SwiftFormerHead',
        num_classes=1000,
        in_channels=220,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
