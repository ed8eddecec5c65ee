"""Frozen encoders where few models come: ends of tiles and of functions, masks with holes, memory
that an earlier call left, numbers that are none."""

import math

import pytest
import torch
from helpers import apart, close_to_truth, exact
from test_frozen import BOUND, SHAPES, batch, build, frozen

from bertfast.encoder.batch import PackedSequences

pytestmark = pytest.mark.filterwarnings("error:int8")
each_precision = pytest.mark.parametrize("precision", BOUND)


@each_precision
def test_masks_with_holes(precision):
    """A token's position is its column, however many before it are masked."""
    model, given = build(), batch((40, 17, 33))
    given["attention_mask"][:, 3:30:2] = 0
    real = given["attention_mask"] == 1
    with torch.inference_mode():
        found = frozen(model, precision)(**given).last_hidden_state
    truth = exact(model, given).last_hidden_state
    close_to_truth(found[real], truth[real], floor=BOUND[precision])
    assert not found[~real].any()


@each_precision
@pytest.mark.parametrize("inner", [64, 61, 62, 63, 65])
def test_every_inner_activation_counts(precision, inner, monkeypatch):
    """Whatever is left of the sizes that a tile takes: the last one alone is not 0."""
    monkeypatch.setitem(SHAPES, "last", (64, 2, inner))
    model = build("last")
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate.dense.bias.fill_(-20)  # whose GELU is 0
            layer.intermediate.dense.bias[-1] = 3
            layer.output.dense.weight[:, -1].mul_(4)
    given = batch((9,))
    with torch.inference_mode():
        found = frozen(model, precision)(**given).last_hidden_state
    close_to_truth(found, exact(model, given).last_hidden_state, floor=BOUND[precision])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gelu_to_its_ends(precision):
    """A layer that is LN(GELU(c)), at 64 values c of [-6, 6]: within what the kernel's fit is off
    and one rounding to the precision."""
    model = build("inner")
    at, layer = torch.linspace(-6, 6, 64), model.encoder.layer[0]
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.zero_()
        layer.intermediate.dense.bias[:64] = at
        layer.output.dense.weight[:, :64] = torch.eye(64)
        layer.output.LayerNorm.weight.fill_(1)
    del model.encoder.layer[1:]
    with torch.inference_mode():
        sequences = PackedSequences(torch.tensor([0, 1], dtype=torch.int32), 1)
        found = frozen(model, precision).encoder(torch.randn(1, 64), sequences, None)[0].double()
    truth = torch.nn.functional.gelu(at.double())
    error = ((found - found[0]) * truth.std(correction=0) - truth).abs()  # truth[0] is 0
    allowed = {"fp32": 1e-6, "bf16": 3e-4 + 2**-8 * truth.abs()}[precision]
    assert (error <= allowed).all(), at[error > allowed]


@each_precision
def test_memory_of_an_earlier_call(precision):
    """NaN in it reaches no result of a size that fills no tile."""
    large, odd, given = frozen(build(), precision), frozen(build("odd"), precision), batch((40, 17))
    with torch.inference_mode():
        before = odd(**given).last_hidden_state
        large.embeddings.LayerNorm.weight[:] = math.nan
        assert large(**batch((130, 130))).last_hidden_state.isnan().all()
        assert torch.equal(odd(**given).last_hidden_state, before)


@each_precision
def test_a_nan_of_any_bits_stays_one(precision):
    """Rounded to bf16 as a number, one of all bits would be -0."""
    for bits in (0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1):
        model = build()
        weight = model.encoder.layer[2].output.dense.weight.data
        weight[0, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        assert weight[0, 0].isnan()
        if precision == "int8":
            with pytest.warns(UserWarning, match="int8"):
                model = frozen(model, precision)
        else:
            model = frozen(model, precision)
        with torch.inference_mode():
            assert model(**batch((4,))).last_hidden_state[0].isnan().all()


@each_precision
def test_a_nan_spreads_over_its_sequence(precision):
    """From one channel of a token, in one layer: its key and value, though int8, are NaN too."""
    model = build()
    del model.encoder.layer[1:]
    model = frozen(model, precision)
    sequences = PackedSequences(torch.tensor([0, 2, 4], dtype=torch.int32), 2)
    hidden = torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        clean = model.encoder(hidden, sequences, None)
        for bad in (math.nan, math.inf, -math.inf):
            for channel in (0, 77, 127):
                one = hidden.clone()
                one[2, channel] = bad
                found = model.encoder(one, sequences, None)
                assert not found[2:].isfinite().any(), (bad, channel)
                assert apart(found[:2], clean[:2]) < 2e-6
