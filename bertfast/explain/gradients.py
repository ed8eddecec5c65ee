"""Integrated gradients (Sundararajan, Taly and Yan 2017), by captum."""

from collections.abc import Callable
from inspect import signature

import numpy as np
import torch
from torch import nn

from ..data.errors import ConfigError
from ..train.networks import takes_types
from .words import Text

TOKENS = 2048  # in a batch at most, of which the states of all layers are kept
TOLERANCE = 0.01  # of completeness: the error beside the change of the output


def required() -> type:
    """captum's class. Raises RuntimeError where it is not installed."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError as e:
        raise RuntimeError(
            f"integrated_gradients needs captum ({e}): pip install 'bertfast[explain]', or give "
            "another --method"
        ) from e
    return IntegratedGradients


def takes_embeddings(model: nn.Module) -> bool:
    return "inputs_embeds" in signature(type(model).forward).parameters


def embedded(
    model: nn.Module, ids: torch.Tensor, row: dict
) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """(word embeddings [n, tokens, hidden] of ids, the function from such to logits [n, outputs]);
    ids: int64 [n, tokens], of one length, in place of the row's."""
    if not takes_embeddings(model):
        raise ConfigError(
            f"a {type(model).__name__} takes no embeddings of words in place of ids, which "
            "gradients need: give --method occlusion"
        )
    types = row.get("token_type_ids") if takes_types(model) else None
    types = None if types is None else torch.tensor(types, device=model.device)

    def logits(x):
        more = {} if types is None else {"token_type_ids": types.expand(len(x), -1)}
        return model(inputs_embeds=x, **more).logits

    with torch.no_grad():
        return model.get_input_embeddings()(ids), logits


def baseline(text: Text, token: int) -> list[int]:
    """The text's ids with this one in the place of each that is of a word."""
    ids = text.row["input_ids"]
    return [token if w >= 0 else i for i, w in zip(ids, text.word, strict=True)]


def integrated_gradients(
    model: nn.Module, text: Text, target: int, token: int, steps: int, most: int, tokens: int
) -> tuple[np.ndarray, dict]:
    """Scores of a text's tokens, whose sum is the change of the target's logit from a baseline.

    x_i - x'_i times the mean gradient at x_i along the line from the baseline x' to the word
    embeddings x, by Gauss-Legendre quadrature, summed over the embedding's dimensions. The steps
    are doubled until the sum is within `TOLERANCE` of the change, or they are `most`.

    Args:
        token: what stands at every word's tokens in the baseline; specials stay.
        steps, most: at first and at most.
        tokens: in a batch.

    Returns: fp64 [tokens]; and steps, the logits at both ends, completeness_error (relative) and
    whether that is within the tolerance.
    """
    ids = torch.tensor([text.row["input_ids"], baseline(text, token)], device=model.device)
    ends, logits = embedded(model, ids, text.row)
    output = lambda x: logits(x)[:, target]
    with torch.no_grad():
        there, start = output(ends).double().tolist()
    x, x0 = ends[:1], ends[1:]
    method, size = required()(output), max(1, min(tokens, TOKENS) // ids.shape[1])
    while True:
        part = None if size >= steps else size
        found = method.attribute(x, x0, n_steps=steps, internal_batch_size=part)
        scores = found[0].double().sum(1).cpu().numpy()
        error = _relative(float(scores.sum()), there - start)
        if error <= TOLERANCE or steps >= most:
            break
        steps = min(2 * steps, most)
    about = {"steps": steps, "logit": there, "baseline_logit": start}
    return scores, about | {"completeness_error": error, "complete": error <= TOLERANCE}


def _relative(found: float, change: float) -> float:
    """inf of a sum where there is no change."""
    if found == change:
        return 0.0
    return abs(found - change) / abs(change) if change else float("inf")
