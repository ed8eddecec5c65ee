"""Models inside objects of other libraries, by stand-ins of their shapes."""

import dataclasses
import re
from typing import Any

import pytest
import torch
import transformers
from families import build
from helpers import refused

import bertfast
from bertfast.dropin import AccelerationError
from bertfast.dropin.holders import modules


@dataclasses.dataclass
class SetFit:
    """A SetFitModel has a SentenceTransformer and a head of any kind."""

    model_body: torch.nn.Module
    model_head: Any = None
    multi_target_strategy: str | None = None


class Haystack:
    """Embedders have a back-end, which has the model."""

    def __init__(self, model):
        self.embedding_backend = SetFit(model)


class Trainer:
    def __init__(self, model):
        self.model, self.model_wrapped = model, torch.nn.Sequential(model)
        self.callback_handler = SetFit(model)
        self.itself = self


def langchain(model):
    """HuggingFaceEmbeddings keeps it in a private attribute of pydantic's."""
    pydantic = pytest.importorskip("pydantic")

    class Embeddings(pydantic.BaseModel):
        model_name: str = "a name"
        _client: Any = pydantic.PrivateAttr()

        def __init__(self, **given):
            super().__init__(**given)
            self._client = model

    return Embeddings()


def langchain_before(model):
    """And once in a field."""
    pydantic = pytest.importorskip("pydantic")

    class Embeddings(pydantic.BaseModel):
        client: Any = None

    return Embeddings(client=model)


def langchain_pipeline(model):
    """HuggingFacePipeline: what has a pipeline, which has a model."""
    pydantic = pytest.importorskip("pydantic")

    class Pipeline(pydantic.BaseModel):
        pipeline: Any = None

    return Pipeline(pipeline=transformers_pipeline(model))


def llamaindex(model):
    pydantic = pytest.importorskip("pydantic")

    class Embedding(pydantic.BaseModel):
        max_length: int = 512
        _model: Any = pydantic.PrivateAttr(default=None)
        _device: str = pydantic.PrivateAttr(default="cpu")

    holder = Embedding()
    holder._model = model
    return holder


def transformers_pipeline(model):
    words = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "a": 2})
    return transformers.pipeline("feature-extraction", model=model, tokenizer=words)


HOLDERS = {
    SetFit: "model_body",
    Haystack: "embedding_backend.model_body",
    Trainer: "model",
    langchain: "_client",
    langchain_before: "client",
    langchain_pipeline: "pipeline.model",
    llamaindex: "_model",
    transformers_pipeline: "model",
}


@pytest.mark.parametrize("make", HOLDERS, ids=lambda f: f.__name__)
def test_found(make):
    model, path = build("Bert"), HOLDERS[make]
    holder = make(model)
    assert next(iter(modules(holder).items())) == (path, model)
    report = bertfast.accelerate(holder, strict=True)
    assert list(report.layers) == [f"{path}.encoder.layer.{i}" for i in range(2)]
    assert bertfast.is_accelerated(model) and bertfast.is_accelerated(holder)
    bertfast.restore(holder)
    assert not bertfast.is_accelerated(model)
    with bertfast.accelerated(holder):
        assert bertfast.is_accelerated(model)
    assert not bertfast.is_accelerated(model)


def test_several_models():
    holder = SetFit(build("Bert"), build("MPNet"))
    report = bertfast.accelerate(holder)
    assert list(report.fallbacks) == ["model_body.encoder", "model_head.encoder"]
    assert report.fused == 4


def test_strict_changes_none_of_them():
    holder = SetFit(build("Bert"), build("Roberta").half())
    refused(AccelerationError, "model_head.encoder.layer.0: no kernel", bertfast.accelerate, holder,
            strict=True)  # fmt: skip
    assert not bertfast.is_accelerated(holder)


class Deep:
    def __init__(self, holder):
        self.holder = holder


@pytest.mark.parametrize("function", [bertfast.accelerate, bertfast.restore, bertfast.freeze])
def test_nothing_found(function):
    for holder in (None, "a name", 3, [1], Deep(Deep(Deep(build("Bert")))), Deep, torch, len):
        name = f"{type(holder).__module__}.{type(holder).__qualname__}"
        refused(TypeError, re.escape(name), function, holder)


def test_what_is_in_the_way_by_path_and_class():
    model = build("Bert")

    class Mine(torch.nn.Linear):
        pass

    model.encoder.layer[0].output.dense = Mine(80, 48)
    model.encoder.layer[1] = torch.nn.Identity()
    layers = bertfast.accelerate(SetFit(model)).layers
    name = f"{Mine.__module__}.{Mine.__qualname__}"
    assert f"output.dense: it is a {name}" in layers["model_body.encoder.layer.0"]
    assert "torch.nn.modules.linear.Identity" in layers["model_body.encoder.layer.1"]
