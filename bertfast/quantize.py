"""Models in the precisions of `bertfast.freeze`: what they cost in accuracy and bring in speed on a
text of one's own, and a folder of one."""

import copy
import math
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from . import data
from .bench.measure import aligned
from .encoder.packed import PRECISIONS, Freezable, Precision
from .files import check_folder, regular
from .freeze import freeze
from .model import BertForSequenceClassification, checkpoint
from .model.errors import unreadable
from .model.tokenizer import load_tokenizer
from .progress import Say
from .saved import check_out, is_frozen, save_frozen, sentences_class
from .train import inputs, metrics
from .train.config import METRICS, ConfigError
from .train.heads import label_set
from .train.outputs import DECISION, RUN_CONFIG
from .train.tasks.classify_inference import HEAD
from .verify import write_rest


def save(
    model: str,
    out: str,
    precision: Precision = "auto",
    texts: Sequence[str] | Mapping[str, torch.Tensor] | None = None,
    allow_pickle: bool = False,
) -> str:
    """Freezes a checkpoint and writes it to a folder, see `bertfast.save_frozen`.

    Args:
        model: folder or hub name, of sentence-transformers, transformers or bertfast; the tokenizer
            comes along.
        out: the folder; one that has the same model packed for another instruction set keeps it.
        precision: "fp32", "bf16", "int8" or "auto".
        texts: strings, for "auto" and int8's noise, see `freeze`.

    Returns: what the layers are now, "12 layers, int8".

    Raises: model.CheckpointError, OSError and what `freeze` and `save_frozen` raise.
    """
    check_folder(Path(out))
    folder = checkpoint.resolve(model)
    if Path(out).resolve() == folder.resolve():
        raise ConfigError(f"out is {out}, the folder of the model: give another")
    if is_frozen(folder):
        raise checkpoint.CheckpointError(f"{folder} is frozen: give the model that it was made of")
    network, tokenizer = _opened(folder, allow_pickle)
    if tokenizer is not None:
        network.tokenizer = tokenizer  # for texts
    check_out(Path(out), sentences=tokenizer is None)
    freeze(network, precision, texts)
    if tokenizer is not None:
        del network.tokenizer
        tokenizer.save_pretrained(out)
    save_frozen(network, out)
    for name in (RUN_CONFIG, DECISION):
        if (folder / name).is_file():
            shutil.copy(folder / name, out)
        else:
            (Path(out) / name).unlink(missing_ok=True)
    write_rest(Path(out))
    return ", ".join(str(m.packed) for m in network.modules() if isinstance(m, Freezable))


