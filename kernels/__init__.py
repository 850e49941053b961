"""Fused operators of ernie5, imported as `ernie5_kernels`: one folder per op, its plain-PyTorch truth beside it."""

__version__ = "0.0.0"
