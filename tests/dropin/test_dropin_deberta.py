"""DeBERTa-v2's own: relative positions, padding that sees all places alike, states of all layers."""

import copy

import pytest
import torch
from families import heads
from helpers import close_to_truth, relative
from padded import assert_same, every, observe, padded, stock, three
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

import bertfast
from bertfast import ops
from bertfast.encoder.spec import DROPOUTS
from bertfast.ops.dropout import keep_mask

FAMILY = "DebertaV2"
ONE = "one for all of a sequence's"


def of_length(n, vocabulary=90):
    g = torch.Generator().manual_seed(4)
    mask = (torch.arange(n) < torch.tensor([n, n // 3, n - 1])[:, None]).long()
    ids = torch.randint(5, vocabulary, (3, n), generator=g)
    return {"input_ids": ids * mask, "attention_mask": mask}


def same(models, given, loss=every):
    """At every place, and in every gradient."""
    assert_same(*(observe(m.eval(), given) for m in models))
    assert_same(*(observe(m.train(), given, loss) for m in models))


OPTIONS = [
    {"hidden_act": "gelu_new"},
    {"hidden_act": "relu"},
    {"hidden_act": "silu"},
    *({"pos_att_type": kinds, "share_att_key": share}
      for kinds in (["c2p"], ["p2c"], ["c2p", "p2c"], "p2c|c2p", "C2P", None)
      for share in (False, True)),
    {"position_buckets": -1},
    {"position_buckets": 4},
    {"position_buckets": 30},
    {"position_buckets": -1, "max_relative_positions": 4},
    {"max_relative_positions": 10},
    {"max_relative_positions": 4, "position_buckets": 16},
    {"norm_rel_ebd": "none"},
    {"norm_rel_ebd": "layer_norm|batch_norm"},
    {"type_vocab_size": 3},
    {"position_biased_input": True},
    {"embedding_size": 32},
    {"layer_norm_eps": 1e-3},
    {"relative_attention": False, "pos_att_type": None},
    {"legacy": False},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options):
    models, report = three(stock(FAMILY, "ForMaskedLM", **options))
    same(models, padded())
    assert report.fused == 2 and not any(report.fallbacks.values()), report


@pytest.mark.parametrize(
    "options, why",
    [
        ({"conv_kernel_size": 3, "conv_groups": 2}, "convolution"),
        ({"relative_attention": False}, "scaled for relative positions"),
        ({"hidden_act": "tanh"}, "no kernel has"),
    ],
)
def test_options_that_are_left_to_stock(options, why):
    (ours, *others), report = three(stock(FAMILY, **options))
    same((ours, *others), padded())
    assert report.fused == 0 and why in str(report)
    bertfast.restore(ours)
    with pytest.raises(bertfast.dropin.AccelerationError, match=why):
        bertfast.accelerate(ours, strict=True)
    bertfast.accelerate(ours)
    with pytest.raises(ValueError, match=why):
        bertfast.freeze(ours)


@pytest.mark.parametrize("length", [1, 40, 100])
@pytest.mark.parametrize("longest", [-1, 10, 64])
@pytest.mark.parametrize("buckets", [-1, 8])
def test_lengths(buckets, longest, length):
    """Beyond the buckets, the largest distance and the number of positions."""
    options = {"position_buckets": buckets, "max_relative_positions": longest}
    models, report = three(stock(FAMILY, **options))
    same(models, of_length(length))
    assert not any(report.fallbacks.values())


@pytest.mark.parametrize("kind", ["right", "left"])
@pytest.mark.parametrize("head", heads(FAMILY))
def test_one_row_for_all_padding(head, kind):
    """In inference, where all come as zeros."""
    models, report = three(stock(FAMILY, head), padding="stock")
    given = padded(head, kind)
    assert_same(*(observe(m, given) for m in models))
    assert ONE in str(report)
    assert_same(*(observe(m, given, every) for m in models))
    assert ONE not in str(report) and "as in the stock model" in str(report)
    with torch.no_grad():
        models[0].train()(**given)
        assert ONE in str(report)  # without dropout
        models[0].base_model.encoder.layer[1].output.dropout.p = 0.1
        models[0](**given)
        assert ONE not in str(report)


def test_padding_that_comes_in_other_rows():
    models, report = three(stock(FAMILY))
    mask, g = padded()["attention_mask"], torch.Generator().manual_seed(3)
    states = torch.randn(4, 17, 48, generator=g)
    found = []
    for m in models:
        with torch.no_grad():
            found.append(m.encoder(states.to(m.dtype), mask)[0])
    close_to_truth(found[0], found[2], found[1])
    assert ONE not in str(report)
    zeros = states * mask.unsqueeze(-1)
    zeros[1, -1, 0] = torch.inf  # infects its own sequence alone
    with torch.no_grad():
        found = [m.encoder(zeros.to(m.dtype), mask)[0] for m in models]
    assert ONE not in str(report)
    for t in found:
        assert t[1, -1].isnan().all()
    close_to_truth(*(t[[0, 2, 3]] for t in (found[0], found[2], found[1])))


def test_double():
    theirs = stock(FAMILY, "ForTokenClassification").double()
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours, "reference")
    for loss in (None, every):
        found, expected = (observe(m, padded(), loss) for m in (ours, theirs))
        for name, t in expected.items():
            assert relative(found[name], t) < 1e-9 or t.norm() < 1e-12, name
    assert not any(report.fallbacks.values())


class Masked(nn.Module):
    """Dropout by a given mask."""

    def __init__(self, keep, p):
        super().__init__()
        self.keep, self.p = keep, p

    def forward(self, x):
        return torch.where(self.keep, x / (1 - self.p), 0)


def test_dropout(monkeypatch):
    """Of probabilities, padded rows' too, and of relative embeddings: stock with the same masks."""
    p, rel_p, heads_, n = 0.4, 0.3, 3, 17
    theirs, given = stock(FAMILY), padded()
    ours, seeds = copy.deepcopy(theirs), ops.draw_seeds(2 * DROPOUTS)
    monkeypatch.setattr(ops, "draw_seeds", lambda *_: seeds)
    bertfast.accelerate(ours)
    mask = given["attention_mask"] == 1
    rank = torch.arange(mask.numel()).view(mask.shape)
    rank[~mask] = torch.arange(int((~mask).sum()))
    # Of the embeddings, those that 31 places to either side need.
    first = 8 + int(make_log_bucket_position(torch.tensor(-31), 8, 64))
    assert first == 1
    rows = rank[:, None] * heads_ + torch.arange(heads_)[:, None]
    for model in (ours, theirs):
        for i, layer in enumerate(model.encoder.layer):
            own = layer.attention.self
            own.dropout.p, own.pos_dropout.p = p, rel_p
            if model is theirs:
                seed, size = seeds[DROPOUTS * i], 2 * own.pos_ebd_size
                own.dropout = Masked(keep_mask(seed, rows, n, p), p)
                keep = keep_mask(seeds[DROPOUTS * i + 4], torch.arange(size) - first, 48, rel_p)
                own.pos_dropout = Masked(keep, rel_p)
    exact = copy.deepcopy(theirs).double()
    models = ours, theirs, exact
    assert_same(*(observe(m.train(), given, every) for m in models))


def test_states_of_layers(monkeypatch):
    """All of them for who reads them, and no layer is called for nobody."""
    models, report = three(stock(FAMILY))
    given, calls, cls = padded(), [], type(models[0].encoder.layer[0])
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    for n, asked in enumerate(({}, {"return_dict": False}, {"output_hidden_states": False})):
        with torch.no_grad():
            found = [m(**given, **asked) for m in models]
        assert len(found[0]) == len(found[1]) == 1 and not calls, n
    for asked in (
        {"output_hidden_states": True},
        {"output_hidden_states": True, "return_dict": False},
    ):
        with torch.no_grad():
            found = [m(**given, **asked) for m in models]
        states = [f[1] for f in found]
        assert len(states[0]) == len(states[1]) == 3 and len(calls) == 2
        for t in zip(*states, strict=True):
            close_to_truth(t[0], t[2], t[1])
        calls.clear()
    assert not any(report.fallbacks.values())


@pytest.mark.parametrize(
    "asked", [{}, {"return_dict": False}, {"output_hidden_states": False}, {"output_hidden_states": False, "return_dict": False}]
)  # fmt: skip
def test_the_encoder_alone(asked):
    models, report = three(stock(FAMILY))
    states = torch.randn(4, 17, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = [m.encoder(states.to(m.dtype), padded()["attention_mask"], **asked) for m in models]
    assert type(found[0]) is type(found[1])
    flat = [
        torch.utils._pytree.tree_leaves(list(f) if type(f) is tuple else dict(f)) for f in found
    ]
    flat = [[t for t in f if t is not None] for f in flat]
    assert len(flat[0]) == len(flat[1])
    for t in zip(*flat, strict=True):
        close_to_truth(t[0], t[2], t[1])
    assert not any(report.fallbacks.values())


@pytest.mark.parametrize("place", ["encoder", "encoder.layer.0", "encoder.layer.1"])
def test_hooks_see_what_stock_gives(place):
    models, report = three(stock(FAMILY))
    seen = []
    for m in models:
        m.get_submodule(place).register_forward_hook(lambda m, args, out: seen.append(out))
        with torch.no_grad():
            m(**padded())
    if place == "encoder":
        assert [len(out.hidden_states) for out in seen] == [3, 3, 3]
        seen = [out.hidden_states for out in seen]
    else:
        assert [out[1:] for out in seen] == [(None,)] * 3
        seen = [out[:1] for out in seen]
    for t in zip(*seen, strict=True):
        close_to_truth(t[0], t[2], t[1])
    assert not any(report.fallbacks.values())


class Subclass(type(stock(FAMILY))):
    """A user's, which reads the states that the encoder collects for it."""

    def forward(self, input_ids, attention_mask):
        states = self.embeddings(input_ids, mask=attention_mask)
        return {"sum": sum(self.encoder(states, attention_mask).hidden_states)}


def test_a_model_of_the_users():
    theirs = stock(FAMILY)
    theirs.__class__ = Subclass
    same(three(theirs)[0], padded())


def test_enhanced_mask_decoder():
    """More steps than one: the model calls the last layer itself, which fails in transformers."""
    (ours, theirs, _), _ = three(stock(FAMILY))
    errors = []
    for m in ours, theirs:
        m.z_steps = 2
        with pytest.raises(AttributeError) as raised:
            m(**padded())
        errors.append(str(raised.value))
    assert errors[0] == errors[1] and "append" in errors[0]


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda h, mask: {"query_states": h.flip(1)}, "query_states"),
        (lambda h, mask: {"relative_pos": torch.arange(17) - torch.arange(17)[:, None]}, "relative_pos"),
        (lambda h, mask: {"output_attentions": True}, "attention maps"),
        (lambda h, mask: {"attention_mask": mask[:, None] * torch.ones(4, 17, 17)}, r"shape [4, 17, 17]"),
        (lambda h, mask: {"attention_mask": mask[:, None, None].expand(4, 1, 17, 17)}, "[4, 1, 17, 17]"),
    ],
)  # fmt: skip
def test_calls_that_are_left_to_stock(make, why):
    (ours, theirs, _), report = three(stock(FAMILY))
    states, mask = torch.randn(4, 17, 48), padded()["attention_mask"]
    given = {"hidden_states": states, "attention_mask": mask} | make(states, mask)
    with torch.no_grad():
        found = [m.encoder(**given, return_dict=False) for m in (ours, theirs)]
    for a, b in zip(*(torch.utils._pytree.tree_leaves(f) for f in found), strict=True):
        assert torch.equal(a, b)
    assert why in str(report)


