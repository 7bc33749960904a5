# Ablation: heads see their own slice alone, not the output of the head before.
_base_ = './efficientvit-msra-m0_1xb128_fashion-mnist.py'

model = dict(backbone=dict(arch=dict(head_input='slice')))
