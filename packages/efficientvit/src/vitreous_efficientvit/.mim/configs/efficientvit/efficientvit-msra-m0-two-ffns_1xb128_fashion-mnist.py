# Ablation: two FFNs on each side of the attention (N = 2 of equation 1), in fewer blocks.
_base_ = './efficientvit-msra-m0_1xb128_fashion-mnist.py'

model = dict(backbone=dict(arch=dict(ffns=(2, 2), depths=(1, 1, 1))))
