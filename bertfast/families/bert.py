"""BERT, mBERT, E5, BGE, MiniLM; RoBERTa, XLM-RoBERTa, BGE-M3, CamemBERT, ELECTRA, ERNIE, RoCBERT,
Data2Vec's text model: their embeddings differ, their layers don't. And bertfast's own model, which
has the same names."""

from collections.abc import Mapping
from typing import Any

from .family import Family, Readers

_DROPOUTS = "attention.self.dropout", "attention.output.dropout", "output.dropout"


def bert_like(
    module: str,
    prefix: str,
    readers: Readers | None = None,
    norms: Mapping[str, str] | tuple[()] = (),
    dropouts: tuple[str | None, ...] = _DROPOUTS,
    **more: Any,
) -> Family:
    """module: where classes of such a layer are; prefix: of their names; norms: paths, by role."""
    return Family(
        module=module,
        encoder=f"{prefix}Encoder",
        layer=f"{prefix}Layer",
        roles={
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "out": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "norm2": "output.LayerNorm",
        }
        | dict(norms),
        bypassed={
            "attention": f"{prefix}Attention",
            "attention.self": f"{prefix}SelfAttention",
            "attention.output": f"{prefix}SelfOutput",
            "intermediate": f"{prefix}Intermediate",
            "output": f"{prefix}Output",
        },
        activation="intermediate.intermediate_act_fn",
        attention="attention.self",
        dropouts=dropouts,
        readers=readers,
        **more,
    )


def theirs(name: str, prefix: str, first: dict[str, tuple[str, str]], **more: Any) -> Family:
    """Of transformers. first: {"ForTask": (path, "Class")}, see `Readers`; without prefixes."""
    readers = Readers(
        f"{prefix}Model",
        {prefix + head: (path, prefix + taker) for head, (path, taker) in first.items()},
        (f"{prefix}ForMaskedLM", f"{prefix}ForTokenClassification"),
    )
    file = f"{name.removesuffix('_text')}.modeling_{name}"
    return bert_like(f"transformers.models.{file}", prefix, readers, **more)


CLASSIFIER = {"ForSequenceClassification": ("classifier", "ClassificationHead")}
_POOLED = "ForSequenceClassification", "ForMultipleChoice"


def choice(model: str) -> dict[str, tuple[str, str]]:
    return {"ForMultipleChoice": (f"{model}.pooler", "Pooler")}


def pooled(model: str, *more: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys((*_POOLED, *more), (f"{model}.pooler", "Pooler"))


NEXT = "ForNextSentencePrediction"
BERT_LIKE = (
    theirs("bert", "Bert", pooled("bert", NEXT)),
    theirs("roberta", "Roberta", CLASSIFIER | choice("roberta")),
    theirs("xlm_roberta", "XLMRoberta", CLASSIFIER | choice("roberta")),
    theirs("camembert", "Camembert", CLASSIFIER | choice("roberta")),
    theirs("electra", "Electra", CLASSIFIER),
    theirs("ernie", "Ernie", pooled("ernie", NEXT)),
    theirs("roc_bert", "RoCBert", pooled("roc_bert")),
    theirs("data2vec_text", "Data2VecText", CLASSIFIER | choice("data2vec_text")),
)