@pytest.mark.parametrize("changed", [None, 0, 1])
def test_gradient_checkpointing(changed):
    """And a layer that runs as its own class does, between fused ones."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    theirs = stock(FAMILY, "ForTokenClassification")
    if changed is not None:
        theirs.deberta.encoder.layer[changed].intermediate.dense.__class__ = Doubled
    models, report = three(theirs)
    models[0].gradient_checkpointing_enable({"use_reentrant": False})
    same(models, padded())
    assert report.fused == 2 - (changed is not None)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("targets", [["query_proj", "value_proj"], ["key_proj"], ["pos_key_proj"]])
def test_adapters(targets, share):
    peft = pytest.importorskip("peft")
    if share and targets == ["pos_key_proj"]:
        return
    models = []
    for i in range(3):
        model = stock(FAMILY, "ForSequenceClassification", share_att_key=share)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(5)
        models.append(peft.get_peft_model(model, config))
        if not i:
            report = bertfast.accelerate(models[0])
    models[2].double()
    same(models, padded())
    assert report.fused == 2 and not any(report.fallbacks.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(autocast):
    theirs = stock(FAMILY).bfloat16()
    exact = copy.deepcopy(theirs).double()
    theirs = theirs.float() if autocast else theirs
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    with torch.no_grad():
        truth = exact(**padded())[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = [m(**padded())[0].double() for m in (ours, theirs)]
    close_to_truth(found[0], truth, found[1])
    assert not any(report.fallbacks.values())


@pytest.mark.seconds
@pytest.mark.usefixtures("tape")
def test_replayed():
    """Longer batches leave remains in the buffers of shorter ones; padding has its row there."""
    models, report = three(stock(FAMILY))
    for loss in (None, every):
        for length in (30, 24, 17) * 3:
            for m in models:
                m.train(loss is not None)
            given = of_length(length)
            if loss:  # padded rows of their own are not recorded
                given["attention_mask"] = torch.ones_like(given["attention_mask"])
            assert_same(*(observe(m, given, loss) for m in models))
        ran = report.executors["encoder"]
        assert ran.startswith("graph of operators"), ran
    (n,) = report.graphs.values()
    assert n.hits == n.captures == n.misses == 6
    assert_same(*(observe(m, of_length(17), every) for m in models))
    assert "rows of padding that see all" in report.executors["encoder"]
