"""Fine-tuned taggers at work: `evaluate`, `predict`."""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from ... import data
from ...data.aligned import align, warn_silent
from ...data.conll import is_conll
from ...data.tagged import Tagged, load_tagged, read_tagged
from ...data.text_spans import split_words
from ...files import StrPath
from ...model import checkpoint
from ...model.token_heads import BertForTokenClassification
from ...progress import Progress, Say
from .. import networks, opening
from ..config import ConfigError
from ..entities import STRATEGIES, scored_entities
from ..inputs import as_trained, check
from ..outputs import DECISION
from ..outputs import say as tell
from ..trained import Trained
from .tokens_words import Encoded, Tags, encoded, scored, words_tagged

HEAD = opening.Head("TokenClassification", BertForTokenClassification, "classifier", True)
COLUMNS = ("tokens_column", "text_column", "tags_column", "entities_column")


def stride_of(stride: int | None, max_length: int) -> int:
    """Tokens that neighbouring windows share, where None is given."""
    return max_length // 4 if stride is None else stride


def columns_of(path: StrPath, names: dict) -> dict:
    """Names of columns for a reader of `path`: CoNLL has none, whatever other files have."""
    return {} if is_conll(path) else {name: column for name, column in names.items() if column}


def _forms(decision: dict) -> frozenset[str]:
    """Words that texts are not to be split within, as `finetune` found them."""
    found = decision.get("forms", [])
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise checkpoint.CheckpointError(
            f"{DECISION} has the forms {found!r:.200}, expected a list of words"
        )
    return frozenset(found)


def check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")


class Tagger(Trained):
    """A fine-tuned model, and how it reads its rows: as it was trained, where None is given."""

    def __init__(
        self,
        model: str,
        allow_pickle: bool,
        device: str | None,
        precision: str | None,
        **given: Any,
    ) -> None:
        super().__init__(model, HEAD, allow_pickle, device, precision)
        config = self.model.config
        self.tags = Tags(str(config.id2label[i]) for i in range(self.model.num_labels))
        how = as_trained(self.folder, "tokens", **given)
        self.columns = {name: how.pop(name) for name in COLUMNS if name in how}
        length, stride = how.pop("max_length"), how.pop("stride")
        self.max_length = check(self.tokenizer, self.model, self.folder, length, pairs=False)
        self.stride = stride_of(stride, self.max_length)
        self.strategy, self.spaced = how.pop("strategy"), how.pop("spaced")
        check_strategy(self.strategy)
        self.forms = _forms(self.decision)
        self.every = self.strategy != "first"

    def encode(self, examples: Tagged, labelled: bool = False, warn: bool = True) -> Encoded:
        """`warn` of what the tokenizer doesn't know."""
        sizes = {"max_length": self.max_length, "stride": self.stride, "spaced": self.spaced}
        aligned = align(self.tokenizer, examples, **sizes)
        tags = self.tags.encode(examples) if labelled else None
        out = encoded(aligned, self.every, tags)
        if silent := warn_silent(aligned, examples):
            tell(f"warning: {silent}")
        share = data.unknown_share(self.tokenizer, out.rows, False) if warn else 0
        if share > data.UNKNOWN:
            tell(f"warning: {data.unknown_text(share)}")
        return out

    def logits(
        self, examples: Tagged, given: Encoded, tokens: int = networks.EVAL_TOKENS
    ) -> list[np.ndarray]:
        return self.outputs(given.rows, lambda row: given.place(examples, row), tokens)

    def predicted(
        self, examples: Tagged, given: Encoded, tokens: int = networks.EVAL_TOKENS
    ) -> Iterator[Any]:
        """What `predict` gives, row by row."""
        found = self.logits(examples, given, tokens)
        how = self.tags, self.strategy, self.every
        for i, (tags, scores) in enumerate(words_tagged(given, found, examples, *how)):
            yield self.told(examples, i, tags, scores)

    def told(self, examples: Tagged, i: int, tags: list[str], scores: np.ndarray) -> dict:
        words = {"tags": tags} if examples.texts is None or self.tags.plain else {}
        if self.tags.plain:
            return {"words": examples.words[i]} | words | {"scores": [float(s) for s in scores]}
        text, spans, found = examples.text(i), examples.spans(i), []
        for entity, score in scored_entities(tags, scores):
            start, end = spans[entity.start][0], spans[entity.end - 1][1]
            own = {"text": text[start:end], "label": entity.label, "start": start, "end": end}
            if examples.texts is None:
                own |= {"start_word": entity.start, "end_word": entity.end}
            found.append(own | {"score": score})
        return {"entities": found} | words


