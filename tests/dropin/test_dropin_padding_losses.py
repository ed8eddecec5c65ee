"""Losses and models of sentence-transformers that read an accelerated model's tokens, padded."""

import pytest
import torch
from padded import assert_same, gradients
from sentences import TEXTS, WIDTH, copies, features, floats

st = pytest.importorskip("sentence_transformers", minversion="6")

from sentence_transformers.base import modules as base  # noqa: E402
from sentence_transformers.cross_encoder import losses as cross_losses  # noqa: E402
from sentence_transformers.cross_encoder.modules import LogitScore  # noqa: E402
from sentence_transformers.multi_vector_encoder import losses as multi_losses  # noqa: E402
from sentence_transformers.multi_vector_encoder import modules as multi  # noqa: E402
from sentence_transformers.sentence_transformer import losses as plain  # noqa: E402
from sentence_transformers.sentence_transformer import modules as own  # noqa: E402
from sentence_transformers.sparse_encoder import losses as sparse_losses  # noqa: E402
from sentence_transformers.sparse_encoder import modules as sparse  # noqa: E402


def test_router(saved):
    def route():
        return [base.Transformer(saved()), own.Pooling(WIDTH, "cls")]

    router = base.Router.for_query_document(
        route(), [base.Transformer(saved()), own.CNN(WIDTH, 16), own.Pooling(48)]
    )
    models, _ = copies(st.SentenceTransformer(modules=[router, base.Normalize()], device="cpu"))
    for encode in "encode_query", "encode_document":
        assert_same(
            *({"embeddings": getattr(m, encode)(TEXTS[:6], convert_to_tensor=True)} for m in models)
        )


LOSSES = {
    "ranking": lambda m: plain.MultipleNegativesRankingLoss(m),
    "cached": lambda m: plain.CachedMultipleNegativesRankingLoss(m, mini_batch_size=2),
    "matryoshka": lambda m: plain.MatryoshkaLoss(m, plain.MultipleNegativesRankingLoss(m), [16, 8]),
    "cosine": lambda m: plain.CosineSimilarityLoss(m),
    "layers": lambda m: plain.AdaptiveLayerLoss(m, plain.MultipleNegativesRankingLoss(m), n_layers_per_step=-1),
    "2d": lambda m: plain.Matryoshka2dLoss(m, plain.MultipleNegativesRankingLoss(m), [16, 8], n_layers_per_step=-1, n_dims_per_step=-1),
}  # fmt: skip


BEHIND = {
    "cls": lambda: [own.Pooling(WIDTH, "cls")],
    "mean": lambda: [own.Pooling(WIDTH), base.Dense(WIDTH, 16), base.Normalize()],
    "cnn": lambda: [own.CNN(WIDTH, 8), own.Pooling(24, "max")],
}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, behind, saved):
    torch.manual_seed(7)
    models, _ = copies(
        st.SentenceTransformer(modules=[base.Transformer(saved()), *BEHIND[behind]()], device="cpu")
    )
    seen = []
    for model in models:
        given = [features(model, TEXTS[i : i + 4]) for i in (0, 4)]
        labels = torch.tensor([0.1, 0.9, 0.4, 0.7]).to(next(model.parameters()).dtype)
        seen.append(gradients(model, LOSSES[name](model.train())(given, labels)))
    assert_same(*seen)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_is_all_there_is(side, saved):
    """Without a token to pool, "cls" takes column 0, a padded one on the left."""
    first = base.Transformer(saved())
    first.tokenizer.padding_side = side
    pooling = own.Pooling(WIDTH, "cls", include_prompt=False)
    models, _ = copies(st.SentenceTransformer(modules=[first, pooling], device="cpu"))
    seen = []
    for model in models:
        given = [features(model, TEXTS[i : i + 4]) | {"prompt_length": 40} for i in (0, 4)]
        seen.append(gradients(model, plain.MultipleNegativesRankingLoss(model)(given, None)))
    assert_same(*seen)


