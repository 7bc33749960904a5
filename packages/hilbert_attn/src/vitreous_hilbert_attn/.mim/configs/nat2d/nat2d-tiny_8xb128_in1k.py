_base_ = ['./nat2d-mini_8xb128_in1k.py']

model = dict(backbone=dict(arch='tiny'))
