"""Readers of padding that hide: parts of heads, patched classes, hooks inside layers, callers that
keep what they passed on."""

import copy
import gc
import weakref

import pytest
import torch
from families import build, inputs_for
from helpers import close_to_truth
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentences import TEXTS
from transformers.models.bert.modeling_bert import BertPooler

import bertfast
from bertfast.dropin import readers
from bertfast.encoder.batch import Packing


def pair(model):
    ours = copy.deepcopy(model)
    return model, ours, bertfast.accelerate(ours)


class Mixing(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(1, keepdim=True))


@pytest.mark.parametrize("how", ["class", "instance", "hook", "none"])
def test_parts_of_a_token_head(how):
    """Only row by row can a masked loss leave padding out, Trainer's or not."""
    model = build("Bert", "ForTokenClassification")
    mixing = Mixing(model.config.hidden_size, model.config.num_labels)
    if how == "class":
        model.classifier = mixing
    elif how == "instance":
        model.classifier.forward = mixing.forward
    elif how == "hook":
        model.classifier.register_forward_hook(lambda *_: None)
    changed = readers._changed(model, readers._TOKENS)
    assert changed is (None if how == "none" else model.classifier)


def test_a_patched_class(monkeypatch):
    mean = lambda self, hidden: self.activation(self.dense(hidden.mean(1)))
    monkeypatch.setattr(BertPooler, "forward", mean)
    theirs, ours, report = pair(build("Bert", "ForSequenceClassification"))
    with torch.no_grad():
        close_to_truth(ours(**inputs_for())[0], theirs(**inputs_for())[0])
    assert "BertPooler" in str(report)


@pytest.mark.parametrize("place", ["attention", "intermediate", "output.dense"])
def test_a_hook_inside_a_layer(place):
    theirs, ours, _ = pair(build("Bert", "ForSequenceClassification"))
    seen = []
    for model in (ours, theirs):
        module = model.bert.encoder.layer[1].get_submodule(place)
        module.register_forward_hook(
            lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model(**inputs_for())
    close_to_truth(*seen)


class Reading(MultipleNegativesRankingLoss):
    def forward(self, features, labels):
        super().forward(features, labels)
        return torch.stack([f["token_embeddings"].square().sum() for f in features])


def test_a_loss_that_keeps_the_features(saved):
    theirs, ours, _ = pair(SentenceTransformer(str(saved()), device="cpu").eval())
    found = []
    for model in (ours, theirs):
        features = [model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])]
        with torch.no_grad():
            found.append(Reading(model)(features, None))
    close_to_truth(*found)


def test_nothing_is_kept_alive():
    """The question leaves no variable of the caller behind."""

    class Big:
        pass

    model = build("Bert", "ForSequenceClassification")
    bertfast.accelerate(model)
    big = Big()
    alive = weakref.ref(big)
    with torch.no_grad():
        model(**inputs_for())
    del big
    gc.collect()
    assert alive() is None


def test_what_is_not_built_as_known_reads():
    model = build("Bert", "ForSequenceClassification")
    report = bertfast.accelerate(model)
    model.bert = torch.nn.DataParallel(model.bert)  # without a GPU it only hands on
    with torch.no_grad():
        model(**inputs_for())
    assert "stock" in next(iter(report.padding.values()))


def test_reader_of_a_bare_call():
    packing = Packing(1, 2, torch.tensor([[1, 0]]), "cpu")
    assert "test_reader_of_a_bare_call" in readers.reader(packing)
