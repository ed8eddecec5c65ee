"""What a model does differently for groups of people: `groups`, a classifier's figures by group;
`swaps`, its answers when terms of a group are swapped; `pairs`, which of two sentences a masked
language model finds likelier."""

from .by_group import groups
from .likelihood import pseudo_log_likelihoods
from .sentence_pairs import pairs
from .swapping import swaps

__all__ = ["groups", "pairs", "pseudo_log_likelihoods", "swaps"]
