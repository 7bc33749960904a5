# SwiftFormer with two classifiers; the second learns from RegNetY-16GF (82.9 % top-1, quoted) as DeiT's do.
# MMPretrain's RegNet has no squeeze-and-excitation, so the teacher comes from timm with its released weights,
# which are fetched when training starts.
_base_ = './swiftformer.py'

model = dict(
    type='DistilledImageClassifier',
    head=dict(distillation=dict(mode='hard', alpha=0.5)),
    teacher=dict(type='TimmClassifier', model_name='regnety_160.deit_in1k', pretrained=True),
)
