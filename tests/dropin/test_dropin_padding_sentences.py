"""sentence-transformers' modules behind an accelerated Transformer, on padded batches.

Its own package is the table: a module that it adds fails `test_every_module_is_here`.
"""

import importlib
import inspect
import pkgutil

import pytest
import torch
from padded import assert_same, assert_told, every, gradients
from sentences import TEXTS, VOCABULARY, WIDTH, copies, features, floats

st = pytest.importorskip("sentence_transformers", minversion="6")

from sentence_transformers.base import modules as base  # noqa: E402
from sentence_transformers.cross_encoder import modules as cross  # noqa: E402
from sentence_transformers.multi_vector_encoder import modules as multi  # noqa: E402
from sentence_transformers.sentence_transformer import modules as own  # noqa: E402
from sentence_transformers.sparse_encoder import modules as sparse  # noqa: E402


class Lengths(base.Module):
    """What the LSTM asks for."""

    def forward(self, features):
        return features | {"sentence_lengths": features["attention_mask"].sum(1)}

    def save(self, *args, **kwargs):
        pass


class MeanOfAll(Lengths):
    """A user's module that does not look at the mask."""

    def forward(self, features):
        return features | {"sentence_embedding": features["token_embeddings"].mean(1)}


class Shifted(own.Pooling):
    """A user's pooling, of the position before each sequence's last."""

    def forward(self, features):
        return features | {"sentence_embedding": features["token_embeddings"][:, -2]}


class Widened(Lengths):
    """A user's module that lets the pooling behind it see every position."""

    def forward(self, features):
        return features | {"attention_mask": torch.ones_like(features["attention_mask"])}


def hooked(pooling):
    """Averages tokens over all positions in a hook."""

    def hook(module, args, output):
        return output | {"sentence_embedding": args[0]["token_embeddings"].mean(1)}

    pooling.register_forward_hook(hook)
    return pooling


def by_hand(pooling):
    pooling.forward = lambda features: (
        features | {"sentence_embedding": features["token_embeddings"].mean(1)}
    )
    return pooling


def pool(mode="mean", width=WIDTH, **options):
    return own.Pooling(width, mode, **options)


def weights():
    words = [str(i) for i in range(VOCABULARY)]
    return own.WordWeights(words, {w: 0.1 + int(w) % 7 for w in words})


def tokens(make, **options):
    return make(module_input_name="token_embeddings", **options)


MODES = own.Pooling.POOLING_MODES
PIPELINES = {f"pooling {mode}": lambda mode=mode: [pool(mode)] for mode in MODES} | {
    "poolings": lambda: [pool(tuple(MODES))],
    "dense": lambda: [pool(), base.Dense(WIDTH, 16), base.Normalize()],
    "layer norm": lambda: [pool("cls"), own.LayerNorm(WIDTH), own.Dropout(0.0)],
    "word weights": lambda: [weights(), pool()],
    "token dense": lambda: [
        tokens(base.Dense, in_features=WIDTH, out_features=16),
        pool("max", 16),
    ],
    "token normalize": lambda: [tokens(base.Normalize), MeanOfAll()],
    "residual dense": lambda: [
        tokens(
            base.Dense,
            in_features=WIDTH,
            out_features=16,
            module_output_name="sentence_embedding",
            use_residual=True,
        ),
        pool(),
    ],
    "cnn": lambda: [own.CNN(WIDTH, 8), pool("mean", 24)],
    "strided cnn": lambda: [own.CNN(WIDTH, 8, [3], [2]), pool("mean", 8)],
    "lstm": lambda: [Lengths(), own.LSTM(WIDTH, 8), pool("mean", 16)],
    "weighted layers": lambda: [own.WeightedLayerPooling(WIDTH, 2, 0), pool()],
    "weighted layers, cnn": lambda: [
        own.WeightedLayerPooling(WIDTH, 2, 1),
        own.CNN(WIDTH, 8),
        pool("max", 24),
    ],
    "mean of all": lambda: [MeanOfAll()],
    "own pooling": lambda: [Shifted(WIDTH)],
    "wide mask": lambda: [Widened(), pool()],
    "wide mask later": lambda: [pool(), Widened(), pool("max")],
    "hook": lambda: [hooked(pool())],
    "instance forward": lambda: [by_hand(pool())],
    "two poolings": lambda: [pool("cls"), pool("mean")],
    "nothing": lambda: [],
}
ELSEWHERE = {
    "Transformer": "every pipeline starts with it",
    "MLMTransformer": "a Transformer of an older name",
    "Router": "test_dropin_padding_losses.py",
    "Asym": "a Router of an older name",
    "SpladePooling": "test_dropin_padding_losses.py",
    "SparseAutoEncoder": "test_dropin_padding_losses.py",
    "LogitScore": "test_dropin_padding_losses.py",
    "MultiVectorMask": "test_dropin_padding_losses.py",
    "HierarchicalTokenPooling": "test_dropin_padding_losses.py",
    "LambdaTokenPooling": "test_dropin_padding_losses.py",
    "BaseTokenPooling": "abstract",
    "Module": "abstract",
    "InputModule": "abstract",
    "StaticEmbedding": "an input without an encoder",
    "SparseStaticEmbedding": "an input without an encoder",
    "BoW": "an input without an encoder",
    "WordEmbeddings": "an input without an encoder",
    "CLIPModel": "another architecture",
}


