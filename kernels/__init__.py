"""Triton kernels, one file an operator, imported as `bertfast.kernels`.

A file holds the kernels, the functions that launch them (an operator's own signature, registered
as its backend "triton" by `bertfast/ops/<operator>.py`) and `shipped()`: every variant that the
launchers choose, which a test compiles for each supported GPU without having one.
"""