def test_cross_encoder(saved):
    for family in "Bert", "Roberta", "DistilBert":
        folder = saved(family, "ForSequenceClassification", num_labels=1)
        models, _ = copies(st.CrossEncoder(folder, device="cpu", max_length=32))
        pairs = list(zip(TEXTS[:8], TEXTS[8:16], strict=True))
        assert_same(*({"scores": m.predict(pairs, convert_to_tensor=True)} for m in models))
        seen = []
        for model in models:
            model.train()
            width = next(model.parameters()).dtype
            batch = [TEXTS[:4], TEXTS[4:8]]
            for loss, labels in (
                (cross_losses.BinaryCrossEntropyLoss(model), torch.tensor([0.0, 1.0, 1.0, 0.0])),
                (cross_losses.MSELoss(model), torch.tensor([0.3, 0.1, 0.9, 0.4])),
                (cross_losses.MultipleNegativesRankingLoss(model, num_negatives=None), None),
            ):
                value = loss(batch, labels if labels is None else labels.to(width))
                seen.append(
                    {f"{type(loss).__name__} {k}": t for k, t in gradients(model, value).items()}
                )
        third = len(seen) // 3
        for i in range(third):
            assert_same(seen[i], seen[third + i], seen[2 * third + i])


def test_logit_score(saved):
    """It takes the last column, whatever the mask."""
    first = base.Transformer(saved("Bert", "ForMaskedLM"), transformer_task="fill-mask")
    score = LogitScore(7, 9, module_input_name="token_embeddings")
    models, _ = copies(st.SentenceTransformer(modules=[first, score], device="cpu"))
    assert_same(*(floats(m(features(m))) for m in models))


@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_sparse_encoder(strategy, saved):
    first = base.Transformer(saved("Bert", "ForMaskedLM"), transformer_task="fill-mask")
    models, _ = copies(
        st.SparseEncoder(modules=[first, sparse.SpladePooling(strategy)], device="cpu")
    )
    assert_same(*({"embeddings": m.encode(TEXTS[:6]).to_dense()} for m in models))
    seen = []
    for model in models:
        inner = sparse_losses.SparseMultipleNegativesRankingLoss(model.train())
        loss = sparse_losses.SpladeLoss(
            model, inner, document_regularizer_weight=0.1, query_regularizer_weight=0.1
        )
        given = [features(model, TEXTS[i : i + 4]) for i in (0, 4)]
        value = loss(given, None)
        seen.append(gradients(model, sum(value.values()) if isinstance(value, dict) else value))
    assert_same(*seen)
    torch.manual_seed(7)
    modules = [
        base.Transformer(saved()),
        own.Pooling(WIDTH),
        sparse.SparseAutoEncoder(WIDTH, 64, 8),
    ]
    models, _ = copies(st.SparseEncoder(modules=modules, device="cpu"))
    assert_same(*({"embeddings": m.encode(TEXTS[:6]).to_dense()} for m in models))


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("pooling", [None, "hierarchical", "lambda"])
def test_multi_vector_encoder(pooling, attend, saved):
    """Query expansion scores tokens whose mask is 0."""
    torch.manual_seed(7)
    last = {
        None: [],
        "hierarchical": [multi.HierarchicalTokenPooling(2.0)],
        "lambda": [
            multi.LambdaTokenPooling(lambda e: e[: len(e) // 2 * 2].view(-1, 2, e.shape[1]).mean(1))
        ],
    }
    dense = base.Dense(
        module_input_name="token_embeddings",
        in_features=WIDTH,
        out_features=16,
        activation_function=None,
    )
    modules = [
        base.Transformer(saved()),
        dense,
        multi.MultiVectorMask(),
        base.Normalize("token_embeddings"),
        *last[pooling],
    ]
    model = st.MultiVectorEncoder(modules=modules, device="cpu")
    model[0].query_expansion = {"strategy": "fixed", "attend": attend, "token": None, "length": 16}
    models, _ = copies(model)
    seen = []
    for model in models:
        queries = model.encode_query(TEXTS[:4])
        documents = model.encode_document(TEXTS[4:10])
        raw = floats({"raw": model.encode_query(TEXTS[:4], output_value=None)})
        scores = model.similarity(queries, documents).double()
        seen.append(floats({"queries": queries, "documents": documents, "scores": scores}) | raw)
        if pooling is None:
            loss = multi_losses.MultiVectorMultipleNegativesRankingLoss(model.train())
            given = [
                features(model, TEXTS[:4], task="query"),
                features(model, TEXTS[4:8], task="document"),
            ]
            seen[-1] |= gradients(model, loss(given, None))
            model.eval()
    assert_same(*seen)
