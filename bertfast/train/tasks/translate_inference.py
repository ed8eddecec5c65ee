"""Translating models at work: `evaluate`, `predict`, and what both and training make of texts."""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers.models import WordPiece
from torch import nn

from ... import data
from ...files import StrPath
from ...freeze import freeze
from ...model import BertEncoderDecoder, checkpoint
from ...model.tokenizer import load_tokenizer
from ...progress import Progress, Say
from .. import networks
from ..config import ConfigError
from ..inputs import as_trained
from ..outputs import say
from ..packed_pairs import Pairs
from .base import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ROWS = 256  # beams of sources that are decoded side by side
_INSIDE = re.compile(r"(?<=\w) (['\u2019\-]) (?=\w)|(?<=\d) ([.,:]) (?=\d)")
_BEFORE, _BEHIND = re.compile(r" ([.,)\]}\u2026])"), re.compile(r"([(\[{]) ")


class Search(NamedTuple):
    """How targets are found; see `BertEncoderDecoder.decode`."""

    num_beams: int
    length_penalty: float
    max_length: int  # tokens of a target

    def check(self, model: BertEncoderDecoder) -> "Search":
        """Raises ConfigError for what the model can't do."""
        limit = model.config.decoder.max_position_embeddings
        for name, good, expected in (
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("max_length", 3 <= self.max_length <= limit, f"3 to {limit}, which the model takes"),
        ):
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {expected}")
        return self


def _backend(tokenizer):
    """The tokenizers library's; None where Python does its work."""
    return getattr(tokenizer, "backend_tokenizer", None)


