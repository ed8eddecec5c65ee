"""Gradients by example, beside autograd's and Opacus'."""

import copy

import numpy as np
import pytest
import torch
import transformers
from helpers import refused
from torch.nn import functional as F

import bertfast
from bertfast.data import collate
from bertfast.train import ConfigError
from bertfast.train.packed import Packed
from bertfast.train.private import examples, gradients
from bertfast.train.private.gradients import clipped
from bertfast.train.private.membership import membership_auc
from bertfast.train.private.sampler import draw, parts

LENGTHS = [3, 17, 5, 20, 2, 9, 30, 1]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 32, "vocab_size": 20}


def model_of(**options):
    """Ours, with norms and biases that aren't ones and zeros."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES | {"initializer_range": 0.2} | options)
    model = bertfast.BertForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.1 * torch.randn(p.shape)
    return model


def rows(lengths=LENGTHS):
    """Ids come several times in a text."""
    r = np.random.default_rng(0)
    return [
        {
            "input_ids": r.integers(1, 12, n).tolist(),
            "token_type_ids": (np.arange(n) > n // 2).astype(int).tolist(),
            "labels": i % 3,
        }
        for i, n in enumerate(lengths)
    ]


def losses(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


def by_autograd(model, batch, clip):
    """(the clipped sum by name, the norms), from a backward for each example."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    packed = batch.input_ids, batch.cu_seqlens, batch.max_seqlen
    logits = model.packed_logits(*packed, batch.position_ids, batch.token_type_ids)
    total, norms = {name: 0 for name in named}, []
    for loss in losses(logits, batch.targets):
        grads = torch.autograd.grad(loss, [*named.values()], retain_graph=True)
        norms.append(sum(g.double().square().sum() for g in grads).sqrt())
        factor = min(1.0, clip / (norms[-1].item() + 1e-6))
        total = {n: total[n] + factor * g for n, g in zip(named, grads, strict=True)}
    return total, torch.stack(norms)


def check(actual, expected, limit):
    """Every parameter, relative; those whose gradients are zero (keys' biases) beside all."""
    whole = torch.cat([g.flatten().double() for g in expected.values()]).norm()
    assert {*actual} == {*expected} and whole > 0
    for name, g in expected.items():
        scale = g.norm() if g.norm() > 1e-6 * whole else whole
        error = ((actual[name] - g).norm() / scale).item()
        assert error <= limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("way", "act"),
    [("plain", "gelu_new"), ("plain", "relu")]
    + [(way, "gelu") for way in ("dropout", "frozen", "one")],
)
def test_norms_and_sums_as_autograd(way, act, dtype):
    """one: all texts of one token."""
    model = model_of(hidden_act=act).to(dtype)
    model.train(way == "dropout")
    if way == "frozen":
        for module in (model.bert.embeddings, model.bert.encoder.layer[0]):
            module.requires_grad_(False)
    batch = Packed.of_rows(rows([1] * 8 if way == "one" else LENGTHS))
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    found, norms = clipped(model, batch, losses, 1.0)
    torch.manual_seed(3)
    expected, truth = by_autograd(other, batch, 1.0)
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    assert ((norms - truth) / truth).abs().max() <= limit and (truth > 1).any()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    check(grads, expected, limit)
    assert found.shape == (8,) and found.isfinite().all()


def test_both_forms_of_a_norm():
    """More rows than columns take the product, fewer the rows' likeness."""
    torch.manual_seed(0)
    starts = torch.tensor([0, 3, 4, 90])
    x, grad = torch.randn(90, 12), torch.randn(90, 8)
    found = examples.Segments(starts).squares(x, grad)
    own = [(grad[a:b].T @ x[a:b]).double().square().sum() for a, b in ((0, 3), (3, 4), (4, 90))]
    assert torch.allclose(found, torch.stack(own), rtol=1e-5)


