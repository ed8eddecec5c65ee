"""Triton kernels, one file an operator; imported as `bertfast.kernels`."""
