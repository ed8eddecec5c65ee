"""Fine-tuned scores of pairs at work: `evaluate`, `predict`."""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from ... import data
from ...model import checkpoint
from ...progress import Progress, Say
from .. import networks, ranking
from ..config import ConfigError
from ..inputs import as_trained, check, warn_unknown
from ..outputs import say
from ..trained import Trained
from .classify_inference import HEAD

GOALS = {  # and what may pick the best evaluation
    "similarity": ("spearman", "pearson", "mse", "loss"),
    "ranking": ("mrr@10", "ndcg@10", "map", "loss"),
}
COLUMNS = {"similarity": ("text", "text_pair"), "ranking": ("query", "document")}


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -500, 500)))


def figures(logits: np.ndarray, examples: data.Examples, goal: str) -> dict:
    """Metrics of outputs [n] for labelled pairs; says which are not a number."""
    labels = np.asarray(examples.labels, np.float64)
    if not np.isfinite(logits).all():
        return dict.fromkeys(GOALS[goal], float("nan"))
    if goal == "similarity":
        found = ranking.agreement(logits, labels)
        return {"loss": found["mse"]} | found | {"pairs": len(labels)}
    p, target = sigmoid(logits), labels / max(labels.max(), 1e-30)
    tiny = np.finfo(np.float64).tiny
    loss = -(target * np.log(p + tiny) + (1 - target) * np.log(1 - p + tiny)).mean()
    own = ranking.of_queries(logits, labels, examples.groups())
    return {"loss": float(loss)} | own | {"pairs": len(labels)}


class Scorer(Trained):
    """A fine-tuned model of one number for a pair, with its goal and columns."""

    def __init__(
        self,
        model: str,
        goal: str | None,
        columns: Any,
        max_length: int | None,
        allow_pickle: bool,
        device: str | None,
        precision: str | None,
    ) -> None:
        super().__init__(model, HEAD, allow_pickle, device, precision)
        if self.model.config.num_labels != 1:
            raise checkpoint.CheckpointError(
                f"{self.folder} has {self.model.config.num_labels} outputs, expected one for a "
                "pair: is it a classifier? (evaluate classify)"
            )
        known = as_trained(self.folder, "pairs", goal=goal, max_length=max_length)
        self.goal = known["goal"]
        if self.goal not in GOALS:
            raise ConfigError(f"goal is {self.goal!r}, expected one of {', '.join(GOALS)}")
        own = as_trained(self.folder, "pairs", **columns)
        first, second = COLUMNS[self.goal]
        self.columns = own["text_column"] or first, own["text_pair_column"] or second
        self.label_column = own.get("label_column")
        length = known["max_length"]
        self.max_length = check(self.tokenizer, self.model, self.folder, length, True)

    def scores(self, examples: data.Examples, tokens: int = networks.EVAL_TOKENS) -> np.ndarray:
        """The outputs of pairs, fp32 [n]."""
        pairs = examples.texts, examples.pairs
        rows = data.encode(self.tokenizer, *pairs, self.max_length)
        if not examples.rows or examples.rows[0] == 1:
            warn_unknown(self.tokenizer, rows, True)
        found = self.outputs(rows, examples.place, tokens)
        return np.stack(found)[:, 0] if found else np.empty(0, np.float32)

    def made(self, logits: np.ndarray) -> np.ndarray:
        """Scores as a CrossEncoder gives them."""
        return logits if self.goal == "similarity" else sigmoid(logits)


def evaluate(
    model: str,
    path: str,
    *,
    goal: str | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> dict:
    """Metrics of a model on labelled pairs: Spearman's and Pearson's correlation and mse, or for
    ranking MRR@10, nDCG@10 and MAP over the queries that have a relevant document. What is None is
    as it was trained with, else similarity, and the columns of `finetune pairs`. Raises
    ConfigError, data.DataError, model.CheckpointError."""
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    columns["label_column"] = label_column
    given = Scorer(model, goal, columns, max_length, allow_pickle, device, precision)
    if given.label_column is None:
        raise ConfigError("label_column is none: evaluate needs the column of the labels")
    columns = (*given.columns, given.label_column)
    if given.goal == "ranking":
        examples = data.load_candidates(path, *columns)
    else:
        examples = data.load_classification(path, *columns, task="regression")
    if not len(examples):
        raise data.DataError(f"{path} has no rows")
    found = figures(given.scores(examples), examples, given.goal)
    undefined = [k for k, v in found.items() if isinstance(v, float) and not np.isfinite(v)]
    if undefined:
        say(f"warning: no number, null in JSON: {', '.join(undefined)} (of {len(examples)} pairs)")
    return found


def predict(
    model: str,
    pairs: list[tuple[str, str]],
    *,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> list[float]:
    """The score of each pair, as a CrossEncoder of sentence-transformers gives it."""
    columns = dict.fromkeys(("text_column", "text_pair_column"))
    given = Scorer(model, None, columns, max_length, allow_pickle, device, precision)
    sides = [[data.clean_text(text) for text in side] for side in zip(*pairs, strict=True)]
    examples = data.Examples(*(sides or ([], [])), task="regression")
    return [float(score) for score in given.made(given.scores(examples))]


def predict_table(
    model: str,
    path: str,
    *,
    goal: str | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
    batch_tokens: int = networks.EVAL_TOKENS,
    say: Say | None = None,
) -> Iterator[dict]:
    """For each row of a table, "-" for JSON lines on standard input, {"score"}; for a query with a
    list of documents {"ranking": [{"document": its place in the list, from 0, "score"}, ...]}, the
    best first. Raises as `evaluate`; what is wrong with the table when its rows are asked for."""
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}, expected 1 or more")
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    given = Scorer(model, goal, columns, max_length, allow_pickle, device, precision)
    if given.goal == "ranking":
        parts = data.read_candidates(path, *given.columns, rows=data.ROWS)
    else:
        parts = data.read_texts(path, *given.columns, rows=data.ROWS)

    def rows():
        progress = Progress(say)
        for examples in parts:
            scores = given.made(given.scores(examples, batch_tokens)).tolist()
            if not getattr(examples, "listed", False):
                yield from ({"score": score} for score in scores)
            else:
                yield from _rankings(scores, examples.rows)
            progress.step(len(examples), examples.total)

    return rows()


def _rankings(scores, rows):
    """A ranking for each row of the table, in their order."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 1))
    for own in np.split(np.asarray(scores), starts[1:]):
        order = ranking.ranked(own)
        yield {"ranking": [{"document": int(i), "score": float(own[i])} for i in order]}


def inference_arguments(parser: argparse.ArgumentParser, labelled: bool) -> None:
    """`evaluate`'s (labelled) and `predict_table`'s settings as options."""
    text = "similarity or ranking (default: the one trained with, or similarity)"
    parser.add_argument("--goal", choices=GOALS, help=text)
    text = "column of the first text (default: the one trained with, or text; query)"
    parser.add_argument("--text-column", metavar="COLUMN", help=text)
    text = "column of the second text (default: the one trained with, or text_pair; document)"
    parser.add_argument("--text-pair-column", metavar="COLUMN", help=text)
    if labelled:
        text = "column of the label (default: the one trained with, or label)"
        parser.add_argument("--label-column", metavar="COLUMN", help=text)
    text = "tokens a pair is cut to (default: those trained with, or 512 or what the model takes)"
    parser.add_argument("--max-length", type=int, metavar="N", help=text)
