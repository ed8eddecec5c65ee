"""`explain` and `explain_table`."""

from dataclasses import asdict
from itertools import islice
from typing import Any

from .. import data
from ..data.errors import ConfigError, DataError
from ..files import json_text
from ..progress import Progress, Say
from ..train import outputs
from ..train.inputs import as_trained
from .explainer import Explainer
from .page import page
from .sanity import randomisation
from .settings import Settings


def explain(
    model: str,
    texts: list[str],
    pairs: list[str] | None = None,
    *,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
    **settings: Any,
) -> list[dict]:
    """What the decision for each text (or pair) rests on.

    Args:
        model: folder or hub name of a fine-tuned classifier or regressor, of any family.
        max_length: tokens a text is cut to; None: as trained, or 512 or what the model takes.
        precision: of `bertfast.freeze`, on a CPU, for occlusion alone.
        settings: `Settings`' fields.

    Returns: for each text {"row", "text", "pair" (of pairs), "predicted", "target", "probability"
    (of the target; of a regression "value" alone), "tokens", "unread_words" (cut off, or nothing to
    the tokenizer), "words": [{"text", "start", "end": characters of the raw text, "side": 1 in a
    pair's second text, "scores": {method: number, None of an unread word}}, ...], "methods":
    {method: what is to be said of it: "steps", "logit", "baseline_logit", "completeness_error",
    "complete"; "rest", the score of tokens that are of no word}}.

    Raises: ConfigError, DataError, CheckpointError; RuntimeError where captum is needed and not
    installed.
    """
    given = Explainer(model, _settings(settings), allow_pickle, device, precision)
    max_length = as_trained(given.folder, max_length=max_length)["max_length"]
    max_length = given.check(max_length, pairs is not None)
    examples = data.Examples(list(texts), None if pairs is None else list(pairs))
    return given.explained(examples, max_length)


def _settings(given: dict) -> Settings:
    methods = given.get("methods", Settings.methods)
    return Settings(**given | {"methods": tuple(methods)})


def explain_table(
    model: str,
    path: str,
    out: str | None = None,
    json: str | None = None,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    sanity: bool = False,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
    say: Say | None = None,
    **settings: Any,
) -> dict:
    """`explain` for the rows of a table ("-": JSON lines on standard input).

    Args:
        out: file for the page of HTML.
        json: file for JSON lines, "-" for stdout, as they come.
        text_column, text_pair_column: None: those trained with, else "text", and none.
        limit: explain the first rows alone.
        sanity: compare with the same model with random weights: `sanity.randomisation`.
        say: called with lines of progress, and with what is short.

    Returns: {"model", "settings", "texts", "left_out" (rows behind the limit), "cut_texts" (with
    words that the model doesn't read), "methods": {method: {"complete": texts, "largest_error",
    "mean_steps"}}, "sanity"}.
    """
    say = say or (lambda text: None)
    if not out and not json:
        raise ConfigError("give --out FILE for a page, --json FILE for JSON lines, or both")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected 1 or more")
    if out == "-":
        raise ConfigError("out is '-': a page goes into a file; --json - writes to stdout")
    for file in (out, json):
        outputs.check_result(file, path, model)
    given = Explainer(model, _settings(settings), allow_pickle, device, precision)
    if sanity and not given.trainable:
        raise ConfigError("sanity compares with random weights, and packed ones can't be: leave it")
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    columns = as_trained(given.folder, **columns, max_length=max_length)
    pairs = columns["text_pair_column"] is not None
    max_length = given.check(columns.pop("max_length"), pairs)
    examples = data.load_classification(path, **columns, label_column=None, clean=False)
    if not len(examples):
        raise DataError(f"{path} has no rows")
    left_out = max(0, len(examples) - (limit or len(examples)))
    examples = examples.select(range(len(examples) - left_out))
    results, progress = [], Progress(say)

    def rows():
        for chunk in given.chunks(examples, max_length):
            results.extend(chunk)
            yield from map(json_text, chunk)
            progress.step(len(chunk), len(examples))

    if json:
        outputs.write_lines(json, rows())
    else:
        any(False for _ in rows())
    about = {"model": str(model), "settings": asdict(given.settings) | {"max_length": max_length}}
    about |= {"classes": list(given.labels.names), "texts": len(results), "left_out": left_out}
    about |= summary(results, given.settings)
    if sanity:
        about["sanity"] = randomisation(given, examples, results, max_length)
    _complain(about, results, say)
    if out:
        outputs.write_text(out, page(results, about))
    return about


def summary(results: list[dict], settings: Settings) -> dict:
    """Of all texts: how many were cut, and how integrated gradients did."""
    found = {method: {} for method in settings.methods}
    own = [r["methods"].get("integrated_gradients", {}) for r in results]
    if own and own[0]:
        found["integrated_gradients"] = {
            "complete": sum(one["complete"] for one in own),
            "largest_error": max(one["completeness_error"] for one in own),
            "mean_steps": sum(one["steps"] for one in own) / len(own),
        }
    return {"cut_texts": sum(r["unread_words"] > 0 for r in results), "methods": found}


def _complain(about, results, say):
    cut = [r["row"] for r in results if r["unread_words"]]
    if cut:
        say(
            f"warning: {len(cut)} of {len(results)} texts have words that the model doesn't read, "
            f"most of them behind the cut at {about['settings']['max_length']} tokens; they have "
            f"no score: rows {_some(cut)}"
        )
    bad = [r["row"] for r in results
           if not r["methods"].get("integrated_gradients", {}).get("complete", True)]  # fmt: skip
    if bad:
        say(
            f"warning: of {len(bad)} of {len(results)} texts integrated gradients miss the "
            f"output's change by more than 1 % after {about['settings']['max_steps']} steps; "
            f"raise --max-steps: rows {_some(bad)}"
        )
    if about["left_out"]:
        say(f"note: {about['left_out']:,} rows behind the limit are not explained")


def _some(rows) -> str:
    return ", ".join(map(str, islice(rows, 5))) + ", ..." * (len(rows) > 5)
