"""The fastest precision here that keeps a text's states."""

import time
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .batch import Batch

COSINE = 0.998  # the mean, of mean-pooled sequences to those in fp32
LEAST = 0.99  # of any sequence
_ROUNDS = 3
TEXTS = (
    "Yes.",
    "Where is the key?",
    "The train to the coast leaves at a quarter past nine.",
    "She opened the window, and the smell of rain came in from the garden.",
    "Returns the number of bytes written, or raises an error where the disk is full.",
    "A small library in the north of the country lends tools, seeds and musical instruments.",
    "How do I change the password of an account that I can no longer sign in to?",
    "The committee met twice in March; it agreed on the budget, but not on who should pay for it.",
    "Great value, arrived a day early, though the box was dented and a screw was missing.",
    "Patients who slept fewer than six hours reported more headaches in the following week, and "
    "the effect was larger in those over fifty.",
    "If the two sides do not reach an agreement within thirty days, either of them may ask the "
    "court to appoint an arbitrator, whose decision is final and whose costs they share.",
    "For the dough, mix the flour with the yeast and a pinch of salt, add the lukewarm water "
    "little by little, and knead for ten minutes until it no longer sticks to your hands; then "
    "cover it with a damp cloth and let it rest in a warm place until it has doubled in size.",
    "version 2.4.1 fixes a crash at start-up when the configuration file is empty",
    "The glacier has lost a third of its length since the first photographs were taken.",
    "He said he would call back, and he never did.",
    "Light travels about three hundred thousand kilometres in a second.",
)


@torch.no_grad()
def choose(packed: dict, batch: "Batch") -> tuple[str, str]:
    """(the name of the fastest that keeps to the bounds, why).

    packed: `Packed` encoders by precision, fp32 first. batch: what comes to their first layer.
    """
    states = {name: one.run(batch, False).float() for name, one in packed.items()}  # and warm
    seconds = {name: [] for name in packed}
    for _ in range(_ROUNDS):
        for name, one in packed.items():
            start = time.perf_counter()
            one.run(batch, False)
            seconds[name].append(time.perf_counter() - start)
    took = {name: median(s) for name, s in seconds.items()}
    lengths = batch.cu_seqlens.diff().tolist()
    pooled = {n: torch.stack([x.mean(0) for x in s.split(lengths) if len(x)])
              for n, s in states.items()}  # fmt: skip
    first, *others = packed
    fit, lines = [first], [f"{first} {1e3 * took[first]:.1f} ms"]
    for name in others:
        cosine = torch.cosine_similarity(pooled[name], pooled[first])
        mean, least = cosine.mean().item(), cosine.min().item()
        if mean >= COSINE and least >= LEAST:  # not NaN
            fit.append(name)
        lines.append(f"{name} {1e3 * took[name]:.1f} ms, cosine {mean:.5f}, least {least:.4f}")
    best = min(fit, key=took.get)
    return best, (
        f"auto chose {best} on {len(pooled[first])} texts of {sum(lengths)} tokens: "
        f"{'; '.join(lines)}; bounds {COSINE} and {LEAST}"
    )
