"""Weights in fewer bits: the formats (int8, int4, FP8 blocks) and the layers that store their weights in them.

Nothing here depends on a model or on a checkpoint: `model/quantize.py` chooses the weights, `checkpoint/` reads files.
"""
