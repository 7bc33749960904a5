# SwiftFormer on the digits: two stages on 8 x 8 and 4 x 4 positions, one classifier.
_base_ = ['../_base_/models/swiftformer.py', '../_base_/digits.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(arch=dict(_delete_=True, channels=[24, 48], depths=[2, 2])),
    head=dict(num_classes=10, in_channels=48),
)
train_cfg = dict(max_epochs=15)
