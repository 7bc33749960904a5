# Ablation: softmax self-attention, 1, 2 and 4 heads of 32 channels.
_base_ = './swiftformer-xs_1xb128_fashion-mnist.py'

model = dict(backbone=dict(attention='self'))
