"""All layers in one call on a GPU, frozen or not, and the operators one by one beyond its limits.

Without a GPU it runs on the CPU, in an extension built with BERTFAST_CUDA_HOST.
"""

import copy
import pickle

import pytest
import torch
from helpers import DEVICES, close_to_truth, exact, refused
from test_frozen import batch, build
from test_whole_cpu import agrees_with_operators, some_bias
from torch.nn.functional import cosine_similarity

import bertfast
from bertfast.encoder import Batch, run
from bertfast.encoder.batch import PackedSequences, Packing, PaddedPacking
from bertfast.encoder.executors import whole_cuda

pytestmark = pytest.mark.skipif("cuda" not in DEVICES, reason="the extension has no CUDA kernels")
BOUND = {"bf16": 0.025, "fp16": 0.005}  # beside the fp64 truth
LENGTHS = [(40, 1, 17, 0, 33), (3,)]


@pytest.fixture(autouse=True)
def forced():
    with bertfast.backend("cuda"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The tokens of each call of the whole encoder."""
    seen, forward = [], whole_cuda.forward

    def counting(spec, address, count, batch):
        seen.append(len(batch.hidden))
        return forward(spec, address, count, batch)

    monkeypatch.setattr(whole_cuda, "forward", counting)
    return seen


def frozen(model, precision):
    return bertfast.freeze(copy.deepcopy(model).to(DEVICES["cuda"]), precision)


def there(given):
    return {k: v.to(DEVICES["cuda"]) for k, v in given.items()}


def close_states(actual, expected, given, precision):
    real = given["attention_mask"] == 1
    close_to_truth(actual.cpu()[real], expected[real], floor=BOUND[precision])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.usefixtures("guarded")
def test_same_states(precision, act, lengths, calls):
    model, given = build(act=act), batch(lengths)
    expected = exact(model, given)
    with torch.inference_mode():
        actual = frozen(model, precision)(**there(given))
    assert calls == [sum(lengths)]
    real = given["attention_mask"] == 1
    a, e = actual.last_hidden_state.cpu(), expected.last_hidden_state
    assert a.dtype == torch.float32 and (a[~real] == 0).all()
    close_states(a, e, given, precision)
    assert cosine_similarity(a[real].double(), e[real], dim=1).min() > 0.9998


@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_heads(cls, calls):
    """A classifier's last layer runs for the first tokens alone."""
    model, given = build(cls=cls), batch((5, 9, 2, 30))
    expected = exact(model, given).logits
    with torch.inference_mode():
        actual = frozen(model, "fp16")(**there(given)).logits
    assert calls == [46]
    close_to_truth(actual, expected, floor=0.02)


def test_hidden_states(calls):
    model, given = build(), batch((20, 7))
    expected = exact(model, given | {"output_hidden_states": True}).hidden_states
    with torch.inference_mode():
        states = frozen(model, "fp16")(**there(given), output_hidden_states=True).hidden_states
    assert calls == [27] * 3  # layer by layer
    for a, e in zip(states, expected, strict=True):
        close_to_truth(a, e, floor=BOUND["fp16"])


@pytest.mark.parametrize("shape, few", [("even", 20), ("odd", 512)])
def test_beyond_its_limits(shape, few, calls, monkeypatch):
    """Too many tokens, or sizes that it doesn't take: the operators one by one."""
    monkeypatch.setattr(whole_cuda, "FEW_TOKENS", few)
    model, given = build(shape), batch((20, 7))
    expected = exact(model, given).last_hidden_state
    with torch.inference_mode():
        actual = frozen(model, "fp16")(**there(given)).last_hidden_state.cpu()
    assert not calls
    close_states(actual, expected, given, "fp16")


def test_half_precision_model(calls):
    """Nothing is cast on the way."""
    model, given = build(), batch((20, 7))
    expected = exact(model, given).last_hidden_state
    with torch.inference_mode():
        actual = frozen(model.bfloat16(), "bf16")(**there(given)).last_hidden_state.cpu()
    assert actual.dtype == torch.bfloat16 and calls == [27]
    close_states(actual, expected, given, "bf16")


def test_weights_that_change(calls):
    """A model that isn't frozen goes the same way, by the weights that it has then."""
    model, given = build(), batch((20, 7))
    ours = copy.deepcopy(model).to(DEVICES["cuda"], torch.bfloat16)
    for scale in (1.0, 0.5):
        for m in (model, ours):
            with torch.no_grad():
                for layer in m.encoder.layer:
                    layer.intermediate.dense.weight.mul_(scale)
        expected = exact(model, given).last_hidden_state
        with torch.no_grad():
            actual = ours(**there(given)).last_hidden_state
        close_states(actual, expected, given, "bf16")
    assert calls == [27, 27]
    with torch.no_grad(), bertfast.executor("node"):
        other = ours(**there(given)).last_hidden_state
    with torch.no_grad():
        ours.float()(**there(given))  # not in fp32
    assert calls == [27, 27]
    close_states(other, expected, given, "bf16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low", [True, False])
def test_bias_and_padded_rows(dtype, low, calls):
    """A bias on the scores, in either precision, and padding that is queries alone."""
    model, mask = build(), batch((40, 17, 0))["attention_mask"]
    model = model.to(DEVICES["cuda"], dtype)
    packing = PaddedPacking(Packing(3, 40, mask.to(DEVICES["cuda"]), DEVICES["cuda"]))
    hidden = torch.randn(120, model.config.hidden_size).to(DEVICES["cuda"], dtype)
    shape = 3, model.config.num_attention_heads, 40, 40
    bias = some_bias(*shape, dtype=dtype if low else torch.float32).to(DEVICES["cuda"])
    with torch.no_grad():
        found, _ = run(model.encoder.describe(), Batch.of(hidden, packing, bias=bias))
        agrees_with_operators(found, model, hidden, packing, bias)
    assert calls == [120]


def test_more_rows_than_tokens(calls):
    """A classifier's first tokens where nearly all texts are empty; memory around is untouched."""
    model, given = build(cls="BertForSequenceClassification"), batch((5, *(0,) * 40))
    expected = exact(model, given).logits
    with torch.inference_mode():
        actual = frozen(model, "fp16")(**there(given)).logits.cpu()
    assert calls == [5]
    close_to_truth(actual[0], expected[0], floor=0.02)


def test_empty_batch():
    given = {k: v[:2] for k, v in batch((0, 0, 3)).items()}
    with torch.inference_mode():
        assert not frozen(build(), "bf16")(**there(given)).last_hidden_state.any()


def test_refusals():
    refused(ValueError, "'int8', expected one of bf16, fp16", frozen, build(), "int8")
    small = frozen(build(), "bf16")
    refused(ValueError, "isn't frozen", bertfast.freeze, small, "bf16")
    refused(TypeError, "can't be pickled", pickle.dumps, small)
    starts = PackedSequences(torch.tensor([0, 2], dtype=torch.int32, device="meta"), 2)
    elsewhere = torch.zeros(2, 128, device="meta")
    refused(
        RuntimeError, "on meta, a frozen encoder stays on", small.encoder, elsewhere, starts, None
    )
    small.train()
    refused(RuntimeError, "eval mode", small, **there(batch((4,))))
