"""Poisson sampling: each step draws each example by itself, with the same probability."""

from itertools import pairwise

import numpy as np


def draw(examples: int, rate: float, rng: np.random.Generator) -> list[int]:
    """Positions of 0..examples - 1, in order; perhaps none.

    How many is binomial, and which ones uniform: the same as a coin for each, in the time of those
    drawn.
    """
    count = rng.binomial(examples, rate)
    return np.sort(rng.choice(examples, count, replace=False, shuffle=False)).tolist()


def parts(drawn: list, most: int) -> list[list]:
    """In pieces of nearly equal size, up to `most`; none of nothing."""
    count = -(-len(drawn) // most)
    ends = [len(drawn) * i // count for i in range(count + 1)] if count else [0]
    return [drawn[a:b] for a, b in pairwise(ends)]
