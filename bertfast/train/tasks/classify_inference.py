"""Fine-tuned classifiers and regressors at work: `evaluate`, `predict`."""

import argparse
from collections.abc import Iterator

import numpy as np

from ... import data
from ...model import BertForSequenceClassification, checkpoint
from ...progress import Progress, Say
from .. import metrics, networks, opening
from ..config import ConfigError
from ..heads import label_set
from ..inputs import as_trained, check, encoded_rows, remembered, warn_unknown
from ..outputs import DECISION, say
from ..trained import Trained

HEAD = opening.Head("SequenceClassification", BertForSequenceClassification, "classifier", False)


def thresholds(decision: dict, labels: data.LabelSet) -> list[float] | None:
    """Of the classes, in the order of `labels`; None where 1/2 decides."""
    found = decision.get("thresholds")
    if found is None:
        return None
    good = isinstance(found, dict) and {*found} == {*labels.names}
    if not good or not all(isinstance(v, float) and 0 <= v <= 1 for v in found.values()):
        raise checkpoint.CheckpointError(
            f"{DECISION} has the thresholds {found!r:.200}, expected a probability for each of "
            f"{', '.join(labels.names)}"
        )
    return [found[name] for name in labels.names]


def scored(logits: np.ndarray, rows: list[dict], labels: data.LabelSet, decision: dict) -> dict:
    """All metrics of logits; says which are not a number."""
    targets = np.array([row["labels"] for row in rows])
    loss = metrics.mean_loss(logits, targets, labels.task)
    cut = thresholds(decision, labels)
    found = metrics.full(logits, targets, labels.task, labels.names, loss, cut)
    undefined = [k for k, v in found.items() if isinstance(v, float) and not np.isfinite(v)]
    if undefined:
        say(f"warning: no number, null in JSON: {', '.join(undefined)} (of {len(rows)} rows)")
    return found


class Classifier(Trained):
    """A fine-tuned model with its classes."""

    def __init__(
        self, model: str, allow_pickle: bool, device: str | None, precision: str | None
    ) -> None:
        super().__init__(model, HEAD, allow_pickle, device, precision)
        self.labels = label_set(self.model)
        thresholds(self.decision, self.labels)  # that they fit

    def check(self, max_length: int | None, pairs: bool) -> int:
        return check(self.tokenizer, self.model, self.folder, max_length, pairs)

    def encoded(
        self,
        examples: data.Examples,
        labels: data.LabelSet | None,
        max_length: int | None,
        warn: bool = True,
    ) -> list[dict]:
        """`encoded_rows`; `warn` of unknown tokens."""
        rows = encoded_rows(self.tokenizer, examples, labels, max_length)
        if warn:
            warn_unknown(self.tokenizer, rows, examples.pairs is not None)
        return rows

    def logits(
        self, examples: data.Examples, rows: list[dict], tokens: int = networks.EVAL_TOKENS
    ) -> np.ndarray:
        """fp32 [examples, outputs]"""
        found = self.outputs(rows, examples.place, tokens)
        return np.stack(found) if found else np.empty((0, self.model.config.num_labels), np.float32)