@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_as_opacus(clip):
    """Its clipped sum on the stock model with the same weights, padded, in fp64."""
    opacus = pytest.importorskip("opacus")
    from opacus.optimizers import DPOptimizer

    ours = model_of(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    config = copy.deepcopy(ours.config)
    config._attn_implementation = "eager"
    stock = transformers.BertForSequenceClassification(config).double().train()
    stock.load_state_dict(ours.state_dict())
    module = opacus.GradSampleModule(stock, loss_reduction="sum")
    data = collate(rows(), 0)
    labels = data.pop("labels")
    # Its hooks take one row of positions for an example.
    data["position_ids"] = torch.arange(data["input_ids"].shape[1]).expand_as(data["input_ids"])
    losses(module(**data).logits, labels).sum().backward()
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer = DPOptimizer(
        sgd, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=8, loss_reduction="sum"
    )
    norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in optimizer.params]).norm(
        dim=0
    )
    optimizer.clip_and_accumulate()
    expected = {n: p.summed_grad for n, p in stock.named_parameters()}
    _, found = clipped(ours, Packed.of_rows(rows()), losses, clip)
    check({n: p.grad for n, p in ours.named_parameters()}, expected, 1e-5)
    assert torch.allclose(found, norms, rtol=1e-5)


def test_parts_add_up():
    whole, cut = model_of().eval(), model_of().eval()
    clipped(whole, Packed.of_rows(rows()), losses, 0.5)
    for own in parts(rows(), 3):
        clipped(cut, Packed.of_rows(own), losses, 0.5)
    expected = {n: p.grad for n, p in whole.named_parameters()}
    check({n: p.grad for n, p in cut.named_parameters()}, expected, 1e-5)


def test_no_example_weighs_more_than_the_clip():
    model = model_of().eval()
    for row in rows():
        model.zero_grad()
        clipped(model, Packed.of_rows([row]), losses, 0.01)
        norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
        assert 0.0099 < norm <= 0.01 * (1 + 1e-6)


def test_models_that_it_refuses():
    config = transformers.RobertaConfig(**SIZES)
    stock = transformers.RobertaForSequenceClassification(config)
    refused(ConfigError, "RobertaForSequenceClassification.*BERT", gradients.check, stock)
    tied = model_of()
    tied.bert.encoder.layer[1].output.dense.weight = tied.bert.encoder.layer[0].output.dense.weight
    refused(ConfigError, "shares", gradients.check, tied)
    partly = model_of()
    partly.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    batch = Packed.of_rows(rows())
    refused(RuntimeError, "no norms by example", clipped, partly, batch, losses, 1.0)
    assert all(p.grad is None for p in partly.parameters())


def test_poisson_sampling():
    """Each example by itself: sizes are binomial, every pair is drawn with the rate's square."""
    rng, n, rate, times = np.random.default_rng(0), 20, 0.15, 4000
    drawn = np.zeros((times, n), bool)
    for i in range(times):
        chosen = draw(n, rate, rng)
        assert chosen == sorted({*chosen})
        drawn[i, chosen] = True
    sizes, error = drawn.sum(1), (rate * (1 - rate) / times) ** 0.5
    assert np.abs(drawn.mean(0) - rate).max() < 4.5 * error
    assert sizes.var() == pytest.approx(n * rate * (1 - rate), rel=0.15)
    assert (sizes == 0).mean() == pytest.approx((1 - rate) ** n, rel=0.25)
    both = (drawn.T.astype(float) @ drawn)[np.triu_indices(n, 1)] / times
    assert both.mean() == pytest.approx(rate**2, rel=0.1)
    assert draw(5, 1.0, rng) == [0, 1, 2, 3, 4]
    assert [len(p) for p in parts([*range(11)], 4)] == [3, 4, 4] and parts([], 4) == []


def test_membership_auc():
    sklearn = pytest.importorskip("sklearn.metrics")
    r = np.random.default_rng(0)
    members, others = r.normal(0, 1, 50).round(1), r.normal(0.5, 1, 70).round(1)
    truth = [1] * 50 + [0] * 70
    expected = sklearn.roc_auc_score(truth, -np.concatenate([members, others]))
    assert membership_auc(members, others) == pytest.approx(expected, abs=1e-12)
