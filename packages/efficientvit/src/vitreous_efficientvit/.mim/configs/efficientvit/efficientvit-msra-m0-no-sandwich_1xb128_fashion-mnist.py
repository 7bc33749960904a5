# Ablation: blocks of attention and one FFN, as Swin's. More blocks bring parameters and multiply-adds back.
_base_ = './efficientvit-msra-m0_1xb128_fashion-mnist.py'

model = dict(backbone=dict(arch=dict(ffns=(0, 1), depths=(2, 3, 2))))