def text_of(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Token ids as text. WordPiece's words are put together as they are written: "l ' arbre ." is
    "l'arbre.", "2 . 5" is "2.5"; what they can't tell, a hyphen between spaces, say, is taken for
    the commoner case."""
    if not isinstance(getattr(_backend(tokenizer), "model", None), WordPiece):
        return tokenizer.decode(ids, skip_special_tokens=True)
    pieces = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
    pieces = [piece for piece in pieces if piece is not None]  # of rows that no word has
    text = _INSIDE.sub(lambda m: m[1] or m[2], " ".join(pieces).replace(" ##", ""))
    return _BEHIND.sub(r"\1", _BEFORE.sub(r"\1", text))


def encode_sources(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int | None
) -> tuple[list[dict], list[bool]]:
    """Rows of `input_ids`, and which of them were cut."""
    rows = data.encode(tokenizer, texts)
    whole = [row["input_ids"] for row in rows]
    cut = [len(ids) > max_length for ids in whole]
    rows = [
        {"input_ids": ids if not c else [*ids[: max_length - 1], ids[-1]]}
        for ids, c in zip(whole, cut, strict=True)
    ]
    return rows, cut


def lowercases(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer makes no difference between upper and lower case."""
    normalizer = getattr(_backend(tokenizer), "normalizer", None)
    return normalizer is not None and normalizer.normalize_str("A") == "a"


def scores(tokenizer: "PreTrainedTokenizerBase", found: list[str], targets: list[str]) -> dict:
    """BLEU (Post, arXiv:1804.08771) and chrF of a corpus, by sacrebleu, with its signatures; of a
    tokenizer without upper case both sides in lower case."""
    from sacrebleu.metrics import BLEU, CHRF

    lower = lowercases(tokenizer)
    both = {"bleu": BLEU(lowercase=lower), "chrf": CHRF(lowercase=lower)}
    result = {k: float(m.corpus_score(found, [targets]).score) for k, m in both.items()}
    return result | {"signatures": {k: str(m.get_signature()) for k, m in both.items()}}


def translated(
    model: BertEncoderDecoder,
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[dict],
    search: Search,
    tokens: int = networks.EVAL_TOKENS,
    scored: bool = True,
) -> list[Any]:
    """[(text, score)] of rows, in their order, decoded in order of length; see `Generated.scores`
    (0.0 unless `scored`)."""
    ends = ends_of(model)
    lengths, found = [len(row["input_ids"]) for row in rows], {}
    most = max(1, MOST_ROWS // search.num_beams)
    for together in data.batches(lengths, 1, tokens=tokens):
        for i in range(0, len(together), most):
            chosen = together[i : i + most]
            ids = [{"input_ids": rows[j]["input_ids"]} for j in chosen]
            given = data.collate(ids, tokenizer.pad_token_id)
            made = model.decode(
                *(given[k].to(model.device) for k in ("input_ids", "attention_mask")),
                max_new_tokens=search.max_length,
                num_beams=search.num_beams,
                length_penalty=search.length_penalty,
                scores=scored,
            )
            texts = [text_of(tokenizer, ids) for ids in made.tokens(ends)]
            values = [0.0] * len(chosen) if made.scores is None else made.scores.tolist()
            found |= zip(chosen, zip(texts, values, strict=True), strict=True)
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def summed_loss(
    model: BertEncoderDecoder, rows: list[dict], batches: Iterable[list[int]]
) -> tuple[float, float]:
    """The summed cross entropy of targets, and their tokens."""
    total, count = 0.0, 0
    for chosen in batches:
        pairs = Pairs.of_rows([rows[i] for i in chosen], model.config.decoder_start_token_id)
        loss, tokens = model.loss_packed(*pairs.to(model.device))
        total, count = total + loss.item(), count + tokens.item()
    return total, count


class Translator:
    """A folder's model and tokenizer, for translating.

    precision: of `bertfast.freeze`, on a CPU, for the encoder; the decoder stays in fp32.
    """

    def __init__(
        self, model: str, allow_pickle: bool, device: str | None, precision: str | None
    ) -> None:
        if precision is not None and device == "cuda":
            raise ConfigError(f"precision {precision} is for a CPU, device is 'cuda'; drop one")
        self.folder = checkpoint.resolve(model)
        self.model = BertEncoderDecoder.from_pretrained(self.folder, allow_pickle=allow_pickle)
        checkpoint.check_finite(self.model, self.folder)
        if precision is not None:
            freeze(self.model, precision)
            device = "cpu"
        self.model = self.model.to(choose_device(device))
        self.tokenizer = load_tokenizer(self.folder)
        check_tokenizer(self.tokenizer, self.model, self.folder)

    def search(
        self, num_beams: int | None, length_penalty: float | None, max_length: int | None
    ) -> Search:
        return Search(num_beams, length_penalty, max_length).check(self.model)

    def encoded(
        self, texts: Sequence[str], max_length: int | None, place: Callable[[int], str]
    ) -> list[dict]:
        limit = self.model.config.encoder.max_position_embeddings
        rows, cut = encode_sources(self.tokenizer, texts, min(max_length, limit))
        if any(cut):
            first = place(cut.index(True))
            say(f"warning: {sum(cut)} of {len(cut)} texts are cut at {max_length} tokens: {first}")
        return rows


def ends_of(model: nn.Module) -> list[int]:
    """The tokens that end a target."""
    ends = model.config.eos_token_id
    return [ends] if isinstance(ends, int) else ends or []


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", model: nn.Module, folder: StrPath
) -> None:
    """CheckpointError where it gives ids that the model has no embedding for, or texts that don't
    begin and end as the model's targets do."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    sides = model.config.encoder, model.config.decoder
    if size > min(side.vocab_size for side in sides):
        raise checkpoint.CheckpointError(
            f"{folder}: the tokenizer has {size} tokens, the model embeddings for "
            f"{min(side.vocab_size for side in sides)}: give the model its own tokenizer"
        )
    ids, start = tokenizer("a")["input_ids"], model.config.decoder_start_token_id
    if ids[0] != start or ids[-1] not in ends_of(model) or model.config.pad_token_id is None:
        raise checkpoint.CheckpointError(
            f"{folder}: targets begin with {start}, end with {ends_of(model)} and are padded with "
            f"{model.config.pad_token_id} by the configuration, texts are {ids[0]} to {ids[-1]} by "
            "the tokenizer: correct decoder_start_token_id, eos_token_id and pad_token_id"
        )


def _settings(given: Translator, **named):
    """`Search`, the columns and the length of what is given, or the run was trained with."""
    named = as_trained(given.folder, "translate", **named)
    if named["max_length"] is None:
        limit = given.model.config.decoder.max_position_embeddings
        named["max_length"] = min(128, limit)
    search = given.search(named["num_beams"], named["length_penalty"], named["max_length"])
    return search, named


def evaluate(
    model: str,
    path: str,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> dict:
    """BLEU, chrF, loss (cross entropy of a target's token) of a model on pairs of texts; see
    `data.load_translations`. What is None is as the model was trained with, else 128 tokens or what
    the model takes, and the settings of `finetune translate`. `precision` is `bertfast.freeze`'s,
    on a CPU, for the encoder."""
    given = Translator(model, allow_pickle, device, precision)
    columns = {"source_column": source_column, "target_column": target_column}
    beams = {"num_beams": num_beams, "length_penalty": length_penalty}
    search, named = _settings(given, **columns, **beams, max_length=max_length)
    part = data.load_translations(path, *(named[c] for c in columns))
    rows = given.encoded(part.sources, search.max_length, part.place)
    targets, _ = encode_sources(given.tokenizer, part.targets, search.max_length + 1)
    for row, target in zip(rows, targets, strict=True):
        row["labels"] = target["input_ids"][1:]
    found = translated(given.model, given.tokenizer, rows, search, scored=False)
    lengths = [len(r["input_ids"]) + len(r["labels"]) for r in rows]
    batches = data.batches(lengths, 1, tokens=networks.EVAL_TOKENS)
    total, count = summed_loss(given.model, rows, batches)
    figures = scores(given.tokenizer, [text for text, _ in found], part.targets)
    return figures | {"loss": total / count, "examples": len(rows)}


def predict_table(
    model: str,
    path: str,
    *,
    source_column: str | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
    batch_tokens: int = networks.EVAL_TOKENS,
    say: Say | None = None,
) -> Iterator[dict]:
    """{"translation": text, "score": number} for the rows of a file of any size, in their order,
    while it is read; see `data.read_sources`, and `evaluate` for the settings. The model is loaded
    and checked by the call; what is wrong with the file raises when its rows are asked for."""
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}, expected 1 or more")
    given = Translator(model, allow_pickle, device, precision)
    beams = {"num_beams": num_beams, "length_penalty": length_penalty}
    search, named = _settings(given, source_column=source_column, **beams, max_length=max_length)

    def encoded():
        for part in data.read_sources(path, named["source_column"]):
            yield part, given.encoded(part.sources, search.max_length, part.place)

    def lines():
        progress = Progress(say)
        for part, rows in data.ahead(encoded()):
            for text, score in translated(given.model, given.tokenizer, rows, search, batch_tokens):
                yield {"translation": text, "score": score}
            progress.step(len(part), part.total)

    return lines()


def inference_arguments(parser: argparse.ArgumentParser, labelled: bool) -> None:
    """`evaluate`'s (labelled) and `predict_table`'s settings as options."""
    text = "column of the text (default: the one trained with; the first, where there is no header)"
    parser.add_argument("--source-column", metavar="COLUMN", help=text)
    if labelled:
        text = "column of its translation (default: the one trained with, or the second)"
        parser.add_argument("--target-column", metavar="COLUMN", help=text)
    text = "sequences followed side by side, 1 for greedy search (default: as trained with)"
    parser.add_argument("--num-beams", type=int, metavar="N", help=text)
    text = "above 0 prefers long translations, below short ones (default: as trained with)"
    parser.add_argument("--length-penalty", type=float, metavar="X", help=text)
    text = "tokens a text and its translation are cut to (default: those trained with, or 128)"
    parser.add_argument("--max-length", type=int, metavar="N", help=text)
