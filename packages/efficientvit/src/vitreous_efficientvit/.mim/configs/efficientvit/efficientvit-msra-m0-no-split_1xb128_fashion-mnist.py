# Ablation: every head sees all channels, as in multi-head self-attention.
_base_ = './efficientvit-msra-m0_1xb128_fashion-mnist.py'

model = dict(backbone=dict(arch=dict(head_input='full')))