def evaluate(
    model: str,
    path: str,
    *,
    tokens_column: str | None = None,
    tags_column: str | None = None,
    text_column: str | None = None,
    entities_column: str | None = None,
    scheme: str | None = None,
    strategy: str | None = None,
    spaced: bool | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> dict:
    """Metrics of a fine-tuned model on tagged words or texts with entities: precision, recall and
    F1 of whole entities (micro, macro, weighted, per type) as seqeval's, partial matches as
    nervaluate's, accuracy and figures of each tag word by word. `scheme` is of the file's tags
    alone; the other settings that are None are those that the model was trained with. A tag that it
    doesn't know is a DataError naming it and its place. `precision` is `bertfast.freeze`'s, on a
    CPU; None runs the model as it is stored, in fp32."""
    given = Tagger(
        *(model, allow_pickle, device, precision),
        **{"tokens_column": tokens_column, "tags_column": tags_column},
        **{"text_column": text_column, "entities_column": entities_column},
        **{"strategy": strategy, "spaced": spaced, "max_length": max_length, "stride": stride},
    )
    examples = load_tagged(path, scheme, given.forms, **columns_of(path, given.columns))
    if examples.plain != given.tags.plain:
        kinds = ("entities", "plain tags")
        raise data.DataError(
            f"{path} has {kinds[examples.plain]}, {given.folder} was trained on "
            f"{kinds[given.tags.plain]} ({', '.join(given.tags.names)}): give it data of its kind"
        )
    rows = given.encode(examples, labelled=True)
    found = given.logits(examples, rows)
    return scored(rows, found, examples, given.tags, given.strategy, given.every)


def predict(
    model: str,
    texts: list,
    *,
    strategy: str | None = None,
    spaced: bool | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> list[dict]:
    """For each text, or list of words, its entities: {"entities": [{"text", "label", "start",
    "end", "score"}]}, in characters (Unicode code points) of the text as given, the end not
    included; a score is the mean of the words'. Of words also each word's tag in "tags", and of
    entities "start_word" and "end_word"; their characters are of the words with spaces between.
    A model of plain tags gives {"words", "tags", "scores"}. Settings as in `evaluate`."""
    how = {"strategy": strategy, "spaced": spaced, "max_length": max_length, "stride": stride}
    given = Tagger(model, allow_pickle, device, precision, **how)
    words = [isinstance(text, str) for text in texts]
    if any(words) and not all(words):
        raise data.DataError("texts are strings and lists of words; give one kind")
    if all(words):
        split = [[t[a:b] for a, b in split_words(t, given.forms)] for t in texts]
        examples = Tagged(split, None, list(texts), forms=given.forms)
    else:
        examples = Tagged([list(row) for row in texts])
    return list(given.predicted(examples, given.encode(examples)))


def predict_table(
    model: str,
    path: str,
    *,
    tokens_column: str | None = None,
    text_column: str | None = None,
    strategy: str | None = None,
    spaced: bool | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
    batch_tokens: int = networks.EVAL_TOKENS,
    say: Say | None = None,
) -> Iterator[dict]:
    """`predict` for the rows of a file of any size, CoNLL or a table, "-" for JSON lines on
    standard input, in their order, while it is read. `say` is called with a line of progress, now
    and then. The model is loaded and checked by the call; what is wrong with the file raises when
    its rows are asked for."""
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}, expected 1 or more")
    given = Tagger(
        *(model, allow_pickle, device, precision),
        **{"tokens_column": tokens_column, "text_column": text_column, "strategy": strategy},
        **{"spaced": spaced, "max_length": max_length, "stride": stride},
    )

    def read():
        for examples in read_tagged(path, forms=given.forms, **columns_of(path, given.columns)):
            yield examples, given.encode(examples, warn=examples.rows[0] == 1)

    def rows():
        progress = Progress(say)
        for examples, own in data.ahead(read()):
            yield from given.predicted(examples, own, batch_tokens)
            progress.step(len(examples), examples.total)

    return rows()


def inference_arguments(parser: argparse.ArgumentParser, labelled: bool) -> None:
    """`evaluate`'s (labelled) and `predict_table`'s settings as options."""
    import argparse

    trained = "(default: as trained)"
    names = [("tokens", "words"), ("text", "texts")]
    if labelled:
        names[1:1] = [("tags", "words' tags")]
        names.append(("entities", "texts' entities"))
        text = "iob1, iob2, bioes, bilou or plain, where the tags don't say"
        parser.add_argument("--scheme", help=text)
    for name, of in names:
        text = f"column of the {of} {trained}"
        parser.add_argument(f"--{name}-column", metavar="COLUMN", help=text)
    text = f"what of a word's sub-words decides {trained}"
    parser.add_argument("--strategy", choices=STRATEGIES, help=text)
    text = f"read words apart, with a space between {trained}"
    parser.add_argument("--spaced", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = f"tokens of a window {trained}"
    parser.add_argument("--max-length", type=int, metavar="N", help=text)
    text = f"tokens that neighbouring windows share {trained}"
    parser.add_argument("--stride", type=int, metavar="N", help=text)