def evaluate(
    model: str,
    path: str,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> dict:
    """Metrics of a fine-tuned model on labelled data: accuracy, precision, recall, F1 (macro,
    micro, per class), or the errors of a regression. Columns and length that are None are those
    that it was trained with ("": no column), else "text", "label", and 512 or the model's limit. A
    label the model doesn't know is a DataError naming it and its place. `precision` is
    `bertfast.freeze`'s, on a CPU; None runs the model as it is stored, in fp32."""
    given = Classifier(model, allow_pickle, device, precision)
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    columns["label_column"] = label_column
    columns = as_trained(given.folder, **columns, max_length=max_length)
    max_length = columns.pop("max_length")
    if columns["label_column"] is None:
        raise ConfigError("label_column is none: evaluate needs the column of the labels")
    examples = data.load_classification(path, **columns, task=given.labels.task)
    if not len(examples):
        raise data.DataError(f"{path} has no rows")
    max_length = given.check(max_length, examples.pairs is not None)
    rows = given.encoded(examples, given.labels, max_length)
    return scored(given.logits(examples, rows), rows, given.labels, given.decision)


def predict(
    model: str,
    texts: list[str],
    pairs: list[str] | None = None,
    *,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> list[dict]:
    """For each text (or pair) its label and the probability of each: {"label", "probabilities"};
    "labels" for a multi-label model, "value" alone for a regression. `max_length` and `precision`
    as in `evaluate`."""
    given = Classifier(model, allow_pickle, device, precision)
    max_length = as_trained(given.folder, max_length=max_length)["max_length"]
    known = remembered(given.folder)
    if known and (known.get("text_pair_column") is None) != (pairs is None):
        kinds = ("pairs", "single texts")
        say(f"warning: given {kinds[pairs is None]}, the model was trained on {kinds[bool(pairs)]}")
    clean = lambda side: None if side is None else [data.clean_text(t) for t in side]
    max_length = given.check(max_length, pairs is not None)
    examples = data.Examples(clean(texts), clean(pairs))
    return _predicted(given, examples, given.encoded(examples, None, max_length))


def predict_table(
    model: str,
    path: str,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
    batch_tokens: int = networks.EVAL_TOKENS,
    say: Say | None = None,
) -> Iterator[dict]:
    """`predict` for the rows of a table of any size, "-" for JSON lines on standard input, in their
    order, while it is read; columns and length as in `evaluate`. `say` is called with a line of
    progress, now and then. The model is loaded and checked by the call; what is wrong with the
    table raises when its rows are asked for."""
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}, expected 1 or more")
    given = Classifier(model, allow_pickle, device, precision)
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    columns = as_trained(given.folder, **columns, max_length=max_length)
    pairs = columns["text_pair_column"] is not None
    max_length = given.check(columns.pop("max_length"), pairs)

    def encoded():
        for examples in data.read_texts(path, **columns, rows=data.ROWS):
            yield examples, given.encoded(examples, None, max_length, warn=examples.rows[0] == 1)

    def rows():
        progress = Progress(say)
        for examples, ids in data.ahead(encoded()):
            yield from _predicted(given, examples, ids, batch_tokens)
            progress.step(len(examples), examples.total)

    return rows()


def _predicted(given: Classifier, examples, rows, tokens=networks.EVAL_TOKENS) -> list[dict]:
    labels = given.labels
    logits = given.logits(examples, rows, tokens)
    if labels.task == "regression":
        return [{"value": float(v)} for v in logits[:, 0]]
    cut = thresholds(given.decision, labels)
    chosen = labels.decode(metrics.predicted(logits, labels.task, cut))
    key = "labels" if labels.task == "multi_label" else "label"
    return [
        {key: c, "probabilities": dict(zip(labels.names, map(float, p), strict=True))}
        for c, p in zip(chosen, metrics.probabilities(logits, labels.task), strict=True)
    ]


def inference_arguments(parser: argparse.ArgumentParser, labelled: bool) -> None:
    """`evaluate`'s (labelled) and `predict_table`'s settings as options."""
    text = "column of the text (default: the one trained with, or text)"
    parser.add_argument("--text-column", metavar="COLUMN", help=text)
    text = "column of a pair's second text (default: the one trained with, if any; '' for none)"
    parser.add_argument("--text-pair-column", metavar="COLUMN", help=text)
    if labelled:
        text = "column of the label (default: the one trained with, or label)"
        parser.add_argument("--label-column", metavar="COLUMN", help=text)
    text = "tokens a text is cut to (default: those trained with, or 512 or what the model takes)"
    parser.add_argument("--max-length", type=int, metavar="N", help=text)
