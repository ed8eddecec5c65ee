"""Training with differential privacy by DP-SGD (Abadi et al., arXiv:1607.00133).

`settings`: what is refused, and what is said; `accounts`: noise and budget, by Opacus; `examples`
and `gradients`: clipped gradients by one forward and one backward; `step`: noise and update;
`sampler` and `task`: Poisson sampling, and what a private run reports.
"""