def _opened(folder: Path, allow_pickle):
    """(a model of sentence-transformers, None), or one of transformers and its tokenizer."""
    name = sentences_class(folder)
    if (folder / "modules.json").is_file():
        import sentence_transformers

        cls = getattr(sentence_transformers, str(name), None)
        if cls is None:
            raise checkpoint.CheckpointError(f"{folder} holds a {name!r}, unknown here")
        return cls(str(folder), device="cpu", local_files_only=True), None
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["AutoModel"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise checkpoint.CheckpointError(f"{folder} is a {name}, which transformers doesn't have")
    kept = {"local_files_only": True, "use_safetensors": None if allow_pickle else True}
    with unreadable(f"{folder} can't be loaded"):
        return cls.from_pretrained(folder, **kept), load_tokenizer(folder)


def report(
    model: str,
    check: str,
    *,
    precisions: Sequence[str] = PRECISIONS,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    allow_pickle: bool = False,
    say: Say = lambda text: None,
) -> dict:
    """Runs a BERT checkpoint over a table of texts, as it is stored and frozen in each precision.

    Args:
        model: folder or hub name; the head counts where it is a sequence classifier's.
        check: the table, see `data.read_table`.
        precisions: of "fp32", "bf16" and "int8".
        text_column, text_pair_column, max_length: as of `train.evaluate`.
        label_column: of a classifier's labels; None takes the run's, or "label", where the table
            has it, "" none.
        limit: rows to read, evenly spread over the table; None for all.
        say: called with a line of progress, now and then.

    Returns: {"model", "data", "task", "texts", "tokens", "batches", "batch_size", "threads",
    "warnings", "rows"}; warnings are `freeze`'s, of layers that int8 suits ill; a row for the
    checkpoint as it is ("precision": "not frozen"), the reference of all others, then one for each
    precision. "milliseconds" a batch and "speedup". "cosine" (mean), "percentile_1" and
    "least_cosine" of mean-pooled last hidden states to the reference's, and "max_error" of last
    hidden states. With a classifier "agreement", the share of texts with the same prediction
    ("max_difference" of the values for a regression), and with labels the two first metrics of
    `bertfast evaluate`. The models take turns on every batch.

    Raises: ConfigError, data.DataError, model.CheckpointError; RuntimeError without the compiled
    extension.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more")
    check = regular(check)  # it is read twice
    folder = checkpoint.resolve(model)
    checkpoint.verify(folder, allow_pickle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the head that a headless checkpoint lacks
        network = BertForSequenceClassification.from_pretrained(folder, allow_pickle=allow_pickle)
    checkpoint.check_finite(network, folder)
    headless = network.new_weights or HEAD.of_another(network.config)
    labels = None if headless else label_set(network)
    tokenizer = load_tokenizer(folder)
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    known = inputs.as_trained(folder, **columns, label_column=label_column, max_length=max_length)
    max_length = known.pop("max_length")
    if label_column is None and (
        labels is None or known["label_column"] not in data.read_table(check)
    ):
        known["label_column"] = None
    examples = _examples(check, labels, **known)
    pairs = examples.pairs is not None
    max_length = inputs.check(tokenizer, network, folder, max_length, pairs)
    if limit is not None and limit < len(examples):
        examples = examples.select(np.linspace(0, len(examples) - 1, limit).astype(int).tolist())
    labelled = labels if examples.labels is not None else None
    rows = inputs.encoded_rows(tokenizer, examples, labelled, max_length)
    inputs.warn_unknown(tokenizer, rows, pairs)
    models, found_ill = {"not frozen": network}, []
    for precision in precisions:
        with warnings.catch_warnings(record=True) as caught:  # of layers that int8 suits ill
            warnings.simplefilter("always")
            models[precision] = freeze(copy.deepcopy(network), precision)
        found_ill += [str(w.message) for w in caught]
    batches = data.batches([len(row["input_ids"]) for row in rows], batch_size)
    found = _run(models, rows, batches, tokenizer.pad_token_id, labels, say)
    return {
        "model": str(model),
        "data": str(check),
        "task": labels and labels.task,
        "texts": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "batches": len(batches),
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "warnings": found_ill,
        "rows": _rows(found, rows, labels, len(batches)),
    }


def _examples(path, labels, label_column, **columns):
    """With labels only where there are a classifier and a column of them."""
    if labels is None and label_column:
        raise ConfigError(
            f"label_column is {label_column!r}, but the model is no classifier: leave it out"
        )
    task = "single_label" if labels is None else labels.task
    examples = data.load_classification(path, label_column=label_column, **columns, task=task)
    if not len(examples):
        raise data.DataError(f"{path} has no rows")
    return examples


@torch.inference_mode()
def _run(models, rows, batches, pad, labels, say) -> dict:
    """For each model its seconds, logits, cosines [texts] and largest error."""
    n = len(rows)
    outputs = 0 if labels is None else next(iter(models.values())).num_labels
    found = {
        name: {
            "seconds": 0.0,
            "logits": np.empty((n, outputs), np.float32),
            "cosines": np.empty(n, np.float32),
            "max_error": 0.0,
        }
        for name in models
    }
    for number, batch in enumerate(batches):
        given = data.collate([rows[i] for i in batch], pad)
        given.pop("labels", None)
        if number == 0:
            for model in models.values():
                model.bert(**given)  # warms threads and buffers
        real = given["attention_mask"].unsqueeze(2)
        expected = None
        for name, model in models.items():
            start = time.perf_counter()
            out = model.bert(**given)
            logits = model.classifier(out.pooler_output) if outputs else None
            one = found[name]
            one["seconds"] += time.perf_counter() - start
            if outputs:
                one["logits"][batch] = logits.float().numpy()
            states = out.last_hidden_state.float()
            expected = states if expected is None else expected
            pooled = [(x * real).sum(1) for x in (states, expected)]
            one["cosines"][batch] = torch.cosine_similarity(*pooled)
            error = ((states - expected) * real).abs().nan_to_num(math.inf).max().item()
            one["max_error"] = max(one["max_error"], error)
        if (number + 1) % 50 == 0:
            say(f"{number + 1} of {len(batches)} batches")
    return found


def _rows(found, rows, labels, batches) -> list[dict]:
    out, reference = [], found["not frozen"]
    targets = None
    if labels is not None and "labels" in rows[0]:
        targets = np.array([row["labels"] for row in rows])
    for name, one in found.items():
        row = {
            "precision": name,
            "milliseconds": 1e3 * one["seconds"] / batches,
            "speedup": reference["seconds"] / one["seconds"],
        }
        if one is not reference:
            row |= {
                "cosine": float(one["cosines"].mean(dtype=np.float64)),
                "percentile_1": float(np.percentile(one["cosines"], 1)),
                "least_cosine": float(one["cosines"].min()),
                "max_error": one["max_error"],
            }
            if labels is not None:
                row |= _agreement(one["logits"], reference["logits"], labels.task)
        if targets is not None:
            loss = metrics.mean_loss(one["logits"], targets, labels.task)
            scores = metrics.summary(one["logits"], targets, labels.task, loss)
            row |= {key: scores[key] for key in METRICS[labels.task][:2]}
        out.append(row)
    return out


def _agreement(logits, expected, task) -> dict:
    if task == "regression":
        return {"max_difference": float(np.abs(logits - expected).max())}
    same = metrics.predicted(logits, task) == metrics.predicted(expected, task)
    return {"agreement": float((same if same.ndim == 1 else same.all(1)).mean())}


_COLUMNS = {  # key: title, format
    "precision": ("precision", "{}"),
    "milliseconds": ("ms/batch", "{:.2f}"),
    "speedup": ("speed-up", "{:.2f}x"),
    "cosine": ("cosine", "{:.6f}"),
    "percentile_1": ("1st percentile", "{:.6f}"),
    "least_cosine": ("least", "{:.6f}"),
    "max_error": ("max error", "{:.1e}"),
    "agreement": ("agreement", "{:.2%}"),
    "max_difference": ("max difference", "{:.4g}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "macro_f1": ("macro F1", "{:.4f}"),
    "micro_f1": ("micro F1", "{:.4f}"),
    "mse": ("MSE", "{:.4g}"),
    "mae": ("MAE", "{:.4g}"),
}


def table(result: dict) -> str:
    """What `report` returns, as lines of text."""
    rows = result["rows"]
    keys = [key for key in _COLUMNS if any(key in row for row in rows)]
    cells = [[_COLUMNS[key][0] for key in keys]]
    cells += [[_COLUMNS[key][1].format(row[key]) if key in row else "-" for key in keys]
              for row in rows]  # fmt: skip
    about = (
        "{texts} texts of {data}, {tokens} tokens, {batches} batches of up to {batch_size}, "
        "threads: {threads}; errors are to the model as it is stored"
    ).format(**result)
    return "\n".join([about, *aligned(cells), *result["warnings"]])
