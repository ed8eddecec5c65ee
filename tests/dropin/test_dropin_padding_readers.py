"""Who else reads an accelerated model's padded positions: hooks, callers, replaced parts, wrappers."""

import copy
import types

import pytest
import torch
import transformers
from padded import assert_same, every, flat, labels, observe, padded, stock, three

import bertfast

SEQUENCE = "ForSequenceClassification"


def compare(models, *args, **options):
    assert_same(*(observe(m, *args, **options) for m in models))


def base(model):
    return model.base_model


PLACES = {
    "layer": lambda m: base(m).encoder.layer[0],
    "last layer": lambda m: base(m).encoder.layer[-1],
    "encoder": lambda m: base(m).encoder,
    "model": base,
    "pooler": lambda m: base(m).pooler,
    "pooler's dense": lambda m: base(m).pooler.dense,
    "dropout": lambda m: m.dropout,
    "classifier": lambda m: m.classifier,
    "head": lambda m: m,
}
HOOKED = [("Bert", SEQUENCE, p) for p in PLACES] + [
    *(("Roberta", SEQUENCE, p) for p in ("encoder", "model", "classifier")),
    *(("Bert", "ForTokenClassification", p) for p in ("encoder", "model", "dropout", "classifier")),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family, head, place", HOOKED)
def test_hooks_see_stocks_values(family, head, place, when):
    theirs = stock(family, head)
    given = padded(kind="right") | labels(theirs, padded())
    ours = copy.deepcopy(theirs)
    exact = copy.deepcopy(theirs).double()
    if when == "after":
        bertfast.accelerate(ours)
    seen, kept = [{}, {}, {}], []

    def record(into, kind):
        def hook(module, *tensors):
            into.update(flat(kind, [dict(t) if isinstance(t, dict) else t for t in tensors]))

        return hook

    for into, model in zip(seen, (ours, theirs, exact), strict=True):
        module = PLACES[place](model)
        kept.append(module.register_forward_hook(record(into, "after")))
        kept.append(module.register_forward_pre_hook(record(into, "before")))
    if when == "before":
        bertfast.accelerate(ours)
    for model in ours, theirs, exact:
        model.train()(**given).loss.backward()
    assert all(seen)
    assert_same(*seen)
    for hook in kept:
        hook.remove()
    compare((ours, theirs, exact), padded())


def test_a_hook_on_every_module():
    models, _ = three(stock("Bert", SEQUENCE))
    seen, now = [{}, {}, {}], []

    def hook(module, args, output):
        if isinstance(module, transformers.BertModel):
            now[0].update(flat("states", dict(output)))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        for into, model in zip(seen, models, strict=True):
            now[:] = [into]
            with torch.no_grad():
                model(**padded())
    finally:
        handle.remove()
    assert_same(*seen)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Electra", "MPNet"])
def test_the_base_model_called_by_itself(family):
    """It is whole there, also between calls of the head that skips."""
    models, _ = three(stock(family, SEQUENCE))
    for _ in range(2):
        compare(models, padded())
        compare([base(m) for m in models], padded(), every)
    seen = []
    for model in models:
        with torch.no_grad():
            model(**padded())
            seen.append(
                flat("", dict(base(model)(padded()["input_ids"], padded()["attention_mask"])))
            )
    assert_same(*seen)


class MeanPooler(torch.nn.Module):
    """Averages over all positions, padding too."""

    def __init__(self, width, classes):
        super().__init__()
        torch.manual_seed(5)
        self.dense = torch.nn.Linear(width, classes)

    def forward(self, states):
        return self.dense(states.mean(1)).tanh()


class MeanHead(transformers.models.roberta.modeling_roberta.RobertaClassificationHead):
    def forward(self, features, **kwargs):
        return self.out_proj(features.mean(1))


def mean_forward(self, features, **kwargs):
    return self.out_proj(features.mean(1))


def mean_pool(self, states):
    return self.dense(states.mean(1))


def replace_pooler(model):
    base(model).pooler = MeanPooler(48, 48)


def replace_classifier(model):
    model.classifier = MeanPooler(48, 2)


def replace_class(model):
    model.classifier.__class__ = MeanHead


def replace_forward(model):
    model.classifier.forward = types.MethodType(mean_forward, model.classifier)


def replace_pooling(model):
    base(model).pooler.forward = types.MethodType(mean_pool, base(model).pooler)


def replace_call(model):
    """The head's own forward, on the instance."""

    def forward(self, input_ids, attention_mask):
        states = base(self)(input_ids, attention_mask=attention_mask)[0]
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=states.mean(1))

    model.forward = types.MethodType(forward, model)


REPLACED = [
    ("Bert", replace_pooler),
    ("Bert", replace_pooling),
    ("Bert", replace_call),
    ("Roberta", replace_classifier),
    ("Roberta", replace_class),
    ("Roberta", replace_forward),
    ("Roberta", replace_call),
    ("XLMRoberta", replace_classifier),
    ("Camembert", replace_classifier),
    ("Electra", replace_classifier),
    ("MPNet", replace_classifier),
    ("DistilBert", replace_call),
]


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
@pytest.mark.parametrize("family, change", REPLACED, ids=lambda x: getattr(x, "__name__", x))
def test_replaced_parts(family, change, when):
    theirs = stock(family, SEQUENCE)
    ours = copy.deepcopy(theirs)
    if when != "before":
        bertfast.accelerate(ours)
    if when == "after a call":
        observe(ours, padded())
    change(ours)
    change(theirs)
    bertfast.accelerate(ours)
    compare((ours, theirs, copy.deepcopy(theirs).double()), padded(), every)


class Mean(transformers.BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None):
        states = self.bert(input_ids, attention_mask=attention_mask)[0]
        return {"logits": self.classifier(states.mean(1))}


class Named(transformers.BertForSequenceClassification):
    """Stock's forward under a class of the user's."""


class Twice(transformers.BertForSequenceClassification):
    """Stock's forward, then what it left."""

    def forward(self, input_ids, attention_mask=None):
        logits = super().forward(input_ids, attention_mask=attention_mask).logits
        states = self.bert(input_ids, attention_mask=attention_mask)[0]
        return {"logits": logits, "states": states}


class Tagger(transformers.BertForTokenClassification):
    """A CRF's log partition over all positions, of logits without labels."""

    def forward(self, input_ids, attention_mask=None):
        emissions = super().forward(input_ids, attention_mask=attention_mask).logits
        score = emissions[:, 0]
        for step in emissions[:, 1:].unbind(1):
            score = torch.logsumexp(score.unsqueeze(2) + step.unsqueeze(1), 1)
        return {"partition": score.logsumexp(1)}


class Wrapper(torch.nn.Module):
    """A user's module around a bare model."""

    def __init__(self, model):
        super().__init__()
        self.bert = model

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.bert(input_ids, attention_mask=attention_mask)[0].mean(1)}


@pytest.mark.parametrize("kind", ["right", "left"])
@pytest.mark.parametrize("own", [Mean, Named, Twice, Tagger])
def test_subclasses(own, kind):
    torch.manual_seed(0)
    models, report = three(own(stock("Bert", SEQUENCE).config).train())
    compare(models, padded(kind=kind), every)
    assert report.fused == 2


def test_wrapper():
    models, _ = three(Wrapper(stock("Bert")))
    compare(models, padded(), every)
