"""A fine-tuned classifier and the texts that an audit gives it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import data
from ..data.examples import Cells
from ..files import StrPath, regular
from ..model import checkpoint
from ..train import metrics
from ..train.inputs import as_trained
from ..train.tasks.classify_inference import Classifier


@dataclass
class Audited:
    """Of a single-label classifier: what it is given."""

    given: Classifier
    examples: data.Examples
    max_length: int

    @property
    def names(self) -> tuple[str, ...]:
        return self.given.labels.names

    def rows(self, examples: data.Examples, warn: bool = True) -> list[dict]:
        """Encoded, without labels."""
        return self.given.encoded(examples, None, self.max_length, warn)

    def probabilities(self, examples: data.Examples, rows: list[dict]) -> np.ndarray:
        """fp64 [examples, classes]"""
        return metrics.probabilities(self.given.logits(examples, rows), "single_label")


def opened(
    model: str,
    path: StrPath,
    labelled: bool,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
    **columns: Any,
) -> Audited:
    """columns: as of `train.evaluate`, and `max_length`. Raises ConfigError, CheckpointError,
    data.DataError."""
    path = regular(path)  # it may be read twice
    given = Classifier(model, allow_pickle, device, precision)
    if given.labels.task != "single_label":
        raise checkpoint.CheckpointError(
            f"{given.folder} is a model for {given.labels.task}, expected one for single_label: of "
            "a multi-label model or a regression only `bertfast evaluate` gives figures"
        )
    columns = as_trained(given.folder, **columns)
    max_length = columns.pop("max_length")
    label = columns.pop("label_column", None)
    examples = data.load_classification(path, **columns, label_column=label if labelled else None)
    if not len(examples):
        raise data.DataError(f"{path} has no rows")
    max_length = given.check(max_length, examples.pairs is not None)
    return Audited(given, examples, max_length)


def column(path: StrPath, name: str, parse: Callable[[Any], Any]) -> list:
    """A column's cells, parsed; DataError names the row of a bad one."""
    return Cells(path, data.read_table(path, [name])).parse(name, parse)
