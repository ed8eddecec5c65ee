"""A checkpoint's head and the data's classes: outputs go to classes by name, never by place."""

import dataclasses
from pathlib import Path

from torch import nn

from .. import data
from ..progress import Say
from . import opening
from .config import ConfigError
from .outputs import say

PROBLEM = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


def label_set(model: nn.Module) -> data.LabelSet:
    """The task and class names that a model's configuration says."""
    problem = (
        model.config.problem_type
        or PROBLEM["single_label" if model.config.num_labels > 1 else "regression"]
    )
    task = next(t for t, p in PROBLEM.items() if p == problem)
    names = range(0 if task == "regression" else model.config.num_labels)
    return data.LabelSet(tuple(str(model.config.id2label[i]) for i in names), task)


def load(
    folder: Path,
    head: opening.Head,
    labels: data.LabelSet,
    which: str = "auto",
    *,
    flags: bool = False,
    allow_pickle: bool = False,
    say: Say = say,
) -> tuple[nn.Module, data.LabelSet]:
    """A checkpoint's model with a head for the data's classes (or numbers).

    Its head stays where its classes have the data's names, in any order. One without names
    (LABEL_0, LABEL_1, ...) stays for data whose classes are 0, 1, ...; one of another task never.

    Args:
        labels: the data's classes.
        which: "fresh" for a new head; "keep" for the checkpoint's, its outputs in the order of
            `labels`, whatever they were called; "auto".
        flags: whether labels are vectors, whose places are the outputs.

    Returns: the model, and the classes in the order of its outputs.

    Raises: ConfigError where it is not known which output is which class, CheckpointError.
    """
    count = max(1, len(labels))
    model, new = opening.pretrained(folder, head, which, count, allow_pickle)
    if not new:
        labels = _matched(folder, model, labels, which, flags)
    config = model.config
    model.num_labels = config.num_labels = count
    config.id2label = dict(enumerate(labels.names or ("LABEL_0",)))
    config.label2id = {name: i for i, name in config.id2label.items()}
    if not head.per_token:
        config.problem_type = PROBLEM[labels.task]
    say(f"head: {'new' if new else f'kept from {folder}'}, its outputs are {_text(labels)}")
    return model, labels


def _matched(folder, model, labels, which, flags) -> data.LabelSet:
    """The data's classes in the order of the head's outputs."""
    own, count = label_set(model), model.config.num_labels
    fits = count == max(1, len(labels))
    if fits and which == "keep":
        return labels
    if fits and (own.task == "regression") == (labels.task == "regression"):
        ways, numbers = [own.names], range(len(own))
        if own.names == tuple(f"LABEL_{i}" for i in numbers):
            ways.append(tuple(map(str, numbers)))
        for names in ways[::-1]:
            if flags or {*map(data.normal, names)} == {*map(data.normal, labels.names)}:
                return dataclasses.replace(labels, names=names)
    keep = ", or --head keep to keep its outputs in the order of the data's classes"
    raise ConfigError(
        f"{folder} has a head for {_text(own)}, the data are of {_text(labels)}: give --head "
        f"fresh for a new one{keep if fits else ''}"
    )


def _text(labels) -> str:
    names = labels.names
    if not names:
        return "a number (regression)"
    more = f", ... ({len(names)} in all)" if len(names) > 10 else ""
    return f"the classes {', '.join(names[:10])}{more}"
