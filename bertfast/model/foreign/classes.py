"""Which of transformers' classes a checkpoint is: it follows from the tensors that are there."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...data.errors import ConfigError
from ...files import StrPath
from ..errors import CheckpointError

if TYPE_CHECKING:
    from transformers import BertConfig

    from .weights import Weight

# model_type -> what its classes' names begin with
FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
FAMILIES |= {"camembert": "Camembert", "distilbert": "DistilBert", "electra": "Electra"}
# Of those that have the same tensors, the first.
_HEADS = ["ForPreTraining", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"]
_HEADS += ["ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction", "Model"]


@dataclass(frozen=True)
class Candidate:
    """A class's tensors by the names that they have in a class with a head."""

    name: str
    prefix: str  # of the encoder's names
    shapes: dict[str, tuple[int, ...]]
    tied: frozenset[str]  # to others: a file leaves them out

    @property
    def required(self) -> set[str]:
        return self.shapes.keys() - self.tied

    def own_name(self, name: str) -> str:
        """As the class itself calls a tensor."""
        return name.removeprefix(self.prefix) if self.name.endswith("Model") else name

    def head(self, names: Iterable[str]) -> set[str]:
        """Which of these its head has."""
        return {n for n in names & self.shapes.keys() if not n.startswith(self.prefix)}


def candidates(config: "BertConfig") -> list[Candidate]:
    """Every class of a configuration's family."""
    import transformers

    family = FAMILIES[config.model_type]
    # The layers are the same in each, and take the longest to make.
    whole, short = _made(getattr(transformers, f"{family}Model"), config), copy.copy(config)
    layers = {name: t for name, t in whole.items() if ".layer." in name}
    short.num_hidden_layers = 0
    found = []
    for head in _HEADS:
        cls = getattr(transformers, family + head, None)
        if cls is None:
            continue
        try:
            state = _made(cls, short)
        except ValueError:  # DistilBERT's for questions, of other numbers of labels than two
            continue
        prefix = f"{cls.base_model_prefix}."
        before = prefix if head == "Model" else ""
        tied = cls._tied_weights_keys if config.tie_word_embeddings else None
        shapes = {before + name: tuple(t.shape) for name, t in state.items()}
        shapes |= {prefix + name: tuple(t.shape) for name, t in layers.items()}
        found.append(Candidate(cls.__name__, prefix, shapes, frozenset(tied or ())))
    return found


def _made(cls, config) -> dict[str, torch.Tensor]:
    """The state of a model of a class, without memory."""
    with torch.device("meta"):
        return cls(config).state_dict()


def prefixed(known: list[Candidate], weights: "Mapping[str, Weight]") -> dict:
    """The weights of a model without a head under the names that they have below one."""
    prefix = known[0].prefix
    bare = not any(name.startswith(prefix) for name in weights)
    return {prefix * bare + name: weight for name, weight in weights.items()}


def choose(
    path: StrPath,
    weights: "Mapping[str, Weight]",
    known: list[Candidate],
    wanted: str | None,
    listed: Sequence[str] | None,
) -> Candidate:
    """The class whose tensors are there and that leaves no head out.

    Args:
        path: of the checkpoint, for messages.
        weights: the tensors that are there, by transformers' names.
        wanted: the class to take, or None.
        listed: the configuration's own architectures; of classes with the same tensors they choose.

    Raises: ConfigError for `wanted`; CheckpointError where no class has its tensors there, two have
    other heads, or a head is there in part.
    """
    by_name, names = {c.name: c for c in known}, weights.keys()
    if wanted and wanted not in by_name:
        raise ConfigError(f"--architecture is {wanted!r}, expected one of {', '.join(by_name)}")
    asked = [by_name[wanted]] if wanted else known
    whole = [c for c in asked if c.required <= names]
    if not whole:
        _lacks(path, weights, known, asked)
    # A head says more than a pooler, which a class without one leaves out.
    heads = [c.head(names) for c in whole]
    best = [c for c, h in zip(whole, heads, strict=True) if not any(h < other for other in heads)]
    covers = [names & c.shapes.keys() for c in best]
    best = [c for c, own in zip(best, covers, strict=True) if not any(own < o for o in covers)]
    different = [c.name for c in best if c.head(names) != best[0].head(names)]
    if different:
        raise CheckpointError(
            f"{path} has the heads of a {best[0].name} and of a {different[0]}: choose one by "
            f"--architecture {best[0].name}, or the other"
        )
    every = set().union(*(c.head(names) for c in known))
    half = sorted(weights[n].own for n in every - best[0].head(names))
    if half and not wanted:
        raise CheckpointError(
            f"{path} has {some(half)}, of a head of which it lacks the rest: --ignore it, or take "
            f"what is whole by --architecture {best[0].name}"
        )
    return next((c for c in best if c.name in (listed or ())), best[0])


def check_known(
    path: StrPath, weights: "Mapping[str, Weight]", known: list[Candidate], config: "BertConfig"
) -> None:
    """CheckpointError where there is a tensor that no class has."""
    unknown = _unknown(weights, known)
    if not unknown:
        return
    beyond = f".layer.{config.num_hidden_layers}."
    more = any(beyond in name for name in weights)
    layers = (
        f"are layers beyond num_hidden_layers, {config.num_hidden_layers}: correct its "
        "configuration, or give its own by --config"
    )
    place = (
        f"no {config.model_type} of transformers has a place for: --ignore what the model works "
        "without (* stands for any letters)"
    )
    raise CheckpointError(f"{path} has {some(unknown)}, which {layers if more else place}")


def _unknown(weights, known) -> list[str]:
    """The tensors that no class has, by their own names."""
    return sorted(w.own for n, w in weights.items() if not any(n in c.shapes for c in known))


def _lacks(path, weights, known, asked):
    nearest = min(asked, key=lambda c: len(c.required - weights.keys()))
    lacking, other = sorted(nearest.required - weights.keys()), _unknown(weights, known)
    raise CheckpointError(
        f"{path} lacks {some(lacking)}, which its configuration makes of a {nearest.name}"
        + f", and has {some(other)}" * bool(other)
        + ": give the configuration that belongs to it (--config), or the whole checkpoint"
    )


def some(names: Sequence[str]) -> str:
    """Names for a message, three at most."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
