"""A checkpoint's head and the data's classes: outputs go to classes by name, never by place."""

import dataclasses
from pathlib import Path

from torch import nn

from .. import data
from ..model import BertForSequenceClassification, BertModel
from ..model.config import CONFIG
from ..model.config import read as read_config
from .config import ConfigError
from .inference import PROBLEM, label_set, other_task
from .outputs import say


def load(folder: Path, labels: data.LabelSet, fresh: bool | None, flags: bool, allow_pickle: bool):
    """A checkpoint as a classifier (or regressor) of the data's classes.

    Its head stays where its classes have the data's names, in any order. One without names
    (LABEL_0, LABEL_1, ...) stays for data whose classes are 0, 1, ...; one of another task never.

    Args:
        labels: the data's classes.
        fresh: True for a new head; False keeps the checkpoint's, its outputs in the order of
            `labels`, whatever they were called.
        flags: whether labels are vectors, whose places are the outputs.

    Returns: the model, and the classes in the order of its outputs.

    Raises: ConfigError where it is not known which output is which class, CheckpointError.
    """
    if fresh or other_task(read_config(folder / CONFIG)):
        bert = BertModel.from_pretrained(folder, allow_pickle=allow_pickle)
        model = BertForSequenceClassification(bert.config).eval()
        model.bert, new = bert, True
    else:
        model = BertForSequenceClassification.from_pretrained(folder, allow_pickle=allow_pickle)
        new = "classifier.weight" in model.new_weights
    if not new:
        labels = _matched(folder, model, labels, fresh, flags)
    count, config = max(1, len(labels)), model.config
    if new:
        model.classifier = nn.Linear(config.hidden_size, count)
        nn.init.normal_(model.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
    model.num_labels = config.num_labels = count
    config.id2label = dict(enumerate(labels.names or ("LABEL_0",)))
    config.label2id = {name: i for i, name in config.id2label.items()}
    config.problem_type = PROBLEM[labels.task]
    say(f"head: {'new' if new else f'kept from {folder}'}, its outputs are {_text(labels)}")
    return model, labels


def _matched(folder, model, labels, fresh, flags) -> data.LabelSet:
    """The data's classes in the order of the head's outputs."""
    own, count = label_set(model), model.num_labels
    fits = count == max(1, len(labels))
    if fits and fresh is False:
        return labels
    if fits and (own.task == "regression") == (labels.task == "regression"):
        ways, numbers = [own.names], range(len(own))
        if own.names == tuple(f"LABEL_{i}" for i in numbers):
            ways.append(tuple(map(str, numbers)))
        for names in ways[::-1]:
            if flags or {*map(data.normal, names)} == {*map(data.normal, labels.names)}:
                return dataclasses.replace(labels, names=names)
    keep = ", or --no-fresh-head to keep its outputs in the order of the data's classes"
    raise ConfigError(
        f"{folder} has a head for {_text(own)}, the data are of {_text(labels)}: give --fresh-head "
        f"for a new one{keep if fits else ''}"
    )


def _text(labels) -> str:
    names = labels.names
    if not names:
        return "a number (regression)"
    more = f", ... ({len(names)} in all)" if len(names) > 10 else ""
    return f"the classes {', '.join(names[:10])}{more}"
