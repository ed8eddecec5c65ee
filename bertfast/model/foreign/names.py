"""What other frameworks call BERT's tensors, and what transformers calls them."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ...data.errors import ConfigError

_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}
_FLAX_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
_KERAS_LEAVES = _LEAVES | {"embeddings": "weight"}
_GOOGLE_HEADS = {
    "cls/predictions/output_bias": "cls.predictions.bias",
    "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
    "cls/seq_relationship/output_bias": "cls.seq_relationship.bias",
    "cls/squad/output_weights": "qa_outputs.weight",
    "cls/squad/output_bias": "qa_outputs.bias",
    "output_weights": "classifier.weight",
    "output_bias": "classifier.bias",
}
# Of training alone: the step, and what optimizers keep of each weight.
_TRAINING = ["global_step", "*/adam_m", "*/adam_v", "*/Adam", "*/Adam_1", "beta?_power"]
_TRAINING += ["*/AdamWeightDecayOptimizer", "*/AdamWeightDecayOptimizer_1"]
_TRAINING += ["*/LAMBOptimizer", "*/LAMBOptimizer_1", "*/lamb_m", "*/lamb_v"]


def google(name: str) -> tuple[str, bool]:
    """(transformers' name, whether to transpose) of a tensor of google-research/bert."""
    if name in _GOOGLE_HEADS:
        return _GOOGLE_HEADS[name], False
    path, _, leaf = re.sub(r"/layer_([0-9]+)/", r"/layer/\1/", name).rpartition("/")
    if leaf.endswith("_embeddings"):
        leaf += "/weight"
    return f"{path}/{_LEAVES.get(leaf, leaf)}".replace("/", "."), leaf == "kernel"


def flax(name: str) -> tuple[str, bool]:
    """The same of a tensor of transformers' Flax classes, whose modules are PyTorch's."""
    return _same_modules(name, _FLAX_LEAVES)


def keras(name: str) -> tuple[str, bool]:
    """The same of a tensor of its TensorFlow 2 classes."""
    return _same_modules(name, _KERAS_LEAVES)


def _same_modules(name, leaves):
    path, _, leaf = name.rpartition("/")
    return f"{path}/{leaves.get(leaf, leaf)}".replace("/", "."), leaf == "kernel"


def split(names: Iterable[str], patterns: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """(names of weights, how many others each pattern has).

    Raises ConfigError for a pattern, of those given, that has none.
    """
    kept, counts = [], dict.fromkeys([*_TRAINING, *patterns], 0)
    for name in names:
        found = [p for p in counts if fnmatchcase(name, p)]
        for p in found[:1]:
            counts[p] += 1
        if not found:
            kept.append(name)
    idle = [p for p in patterns if not counts[p]]
    if idle:
        some = ", ".join(kept[:3])
        raise ConfigError(f"--ignore {idle[0]!r} is no tensor's name; there are {some}, ...")
    return kept, {p: n for p, n in counts.items() if n}
