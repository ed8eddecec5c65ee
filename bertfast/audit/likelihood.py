"""Pseudo-log-likelihoods by a masked language model (Salazar et al. 2020, "Masked Language Model
Scoring"): each token's log-probability where it alone is masked, summed over a sentence."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .. import data
from ..model import BertForMaskedLM, checkpoint
from ..model.tokenizer import load_tokenizer
from ..train import networks, opening
from ..train.packed import Packed
from ..train.tasks.base import choose_device

TOKENS = networks.EVAL_TOKENS
_PADDED_TOKENS = 2048  # transformers' heads give logits of every token


class _Head(opening.Head):
    """Those of a masked language model and of pre-training have the same."""

    def of_another(self, config):
        names = config.architectures or ()
        own = not names or any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)
        return None if own else ", ".join(names)


HEAD = _Head("MaskedLM", BertForMaskedLM, "cls.predictions.decoder", True)


class MaskedLM:
    """A pre-trained model of a folder or hub name with its tokenizer.

    Raises: CheckpointError where it is no masked language model; ConfigError.
    """

    def __init__(self, model: str, allow_pickle: bool = False, device: str | None = None) -> None:
        self.folder = checkpoint.resolve(model)
        opening.verify(self.folder, allow_pickle)
        self.model = opening.trained(self.folder, HEAD, allow_pickle).to(choose_device(device))
        self.tokenizer = load_tokenizer(self.folder)
        if self.tokenizer.mask_token_id is None:
            raise checkpoint.CheckpointError(
                f"{self.folder}: its tokenizer has no mask token, which a masked language model "
                "needs: give it the one that it was trained with"
            )

    def encoded(self, texts: Sequence[str], place: Callable[[int], str]) -> list[dict]:
        """Rows of ids; place(i) says where a text is from. DataError of one that is too long for
        the model: what is cut off would have no likelihood."""
        rows = data.encode(self.tokenizer, texts)
        limit = networks.longest(self.model)
        for i, row in enumerate(rows):
            if limit is not None and len(row["input_ids"]) > limit:
                raise data.DataError(
                    f"{place(i)}: {len(row['input_ids'])} tokens, the model takes up to {limit}: "
                    "shorten the text or drop the row"
                )
        return rows

    def own(self, row: dict) -> list[int]:
        """The places of a row that are no special tokens."""
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        return [i for i, token in enumerate(row["input_ids"]) if token not in special]

    def log_probabilities(
        self, rows: Sequence[dict], places: Sequence[Sequence[int]], tokens: int | None = None
    ) -> list[np.ndarray]:
        """Of each row's `places` the log-probability of its token there, masked alone: fp64. The
        variants of all rows share packed batches of so many `tokens`, whatever their row."""
        variants = [(r, p) for r, own in enumerate(places) for p in own]
        lengths = [len(rows[r]["input_ids"]) for r, _ in variants]
        padded = networks.padded(self.model)
        pad = self.tokenizer.pad_token_id if padded else None
        tokens = tokens or (_PADDED_TOKENS if padded else TOKENS)
        found = np.empty(len(variants))
        for chosen in data.batches(lengths, 1, tokens=tokens):
            batch = [self._masked(rows[variants[v][0]], variants[v][1]) for v in chosen]
            found[chosen] = self._scored(Packed.of_rows(batch, pad).to(self.model.device))
        if not np.isfinite(found).all():
            raise checkpoint.CheckpointError(
                f"{self.folder} gives numbers that are not finite: look for NaN in its weights"
            )
        return np.split(found, np.cumsum([len(own) for own in places])[:-1])

    def _masked(self, row, place) -> dict:
        ids = [*row["input_ids"]]
        tag, ids[place] = ids[place], self.tokenizer.mask_token_id
        return row | {"input_ids": ids, "places": [place], "tags": [tag]}

    @torch.no_grad()
    def _scored(self, batch: Packed) -> np.ndarray:
        logits = networks.logits(self.model, batch, per_token=True).float()
        scores = logits.gather(1, batch.labels[:, None])[:, 0] - logits.logsumexp(1)
        return scores.double().cpu().numpy()


def pseudo_log_likelihoods(
    model: str, texts: list[str], *, allow_pickle: bool = False, device: str | None = None
) -> list[float]:
    """Of each text the sum over its tokens, specials not counted; longer texts have smaller ones.
    model: folder or hub name of a masked language model. Raises as `MaskedLM` does."""
    given = MaskedLM(model, allow_pickle, device)
    rows = given.encoded(texts, lambda i: f"text {i + 1}")
    found = given.log_probabilities(rows, [given.own(row) for row in rows])
    return [float(own.sum()) for own in found]
