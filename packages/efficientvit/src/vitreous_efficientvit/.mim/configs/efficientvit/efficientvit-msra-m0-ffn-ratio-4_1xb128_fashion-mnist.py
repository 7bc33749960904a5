# Ablation: FFNs expand fourfold. Fewer channels bring the multiply-adds back.
_base_ = './efficientvit-msra-m0_1xb128_fashion-mnist.py'

model = dict(
    backbone=dict(arch=dict(ffn_ratio=4, channels=(48, 104, 160))),
    head=dict(in_channels=160),
)
