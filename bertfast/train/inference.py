"""Fine-tuned classifiers and regressors at work: logits, `evaluate`, `predict`."""

import warnings
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from .. import data
from ..freeze import freeze
from ..model import BertForSequenceClassification, checkpoint
from ..model.tokenizer import load_tokenizer
from ..progress import Progress
from ..saved import MANIFEST, load_frozen
from . import metrics
from .config import ConfigError
from .inputs import as_trained, check, encoded_rows, remembered, warn_unknown
from .outputs import say

PROBLEM = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
EVAL_BATCH = 64


def compute_logits(model, rows, pad: int, batch_size: int = EVAL_BATCH) -> np.ndarray:
    """fp32 [n, outputs] of encoded rows, in their order; computed in order of length."""
    out, taken = None, signature(model.forward).parameters
    with torch.no_grad():
        for batch in data.batches([len(r["input_ids"]) for r in rows], batch_size):
            tensors = data.collate([rows[i] for i in batch], pad)
            tensors.pop("labels", None)
            tensors = {name: t.to(model.device) for name, t in tensors.items() if name in taken}
            logits = model(**tensors).logits.float().cpu().numpy()
            if out is None:
                out = np.empty((len(rows), logits.shape[1]), np.float32)
            out[batch] = logits
    return np.empty((0, model.num_labels), np.float32) if out is None else out


def mean_loss(logits, targets, task) -> float:
    logits, targets = torch.from_numpy(logits), torch.from_numpy(targets)
    if task == "regression":
        return F.mse_loss(logits[:, 0], targets.float()).item()
    if task == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, targets.float()).item()
    return F.cross_entropy(logits, targets).item()


def choose_device(name) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; use cpu")
    return torch.device(name)


def scored(logits, rows, labels) -> dict:
    """All metrics of logits; says which are not a number."""
    targets = np.array([row["labels"] for row in rows])
    loss = mean_loss(logits, targets, labels.task)
    found = metrics.full(logits, targets, labels.task, labels.names, loss)
    undefined = [k for k, v in found.items() if isinstance(v, float) and not np.isfinite(v)]
    if undefined:
        say(f"warning: no number, null in JSON: {', '.join(undefined)} (of {len(rows)} rows)")
    return found


def label_set(model) -> data.LabelSet:
    """The task and class names that a classifier's configuration says."""
    problem = (
        model.config.problem_type
        or PROBLEM["single_label" if model.num_labels > 1 else "regression"]
    )
    task = next(t for t, p in PROBLEM.items() if p == problem)
    names = range(0 if task == "regression" else model.num_labels)
    return data.LabelSet(tuple(str(model.config.id2label[i]) for i in names), task)


def other_task(config) -> str | None:
    """The models that a checkpoint's head is of, where those are no sequence classifier: its
    weights may have a classifier's names all the same."""
    names = config.architectures or ()
    own = not names or any(name.endswith("ForSequenceClassification") for name in names)
    return None if own else ", ".join(names)


class Trained(NamedTuple):
    """A fine-tuned checkpoint."""

    model: BertForSequenceClassification
    tokenizer: object
    labels: data.LabelSet
    folder: Path

    def check(self, max_length, pairs: bool) -> int:
        return check(self.tokenizer, self.model, self.folder, max_length, pairs)

    def encoded(self, examples, labels, max_length, warn=True):
        """`encoded_rows`; `warn` of unknown tokens."""
        rows = encoded_rows(self.tokenizer, examples, labels, max_length)
        if warn:
            warn_unknown(self.tokenizer, rows, examples.pairs is not None)
        return rows

    def logits(self, examples, rows, batch_size=EVAL_BATCH):
        found = compute_logits(self.model, rows, self.tokenizer.pad_token_id, batch_size)
        bad = np.flatnonzero(~np.isfinite(found).all(1))
        if len(bad):
            raise checkpoint.CheckpointError(
                f"{self.folder} gives numbers that are not finite for {len(bad)} of {len(rows)} "
                f"texts, the first in {examples.place(bad[0])}: look for NaN in its weights"
            )
        return found


def trained(model_folder, allow_pickle, device, precision=None) -> Trained:
    if precision is not None:
        if device == "cuda":
            raise ConfigError(f"precision {precision} is for a CPU, device is 'cuda'; drop one")
        device = "cpu"
    folder = checkpoint.resolve(model_folder)
    if (folder / MANIFEST).is_file():
        model = _frozen(folder, device, precision)
        return Trained(model, load_tokenizer(folder), label_set(model), folder)
    checkpoint.verify(folder, allow_pickle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a classifier that had to be made up predicts nothing
        try:
            model = BertForSequenceClassification.from_pretrained(folder, allow_pickle=allow_pickle)
        except UserWarning as e:
            raise checkpoint.CheckpointError(f"{folder} is no fine-tuned classifier: {e}") from None
    if other_task(model.config):
        raise checkpoint.CheckpointError(
            f"{folder} is no fine-tuned classifier, but a {other_task(model.config)}"
        )
    checkpoint.check_finite(model, folder)
    if precision is not None:
        freeze(model, precision)
    model = model.to(choose_device(device))
    return Trained(model, load_tokenizer(folder), label_set(model), folder)


def _frozen(folder, device, precision):
    """What `save_frozen` wrote."""
    if precision is not None:
        raise ConfigError(f"precision is {precision!r}, but {folder} is frozen: leave it out")
    if device == "cuda":
        raise ConfigError(f"device is 'cuda', but {folder} is frozen for a CPU: leave it out")
    model = load_frozen(folder)
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise checkpoint.CheckpointError(
            f"{folder} is a frozen {type(model).__name__}, no fine-tuned classifier"
        )
    return model


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
    given = trained(model, allow_pickle, device, precision)
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
    return scored(given.logits(examples, rows), rows, given.labels)


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
    given = trained(model, allow_pickle, device, precision)
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
    batch_size: int = EVAL_BATCH,
    say=None,
) -> Iterator[dict]:
    """`predict` for the rows of a table of any size, "-" for JSON lines on standard input, in their
    order, while it is read; columns and length as in `evaluate`. `say` is called with a line of
    progress, now and then. The model is loaded and checked by the call; what is wrong with the
    table raises when its rows are asked for."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected 1 or more")
    given = trained(model, allow_pickle, device, precision)
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    columns = as_trained(given.folder, **columns, max_length=max_length)
    pairs = columns["text_pair_column"] is not None
    max_length = given.check(columns.pop("max_length"), pairs)

    def encoded():
        limits = {"rows": max(data.ROWS, batch_size)}
        for examples in data.read_texts(path, **columns, **limits):
            yield examples, given.encoded(examples, None, max_length, warn=examples.rows[0] == 1)

    def rows():
        progress = Progress(say)
        for examples, ids in data.ahead(encoded()):
            yield from _predicted(given, examples, ids, batch_size)
            progress.step(len(examples), examples.total)

    return rows()


def _predicted(given: Trained, examples, rows, batch_size=EVAL_BATCH) -> list[dict]:
    labels = given.labels
    logits = given.logits(examples, rows, batch_size)
    if labels.task == "regression":
        return [{"value": float(v)} for v in logits[:, 0]]
    chosen = labels.decode(metrics.predicted(logits, labels.task))
    key = "labels" if labels.task == "multi_label" else "label"
    return [
        {key: c, "probabilities": dict(zip(labels.names, map(float, p), strict=True))}
        for c, p in zip(chosen, metrics.probabilities(logits, labels.task), strict=True)
    ]
