"""Translation by a BERT encoder and decoder; any text into another, summaries too."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from ... import data
from ...data.translation_report import PairReport, pair_report
from ...files import StrPath
from ...model import BertEncoderDecoder
from ...model.presets import bert_config
from ...model.translation_checkpoint import make_config, read_kind
from .. import networks
from ..config import ConfigError, FinetuneConfig, setting
from ..flops import Translation
from ..packed_pairs import Pairs
from ..ranks import Ranks
from .base import FinetuneTask
from .translate_inference import (
    Search,
    check_tokenizer,
    encode_sources,
    evaluate,
    inference_arguments,
    predict_table,
    scores,
    summed_loss,
    translated,
)

if TYPE_CHECKING:
    from ...data.translations import Translations

__all__ = ["HELP", "Task", "evaluate", "inference_arguments", "predict_table"]

HELP = "texts into texts, by an encoder and a decoder: translation, summaries"


@dataclass
class TranslateConfig(FinetuneConfig):
    """What `finetune translate` does."""

    kind: ClassVar[str] = "translate"
    metrics: ClassVar[tuple[str, ...]] = ("bleu", "chrf", "loss")
    NEW: ClassVar[frozenset[str]] = frozenset()

    source_column: str | None = setting(None, "column of the text (a .tsv without a header: none)")
    target_column: str | None = setting(None, "column of its translation")
    size: str | None = setting(
        None,
        "new weights of this size, tiny, mini, small, base, large or a config.json; --model is "
        "then a tokenizer's folder",
    )
    decoder_layers: int | None = setting(None, "layers of the decoder (default: the encoder's)")
    fresh_decoder: bool = setting(False, "new weights for the decoder, not the checkpoint's")
    tie_embeddings: bool = setting(True, "the same embeddings in encoder, decoder and output")
    label_smoothing: float = setting(0.1, "share of a target that goes to all words alike")
    num_beams: int = setting(4, "of the test part's beam search, and later ones'; 1 for greedy")
    length_penalty: float = setting(1.0, "above 0 prefers long translations, below short ones")
    eval_rows: int = setting(500, "validation rows that an evaluation translates, greedily")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("head", self.head == "auto", "auto: a decoder has one of its own kind")
        for name in ("num_beams", "eval_rows"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        layers = self.decoder_layers
        self._check("decoder_layers", layers is None or layers >= 1, "1 or more")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to less than 1")

    @property
    def fresh_weights(self) -> bool:
        return bool(self.size)


class Found(NamedTuple):
    """Of a part: the translations of its first rows, and its loss."""

    texts: list[str]
    loss: float  # of a target's token


class TranslationTask(FinetuneTask):
    """Pairs of a text and its translation."""

    config: TranslateConfig
    Config = TranslateConfig
    pipeline_tag = "translation"

    def load_part(self, path: StrPath) -> "Translations":
        return data.load_translations(path, self.config.source_column, self.config.target_column)

    def build(self, folder: Path) -> nn.Module:
        config, start, end = self.config, self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        if start is None or end is None:
            raise ConfigError(
                f"{folder}: the tokenizer has no [CLS] or no [SEP], as targets begin and end"
            )
        tokens = {"decoder_start_token_id": start, "eos_token_id": end}
        own = {"decoder_layers": config.decoder_layers, "tie_embeddings": config.tie_embeddings}
        model = self._model(folder, tokens, own)
        if model.encoder.pooler is not None:
            model.encoder.pooler.requires_grad_(False)  # nothing reads it
        return model

    def _model(self, folder, tokens, own):
        config, tokenizer = self.config, self.tokenizer
        try:
            if config.size:
                sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
                whole = make_config(bert_config(config.size, **sizes), **tokens, **own)
                return BertEncoderDecoder(whole)
            if read_kind(folder) == "encoder-decoder":
                return self._continued(folder)
            own |= {"fresh": config.fresh_decoder, "allow_pickle": config.allow_pickle}
            return BertEncoderDecoder.from_encoder(folder, **tokens, **own)
        except ValueError as e:
            raise e if type(e) is not ValueError else ConfigError(str(e)) from None

    def _continued(self, folder):
        for name in ("decoder_layers", "fresh_decoder"):
            value = getattr(self.config, name)
            if value:
                raise ConfigError(
                    f"{name} is {value}, but {folder} holds a decoder, which is trained on: leave "
                    "it out"
                )
        return BertEncoderDecoder.from_pretrained(folder, allow_pickle=self.config.allow_pickle)

    def check(self, folder: Path) -> None:
        import sacrebleu  # noqa: F401  where it lacks, no run should start

        config, model = self.config, self.model
        check_tokenizer(self.tokenizer, model, folder)
        Search(config.num_beams, config.length_penalty, config.max_length).check(model)
        limit = model.config.encoder.max_position_embeddings
        if config.max_length > limit:
            raise ConfigError(f"max_length is {config.max_length}, the encoder takes up to {limit}")

    def report(self) -> PairReport:
        return pair_report(self.parts, self.tokenizer, self.config.max_length)

    def encode(self, examples: "Translations") -> list[dict]:
        """`input_ids`, and `labels`: a target without its start, with its end."""
        longest = self.config.max_length
        rows, _ = encode_sources(self.tokenizer, examples.sources, longest)
        targets, _ = encode_sources(self.tokenizer, examples.targets, longest + 1)
        for row, target in zip(rows, targets, strict=True):
            row["labels"] = target["input_ids"][1:]
        return rows

    def _lengths(self, part: str):
        return [len(row["input_ids"]) + len(row["labels"]) for row in self.rows[part]]

    def batches(self, part: int) -> list[list[int]]:
        config = self.config
        return data.batches(
            self._lengths("train"), config.batch_size, config.seed, part, config.batch_tokens
        )

    def load(self, batch: list[int]) -> Pairs:
        start = self.model.config.decoder_start_token_id
        return Pairs.of_rows([self.rows["train"][i] for i in batch], start)

    def weight(self, batch: Pairs) -> float:
        return float(len(batch.labels))

    def tokens(self, batch: Pairs) -> int:
        return len(batch.input_ids) + len(batch.labels)

    def count(self, model: nn.Module) -> None:
        self.products = Translation(model)

    def flops(self, batch: Pairs) -> float:
        sides = np.diff(batch.cu_seqlens), np.diff(batch.decoder_cu_seqlens)
        return self.products.flops(*sides) if self.products else 0.0

    def work(self, batches: list) -> tuple[int, float]:
        rows = [self.rows["train"][i] for batch in batches for i in batch]
        sides = [[len(row[k]) for row in rows] for k in ("input_ids", "labels")]
        return sum(map(sum, sides)), self.products.flops(*sides) if self.products else 0.0

    def loss(self, model: nn.Module, batch: Pairs) -> torch.Tensor:
        pairs = batch.to(self.device)
        return model.loss_packed(*pairs, self.config.label_smoothing)[0]

    def score(self, model: nn.Module, batch: Any) -> Any:
        """batch: a function of the model."""
        return batch(model)

    def outputs(
        self, name: str, model: nn.Module, score: Callable | None = None, ranks: Ranks | None = None
    ) -> Found:
        """Of validation the first `eval_rows`, greedily; of other parts all, by beam search."""
        config, score = self.config, score or partial(self.score, model)
        share = (lambda found: [(b, 1.0) for b in found]) if ranks is None else ranks.share
        rows, beams = self.rows[name], config.num_beams
        if name == "valid":
            rows, beams = rows[: config.eval_rows], 1
        search = Search(beams, config.length_penalty, config.max_length)
        texts, total, count = {}, 0.0, 0.0
        parts = data.batches([len(r["input_ids"]) for r in rows], 1, tokens=networks.EVAL_TOKENS)
        for chosen, factor in share(parts):
            own = [rows[i] for i in chosen]
            found = score(lambda m: translated(m, self.tokenizer, own, search, scored=False))
            texts |= zip(chosen, (text for text, _ in found), strict=True) if factor else {}
        parts = data.batches(self._lengths(name), 1, tokens=networks.EVAL_TOKENS)
        for chosen, factor in share(parts):
            loss, tokens = score(lambda m: summed_loss(m, self.rows[name], [chosen]))
            total, count = total + factor * loss, count + factor * tokens
        given = texts, total, count
        every = [given] if ranks is None else ranks.gather(given)
        texts = {i: text for own, *_ in every for i, text in own.items()}
        loss = sum(total for _, total, _ in every) / sum(count for *_, count in every)
        return Found([texts[i] for i in range(len(rows))], loss)

    def evaluate(self, model: nn.Module, score: Callable) -> dict:
        found = self.outputs("valid", model, score, Ranks(self.config.parallel))
        return self.figures("valid", found, brief=True)

    def figures(self, name: str, found: Found, brief: bool = False) -> dict:
        targets = self.parts[name].targets[: len(found.texts)]
        result = scores(self.tokenizer, found.texts, targets) | {"loss": found.loss}
        if brief:
            return {k: result[k] for k in self.config.metrics}
        beams = 1 if name == "valid" else self.config.num_beams
        return result | {"examples": len(targets), "num_beams": beams}

    def card(self) -> str:
        config = self.config
        return (
            "An encoder and a decoder: transformers' `EncoderDecoderModel`. By sacrebleu, of the "
            f"test part by beam search ({config.num_beams} beams, length penalty "
            f"{config.length_penalty:g}), of the validation part greedy; texts are cut at "
            f"{config.max_length} tokens."
        )


Task = TranslationTask
