"""Fine-tuned classifiers and regressors at work: logits, `evaluate`, `predict`."""

import warnings

import numpy as np
import torch
from torch.nn import functional as F

from .. import data
from ..freeze import freeze
from ..model import BertForSequenceClassification, checkpoint
from ..model.tokenizer import load_tokenizer
from . import metrics
from .config import ConfigError

PROBLEM = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
EVAL_BATCH = 64


def compute_logits(model, rows, pad: int, batch_size: int = EVAL_BATCH) -> np.ndarray:
    """fp32 [n, outputs] of encoded rows, in their order; computed in order of length."""
    out = None
    with torch.no_grad():
        for batch in data.batches([len(r["input_ids"]) for r in rows], batch_size):
            tensors = data.collate([rows[i] for i in batch], pad)
            tensors.pop("labels", None)
            tensors = {name: t.to(model.device) for name, t in tensors.items()}
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


def encoded_rows(tokenizer, examples, labels, max_length):
    rows = data.encode(tokenizer, examples.texts, examples.pairs, max_length)
    if labels is not None:
        for row, target in zip(rows, labels.encode(examples), strict=True):
            row["labels"] = target
    return rows


def choose_device(name) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; use cpu")
    return torch.device(name)


def evaluated(model, rows, labels, tokenizer):
    logits = compute_logits(model, rows, tokenizer.pad_token_id)
    targets = np.array([row["labels"] for row in rows])
    loss = mean_loss(logits, targets, labels.task)
    return logits, metrics.full(logits, targets, labels.task, labels.names, loss)


def label_set(model) -> data.LabelSet:
    """The task and class names that a classifier's configuration says."""
    problem = (
        model.config.problem_type
        or PROBLEM["single_label" if model.num_labels > 1 else "regression"]
    )
    task = next(t for t, p in PROBLEM.items() if p == problem)
    names = range(0 if task == "regression" else model.num_labels)
    return data.LabelSet(tuple(model.config.id2label[i] for i in names), task)


def trained(model_folder, allow_pickle, device, precision=None):
    """(model, tokenizer, labels) of a fine-tuned checkpoint."""
    if precision is not None:
        if device == "cuda":
            raise ConfigError(f"precision {precision} is for a CPU, device is 'cuda'; drop one")
        device = "cpu"
    folder = checkpoint.resolve(model_folder)
    checkpoint.verify(folder, allow_pickle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a classifier that had to be made up predicts nothing
        try:
            model = BertForSequenceClassification.from_pretrained(folder, allow_pickle=allow_pickle)
        except UserWarning as e:
            raise checkpoint.CheckpointError(f"{folder} is no fine-tuned classifier: {e}") from None
    checkpoint.check_finite(model, folder)
    if precision is not None:
        freeze(model, precision)
    return model.to(choose_device(device)), load_tokenizer(folder), label_set(model)


def longest(model, max_length: int | None) -> int:
    """Tokens a text is cut to: what is asked for, or 512, and what the model takes."""
    return min(max_length or 512, model.config.max_position_embeddings)


def evaluate(
    model: str,
    path: str,
    *,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> dict:
    """Metrics of a fine-tuned model on labelled data: accuracy, precision, recall, F1 (macro,
    micro, per class), or the errors of a regression. A label the model doesn't know is a
    DataError naming it and its row. `precision` is `bertfast.freeze`'s, on a CPU; None runs the
    model as it is stored, in fp32."""
    network, tokenizer, labels = trained(model, allow_pickle, device, precision)
    examples = data.load_classification(
        path, text_column, text_pair_column, label_column, labels.task
    )
    if not len(examples):
        raise data.DataError(f"{path} has no rows")
    rows = encoded_rows(tokenizer, examples, labels, longest(network, max_length))
    return evaluated(network, rows, labels, tokenizer)[1]


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
    "labels" for a multi-label model, "value" alone for a regression. `precision` as in
    `evaluate`."""
    network, tokenizer, labels = trained(model, allow_pickle, device, precision)
    texts = [data.clean_text(t) for t in texts]
    pairs = None if pairs is None else [data.clean_text(t) for t in pairs]
    rows = data.encode(tokenizer, texts, pairs, longest(network, max_length))
    logits = compute_logits(network, rows, tokenizer.pad_token_id)
    if labels.task == "regression":
        return [{"value": float(v)} for v in logits[:, 0]]
    chosen = labels.decode(metrics.predicted(logits, labels.task))
    key = "labels" if labels.task == "multi_label" else "label"
    return [
        {key: c, "probabilities": dict(zip(labels.names, map(float, p), strict=True))}
        for c, p in zip(chosen, metrics.probabilities(logits, labels.task), strict=True)
    ]
