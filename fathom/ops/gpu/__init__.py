"""Kernels for GPUs, in Triton: for what torch has no operation that goes through memory once."""
