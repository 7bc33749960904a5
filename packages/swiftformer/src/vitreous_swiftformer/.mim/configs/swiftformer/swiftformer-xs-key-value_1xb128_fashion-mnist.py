# Ablation: additive attention with the interaction of keys and values.
_base_ = './swiftformer-xs_1xb128_fashion-mnist.py'

model = dict(backbone=dict(attention='additive_kv'))
