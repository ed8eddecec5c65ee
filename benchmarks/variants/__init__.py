"""Kernels that may beat the shipped ones on a GPU, tried by benchmarks/gpu_tune_*.py: each option
of a variant is a guess until it was timed. What wins moves into kernels/.

README.md has what they compile to; `specs()` of a file names that, as `shipped()` in kernels/.
"""
