"""The fast operations' Triton: what a GPU runs where plain torch would be many launches or many bytes.

Triton comes with torch's CUDA builds, and only modules that are about to use it import from here.
"""