def test_every_module_is_here():
    found = set()
    for package in (base, own, cross, sparse, multi):
        for entry in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(entry.name)
            found |= {
                n for n, c in vars(module).items()
                if inspect.isclass(c) and issubclass(c, base.Module) and c.__module__ == entry.name
            }  # fmt: skip
    used = {type(m).__name__ for make in PIPELINES.values() for m in make()}
    assert found - used - ELSEWHERE.keys() == set()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name, side, saved):
    torch.manual_seed(7)
    options = {"config_kwargs": {"output_hidden_states": True}} if "layers" in name else {}
    first = base.Transformer(saved(), **options)
    first.tokenizer.padding_side = side
    models, report = copies(
        st.SentenceTransformer(modules=[first, *PIPELINES[name]()], device="cpu")
    )
    for value in ("sentence_embedding", "token_embeddings", None)[name == "nothing" :]:
        found = [m.encode(TEXTS[:6], output_value=value, convert_to_tensor=True) for m in models]
        assert_same(*(floats({"embeddings": f}) for f in found))
    seen = []
    for model in models:  # in a user's own loop, that reads whatever is there
        out = model.train()(features(model))
        read = {k: t for k, t in out.items() if k in ("sentence_embedding", "token_embeddings")}
        seen.append(floats(out) | gradients(model, every(read)))
    assert_same(*seen)
    assert_told(report)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_prompts_left_out(mode, side, saved):
    """The pooling's mask is not the encoder's."""
    first = base.Transformer(saved())
    first.tokenizer.padding_side = side
    models, _ = copies(
        st.SentenceTransformer(modules=[first, pool(mode, include_prompt=False)], device="cpu")
    )
    for prompt in "the cat ", "sun sea sun sea sun sea sun ":
        found = [m.encode([*TEXTS[:5], ""], prompt=prompt, convert_to_tensor=True) for m in models]
        keep = [t.isfinite().all(1) for t in found]
        assert torch.equal(keep[0], keep[1])
        assert_same(*({"embeddings": t[keep[0]]} for t in found))


def test_zeros(saved):
    """Asked for, padding is zeros and sentence embeddings are as they were."""
    model = st.SentenceTransformer(modules=[base.Transformer(saved()), pool()], device="cpu")
    models, _ = copies(model, padding="zeros")
    assert_same(*({"embeddings": m.encode(TEXTS[:6], convert_to_tensor=True)} for m in models))
    given = features(models[0])
    states = models[0][0](given)["token_embeddings"]
    assert not states[given["attention_mask"] == 0].any()
