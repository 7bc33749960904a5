# Swin's fine-tuning of pretrained weights (arXiv 2103.14030, appendix A2.1): 30 epochs at a constant rate of 1e-5,
# decay 1e-8. Start it from a checkpoint by `load_from`; bias tables of another window size are resized.
_base_ = ['./swin.py']

optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type='ConstantLR', factor=1.0, by_epoch=True, begin=0, end=30)]
train_cfg = dict(max_epochs=30)
