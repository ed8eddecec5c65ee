"""`freeze(model, "auto")`: the fastest precision that keeps a text's states."""

import logging

import pytest
import torch
from families import build, inputs_for
from helpers import refused

import bertfast
from bertfast.encoder import choice
from bertfast.encoder.batch import Batch


class Timed:
    """A packed encoder whose calls take its seconds, and whose states are off by its error."""

    def __init__(self, clock, seconds, error=0.0):
        self.clock, self.seconds, self.error = clock, seconds, error

    def run(self, batch, training):
        self.clock[0] += self.seconds
        noise = torch.randn(batch.hidden.shape, generator=torch.Generator().manual_seed(1))
        return batch.hidden + self.error * noise


@pytest.mark.parametrize(
    "bf16, int8, best",
    [
        ((1.0, 0.001), (0.5, 0.01), "int8"),
        ((1.0, 0.001), (0.5, 1.0), "bf16"),  # int8 loses too much
        ((3.0, 0.001), (0.5, 1.0), "fp32"),  # and bf16 is slow
        ((1.0, float("nan")), (0.5, float("nan")), "fp32"),
    ],
)
def test_fastest_within_the_bounds(monkeypatch, bf16, int8, best):
    clock = [0.0]
    monkeypatch.setattr(choice.time, "perf_counter", lambda: clock[0])
    packed = {"fp32": Timed(clock, 2.0), "bf16": Timed(clock, *bf16), "int8": Timed(clock, *int8)}
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    batch = Batch(hidden, torch.tensor([0, 4, 4, 9], dtype=torch.int32), 5)
    found, why = choice.choose(packed, batch)
    assert (
        found == best and f"chose {best} on 2 texts of 9 tokens" in why and "int8 500.0 ms" in why
    )


@pytest.mark.parametrize("given", ["none", "texts", "tensors"])
def test_auto(saved, given, caplog):
    """On the built-in sample or one's own, told why; the states are those of the precision asked
    for with the same sample."""
    st = pytest.importorskip("sentence_transformers")
    model = st.SentenceTransformer(saved(initializer_range=0.05), device="cpu")
    texts = {"none": None, "texts": ["the cat sat", "a dog"], "tensors": inputs_for()}[given]
    with caplog.at_level(logging.INFO, "bertfast"):
        bertfast.freeze(model, "auto", texts)
    packed = model[0].model.encoder.packed
    sizes = {
        "none": "16 texts of",
        "texts": "2 texts of 9 tokens",
        "tensors": "4 texts of 34 tokens",
    }
    assert sizes[given] in caplog.text and packed.why in caplog.text
    other = st.SentenceTransformer(saved(initializer_range=0.05), device="cpu")
    bertfast.freeze(other, packed.precision, choice.TEXTS if texts is None else texts)
    words = ["a cat", "far away from the sea"]
    assert (model.encode(words) == other.encode(words)).all()
    assert packed.why in str(bertfast.accelerate(model))


def test_texts_need_a_tokenizer():
    refused(ValueError, "without a tokenizer", bertfast.freeze, build("Bert"), "auto", ["a"])
    model = build("Bert")
    model.tokenizer = lambda texts, **_: inputs_for()
    model.tokenizer.model_max_length = 8
    refused(ValueError, "expected to be strings", bertfast.freeze, model, "auto", [3])
    assert bertfast.freeze(build("Bert"), "auto").encoder.packed.why  # tokens at random
    given = inputs_for() | {"token_type_ids": torch.zeros(4, 17).long()}
    assert bertfast.freeze(build("DistilBert"), "auto", given).transformer.packed.why


@pytest.mark.parametrize("family", ["DebertaV2", "ModernBert", "Albert", "EuroBert"])
def test_every_kind_of_layer(family):
    model = bertfast.freeze(build(family, initializer_range=0.02), "auto")
    with torch.inference_mode():
        assert model(**inputs_for()).last_hidden_state.isfinite().all()
