# SwiftFormer-XS for those without a teacher: one classifier, the labels alone, otherwise the paper's recipe.
_base_ = './swiftformer-xs_16xb128_in1k.py'

model = dict(teacher=None, head=dict(distillation=False))
