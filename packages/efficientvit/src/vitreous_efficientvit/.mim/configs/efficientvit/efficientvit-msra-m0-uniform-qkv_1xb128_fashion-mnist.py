# Ablation: queries and keys as wide as the values of a head, C / 4, instead of 16.
_base_ = './efficientvit-msra-m0_1xb128_fashion-mnist.py'

model = dict(backbone=dict(arch=dict(key_dim=(16, 32, 48))))
