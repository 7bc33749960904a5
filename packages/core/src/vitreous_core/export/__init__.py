"""Export: a classifier in deploy mode as a file for another runtime, compared with the model on the spot.

    vitreous export swiftformer-xs_16xb128_in1k --format onnx --checkpoint xs.pth

`formats` knows how each kind of file is written and run, `program` makes one graph of a model, `api` puts it together:
fold, capture, write, run, compare, time. Whatever a format needs beyond core is an extra of its own and imported late.
"""
