"""A fine-tuned classifier, and what its decision for each text rests on."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.errors import ConfigError, DataError
from ..model import checkpoint
from ..saved import is_frozen
from ..train import metrics, opening
from ..train.tasks.classify_inference import HEAD, Classifier, thresholds
from . import gradients, maps
from .occlusion import occlusion
from .settings import Settings
from .words import Text, read

if TYPE_CHECKING:
    from .. import data

_TEXTS = 32  # in a chunk, of which every word's occlusion is one call


class Explainer(Classifier):
    """A fine-tuned model with its classes, none of whose parameters takes gradients.

    Raises: ConfigError where the settings don't fit it, CheckpointError, RuntimeError without
    captum where that is needed.
    """

    def __init__(
        self,
        model: str,
        settings: Settings,
        allow_pickle: bool = False,
        device: str | None = None,
        precision: str | None = None,
    ) -> None:
        self.settings = settings
        if "integrated_gradients" in settings.methods:
            gradients.required()
        folder = checkpoint.resolve(model)
        frozen = is_frozen(folder)
        if frozen:
            self._no_gradients(f"{folder} is frozen", "the folder that it was frozen from")
        elif other := HEAD.of_another(opening.read_configuration(folder)):
            raise checkpoint.CheckpointError(
                f"{folder} is a {other}; explain is for models that decide on a whole text, as "
                "finetune classify and pairs make: of tokens and answers predict gives the scores"
            )
        if precision is not None:
            self._no_gradients(f"precision is {precision!r}", "none")
        super().__init__(model, allow_pickle, device, precision)
        self.trainable = not frozen and precision is None
        if self.trainable:
            self.model.float().requires_grad_(False)
        target, names = settings.target, self.labels.names
        if target is not None and target not in names:
            known = f"known are {', '.join(names)}" if names else "its only output is a number"
            raise ConfigError(f"target is {target!r}, no class of {folder}: {known}")
        own = {"integrated_gradients": "baseline", "occlusion": "occlusion"}
        self.token = {
            m: settings.token(own[m], self.tokenizer) for m in settings.methods if m in own
        }

    def _no_gradients(self, what, other):
        needing = [m for m in self.settings.methods if m != "occlusion"]
        if needing:
            raise ConfigError(
                f"{what}, and packed weights give neither gradients nor attention maps for "
                f"{', '.join(needing)}: give --method occlusion, or {other}"
            )

    def explained(self, *args: Any) -> list[dict]:
        """All of `chunks`' results."""
        return [result for chunk in self.chunks(*args) for result in chunk]

    def chunks(
        self, examples: "data.Examples", max_length: int, targets: Sequence[int] | None = None
    ) -> Iterator[list[dict]]:
        """A result (see `explain`) for each of the examples, whose texts are raw. targets: classes
        in place of the settings', names (None of a regression)."""
        for start in range(0, len(examples), _TEXTS):
            part = range(start, min(start + _TEXTS, len(examples)))
            own = None if targets is None else [targets[i] for i in part]
            yield self._chunk(examples.select(part), max_length, own)

    def _chunk(self, examples, max_length, targets) -> list[dict]:
        texts = read(self.tokenizer, examples.texts, examples.pairs, max_length)
        empty = [i for i, text in enumerate(texts) if not text.read().any()]
        if empty:
            raise DataError(
                f"{examples.place(empty[0])}: the tokenizer finds no word in the text"
                f"{f' (and {len(empty) - 1} more such rows)' * (len(empty) > 1)}: drop the row"
            )
        logits = self._logits([text.row for text in texts], examples.place)
        shown = metrics.probabilities(logits, self.labels.task)
        targets, names = targets or [self.settings.target] * len(texts), self.labels.names
        given = zip(shown.argmax(1), targets, strict=True)
        chosen = np.array([own if t is None else names.index(t) for own, t in given])
        results = self._results(examples, texts, logits, shown, chosen)
        for method in self.settings.methods:
            found = getattr(self, f"_{method}")(examples, texts, chosen, shown)
            for result, text, (scores, about) in zip(results, texts, found, strict=True):
                _add(result, method, text, scores, about)
        return results

    def _logits(self, rows, place) -> np.ndarray:
        return np.stack(self.outputs(rows, place, self.settings.batch_tokens))

    def _results(self, examples, texts, logits, shown, chosen) -> list[dict]:
        labels, cut = self.labels, thresholds(self.decision, self.labels)
        predicted = labels.decode(metrics.predicted(logits, labels.task, cut))
        sides = [examples.texts] if examples.pairs is None else [examples.texts, examples.pairs]
        results = []
        for i, (text, target) in enumerate(zip(texts, chosen, strict=True)):
            own = dict(zip(("text", "pair"), (side[i] for side in sides), strict=False))
            result = {"row": examples.rows[i]} | own
            if labels.names:
                result |= {"predicted": predicted[i], "target": labels.names[target]}
            result["probability" if labels.names else "value"] = float(shown[i, target])
            result |= {"tokens": len(text.word), "unread_words": int((~text.read()).sum())}
            result["words"] = [_word(sides[s][i], s if s else None, a, b) for s, a, b in text.spans]
            results.append(result | {"methods": {}})
        return results

    def _integrated_gradients(self, examples, texts, chosen, shown):
        s, token = self.settings, self.token["integrated_gradients"]
        for text, target in zip(texts, chosen.tolist(), strict=True):
            limits = s.steps, s.max_steps, s.batch_tokens
            yield gradients.integrated_gradients(self.model, text, target, token, *limits)

    def _gradient_attention(self, examples, texts, chosen, shown):
        return ((s, {}) for s in maps.scores(self.model, texts, chosen.tolist(), True))

    def _attention_rollout(self, examples, texts, chosen, shown):
        return ((s, {}) for s in maps.scores(self.model, texts, chosen.tolist(), False))

    def _occlusion(self, examples, texts, chosen, shown):
        def values(rows, of):
            found = self._logits(rows, lambda i: examples.place(of[i]))
            found = metrics.probabilities(found, self.labels.task)
            return found[np.arange(len(rows)), chosen[of]]

        whole = shown[np.arange(len(texts)), chosen]
        settings = self.settings.occlusion, self.token["occlusion"]
        return ((scores, None) for scores in occlusion(texts, *settings, whole, values))


def _word(text: str, side: int | None, start: int, end: int) -> dict:
    """side: 1 of a pair's second text, whose characters they are."""
    own = {} if side is None else {"side": side}
    return {"text": text[start:end], "start": start, "end": end} | own | {"scores": {}}


def _add(result: dict, method: str, text: Text, scores, about: dict | None) -> None:
    """A method's scores of tokens, or of words where there is nothing `about` them."""
    words = scores if about is None else text.total(scores)
    for word, score in zip(result["words"], words.tolist(), strict=True):
        word["scores"][method] = score if np.isfinite(score) else None
    result["methods"][method] = about or {}
    if about is not None:  # of specials and what is of no word
        result["methods"][method]["rest"] = float(scores[text.word < 0].sum())
