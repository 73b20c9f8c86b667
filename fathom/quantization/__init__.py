"""Weights in fewer bits: int8 and int4 for decoding, FP8 blocks as the released checkpoints have them."""
