"""BERT, mBERT, E5, BGE, MiniLM; RoBERTa, XLM-RoBERTa, BGE-M3, CamemBERT, ELECTRA: their embeddings
differ, their layers don't. And bertfast's own model, which has the same names."""

from .family import Family, Readers


def bert_like(module: str, prefix: str, readers: Readers | None = None, **more) -> Family:
    """module: where classes of such a layer are; prefix: of their names."""
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
        },
        bypassed={
            "attention": f"{prefix}Attention",
            "attention.self": f"{prefix}SelfAttention",
            "attention.output": f"{prefix}SelfOutput",
            "intermediate": f"{prefix}Intermediate",
            "output": f"{prefix}Output",
        },
        activation="intermediate.intermediate_act_fn",
        attention="attention.self",
        dropouts=("attention.self.dropout", "attention.output.dropout", "output.dropout"),
        readers=readers,
        **more,
    )


def _theirs(name: str, prefix: str, first: dict[str, tuple[str, str]]) -> Family:
    """Of transformers. first: {"ForTask": (path, "Class")}, see `Readers`; without prefixes."""
    readers = Readers(
        f"{prefix}Model",
        {prefix + head: (path, prefix + taker) for head, (path, taker) in first.items()},
        (f"{prefix}ForMaskedLM", f"{prefix}ForTokenClassification"),
    )
    return bert_like(f"transformers.models.{name}.modeling_{name}", prefix, readers)


_CLASSIFIER = {"ForSequenceClassification": ("classifier", "ClassificationHead")}
_CHOICE = {"ForMultipleChoice": ("roberta.pooler", "Pooler")}
_POOLED = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
BERT_LIKE = (
    _theirs("bert", "Bert", dict.fromkeys(_POOLED, ("bert.pooler", "Pooler"))),
    _theirs("roberta", "Roberta", _CLASSIFIER | _CHOICE),
    _theirs("xlm_roberta", "XLMRoberta", _CLASSIFIER | _CHOICE),
    _theirs("camembert", "Camembert", _CLASSIFIER | _CHOICE),
    _theirs("electra", "Electra", _CLASSIFIER),
)
