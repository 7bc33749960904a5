# SwiftFormer-L1 for those without a teacher: one classifier, the labels alone, otherwise the paper's recipe.
_base_ = './swiftformer-l1_16xb128_in1k.py'

model = dict(teacher=None, head=dict(distillation=False))
