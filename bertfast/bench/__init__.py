"""`bertfast bench`: operators, encoder inference and training steps beside their rivals.

A row has a time only after its outputs were held against a reference in the same run; all rows of
a cell (one shape in one precision) take turns in one run. The scripts in `benchmarks/` measure
with the same functions.
"""
