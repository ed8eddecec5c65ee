"""An encoder and a decoder beside transformers' on the same weights."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from families import close_gradients
from helpers import close_to_truth, refused
from native import config
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother
from translated import END, START, batch, ours, packed, pair

import bertfast
from bertfast import ops
from bertfast.model.translation_checkpoint import make_config

pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    given = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    return {n.replace("predictions.decoder.bias", "predictions.bias"): g for n, g in given}


def stock_loss(model, given, smoothing):
    output = model(**given)
    if not smoothing:
        return output.loss
    return LabelSmoother(smoothing)(output, given["labels"])


def tied_alike(model):
    """transformers' model with the encoder's tables in the decoder, too."""
    own, source = model.decoder.bert.embeddings, model.encoder.embeddings
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        getattr(own, name).weight = getattr(source, name).weight
    if model.config.decoder.tie_word_embeddings:
        model.decoder.cls.predictions.decoder.weight = own.word_embeddings.weight
    return model


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tie, head", [(True, True), (False, True), (False, False)])
def test_packed_loss_and_gradients(tie, head, smoothing):
    """Both are transformers' on the padded batch, against fp64."""
    stock, model = pair(tie=tie, head=head)
    stock = tied_alike(stock) if tie else stock
    given = batch()
    exact = tied_alike(copy.deepcopy(stock).double()) if tie else copy.deepcopy(stock).double()
    total, count = model.loss_packed(*packed(given), smoothing)
    assert count == (given["labels"] != -100).sum()
    losses = total / count, stock_loss(stock, given, smoothing), stock_loss(exact, given, smoothing)
    close_to_truth(losses[0], losses[2], losses[1], 1e-5)
    found = [gradients(m, loss) for m, loss in zip((model, stock, exact), losses, strict=True)]
    close_gradients(found[0], found[1], found[2], 1e-5)
    assert any("crossattention" in name for name in found[0])


def test_reference_in_fp64():
    """The same, to the last bits."""
    stock, model = (m.double() for m in pair())
    given = batch()
    with ops.backend("reference"):
        total, count = model.loss_packed(*packed(given), 0.2)
        own = gradients(model, total / count)
    logits = tied_alike(stock)(**given).logits  # the Trainer's smoother sums in fp32
    truth = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), label_smoothing=0.2)
    assert (total / count - truth).abs() < 1e-12 * truth
    expected = gradients(stock, truth)
    scale = max(g.abs().max() for g in expected.values())
    assert own.keys() == expected.keys()
    assert all((own[n] - g).abs().max() < 1e-12 * scale for n, g in expected.items())


def test_nothing_to_predict():
    """A zero, and zero gradients."""
    model, given = ours(), list(packed(batch()))
    given[-1] = torch.full_like(given[-1], -100)
    total, count = model.loss_packed(*given, 0.1)
    total.backward()
    assert total == 0 and count == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["right", "left", "holes", "none"])
def test_padded_forward(kind):
    """Loss, logits of real tokens and the encoder's states, whatever the sources' padding."""
    stock, model = pair()
    given = batch()
    mask = given["attention_mask"]
    if kind == "left":
        given["attention_mask"] = mask = mask.flip(1)
    elif kind == "holes":
        keep = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) < 0.6
        given["attention_mask"] = mask = mask * keep
        mask[:, 0] = 1
    elif kind == "none":
        given["attention_mask"], mask = None, torch.ones_like(mask)
    exact = copy.deepcopy(stock).double()
    with torch.no_grad():
        own, like, truth = (m(**given) for m in (model, stock, exact))
    real = given["labels"] != -100
    close_to_truth(own.loss, truth.loss, like.loss)
    close_to_truth(*(f.logits[real] for f in (own, truth, like)))
    states = (f.encoder_last_hidden_state[mask == 1] for f in (own, truth, like))
    close_to_truth(*states)
    assert not own.logits[~model.shifted(given["labels"]).ne(0)].any()
    assert isinstance(model(**given, return_dict=False), tuple)


def test_decoder_inputs_of_ones_own():
    stock, model = pair(tie=False)
    given = batch()
    del given["labels"]
    ids = torch.randint(5, 200, (4, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, 4:], mask[1, :2] = 0, 0
    given |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    with torch.no_grad():
        found = [m(**given).logits[mask == 1] for m in (model, stock.double())]
        close_to_truth(*found)


def test_bf16():
    """At most twice the error of transformers under autocast, against fp64."""
    stock, model = pair()
    given = batch()
    truth = stock_loss(copy.deepcopy(stock).double(), given, 0.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = [m(**given).logits[given["labels"] != -100] for m in (model, stock)]
        total, count = model.loss_packed(*packed(given))
    exact = copy.deepcopy(stock).double()(**given).logits[given["labels"] != -100].detach()
    errors = [(x.double() - exact).norm().item() for x in logits]
    assert errors[0] <= 2 * errors[1], errors
    assert (total / count - truth).abs() < 0.01 * truth


def test_dropout():
    """Another mask for each place and step, none in eval."""
    model, given = ours().train(), packed(batch())
    seeds = {tuple(s.tolist()) for s in model.decoder.bert._seeds("cpu")}
    assert len(seeds) == 1 + 5 * model.config.decoder.num_hidden_layers
    assert model.loss_packed(*given)[0] != model.loss_packed(*given)[0]
    model.eval()
    assert torch.equal(model.loss_packed(*given)[0], model.loss_packed(*given)[0])


def test_dropout_of_gradient_checkpointing():
    """The same masks where layers are recomputed."""
    model, given = ours().train(), packed(batch())

    def run(checkpointing):
        model.gradient_checkpointing_enable(checkpointing)
        torch.manual_seed(5)
        total, _ = model.loss_packed(*given)
        return total, gradients(model, total)

    (a, own), (b, again) = run(False), run(True)
    assert torch.equal(a, b) and all(torch.equal(own[n], again[n]) for n in own)


@pytest.mark.parametrize("place", ["self", "cross", "hidden"])
def test_each_dropout_drops(place):
    """Each alone changes the loss, and its mean over masks stays near."""
    model, given = ours(), packed(batch())
    plain = model.loss_packed(*given)[0].item()
    for layer in model.decoder.bert.encoder.layer:
        attention = {"self": layer.attention, "cross": layer.crossattention}.get(place)
        for module in (attention or layer).modules():
            if isinstance(module, torch.nn.Dropout):
                module.p, module.training = 0.1, True
        for m in (layer.attention.self, layer.crossattention.self):
            m.training = True
            m.dropout.p = m.dropout.p if place != "hidden" else 0.0
        others = {"self": layer.crossattention, "cross": layer.attention}.get(place)
        if others:
            others.self.training = False
    model.decoder.bert.training = True  # it draws
    with torch.no_grad():
        found = [model.loss_packed(*given)[0].item() for _ in range(8)]
    assert len(set(found)) == 8 and plain not in found
    assert abs(sum(found) / 8 / plain - 1) < 0.2


def test_hooks_and_adapters_do_what_they_do_in_transformers():
    stock, model = pair(tie=False)
    given, paths = batch(), ("intermediate.dense", "crossattention.self.key", "attention.output")
    for m in (stock, model):
        layer = m.decoder.bert.encoder.layer[1]
        for path in paths:
            layer.get_submodule(path).register_forward_hook(lambda m, x, y: y * 1.5)
        head = m.decoder.cls.predictions
        head.decoder.register_forward_hook(lambda m, x, y: y * 0.7)
    total, count = model.loss_packed(*packed(given), 0.1)
    exact = copy.deepcopy(stock).double()
    losses = [stock_loss(m, given, 0.1) for m in (exact, stock)]
    close_to_truth(total / count, *losses)


def test_round_trips(tmp_path):
    """Saved here it loads in transformers with equal outputs, and the reverse."""
    given = batch()
    for tie, head in ((True, True), (False, False)):
        model = ours(tie=tie, head=head)
        model.save_pretrained(tmp_path / "ours")
        stock = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "ours").eval()
        assert type(stock.config.encoder).__name__ == "BertConfig"
        stock.save_pretrained(tmp_path / "theirs")
        again = [
            bertfast.BertEncoderDecoder.from_pretrained(tmp_path / n) for n in ("ours", "theirs")
        ]
        with torch.no_grad():
            truth = copy.deepcopy(stock).double()(**given).loss
            for m in (stock, *again):
                close_to_truth(m(**given).loss, truth)
        for m in again:
            words = [m.encoder.embeddings, m.decoder.bert.embeddings]
            assert (words[0].word_embeddings.weight is words[1].word_embeddings.weight) == tie
            assert m.config.eos_token_id == END and m.new_weights == []
            assert not m.training
        assert stock.generation_config.eos_token_id == END
        shutil.rmtree(tmp_path / "ours")


def test_sizes_that_differ(tmp_path):
    """transformers' projection between an encoder and a decoder of another width."""
    wide = make_config(
        config(), decoder_start_token_id=START, eos_token_id=END, tie_embeddings=False
    )
    other = config(hidden_size=32, num_hidden_layers=1).to_dict()
    other |= {"is_decoder": True, "add_cross_attention": True}
    whole = wide.to_dict() | {"decoder": other}
    stock = transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig(**whole)).eval()
    stock.save_pretrained(tmp_path)
    model = bertfast.BertEncoderDecoder.from_pretrained(tmp_path)
    given = batch()
    with torch.no_grad():
        close_to_truth(model(**given).loss, copy.deepcopy(stock).double()(**given).loss)
        total, count = model.loss_packed(*packed(given))
        close_to_truth(total / count, copy.deepcopy(stock).double()(**given).loss)


def test_from_encoder_as_transformers(tmp_path):
    """The weights that `from_encoder_decoder_pretrained` takes: all but the cross-attention."""
    torch.manual_seed(0)
    bertfast.BertForMaskedLM(config()).save_pretrained(tmp_path)
    tokens = {"decoder_start_token_id": START, "eos_token_id": END}
    model = bertfast.BertEncoderDecoder.from_encoder(tmp_path, tie_embeddings=False, **tokens)
    stock = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path, tmp_path)
    own, expected = model.state_dict(), stock.state_dict()
    assert own.keys() == expected.keys()
    new = {n for n in own if "crossattention" in n}
    assert set(model.new_weights) == new
    assert all(torch.equal(own[n], expected[n]) for n in own.keys() - new if "pooler" not in n)
    shared = bertfast.BertEncoderDecoder.from_encoder(tmp_path, **tokens)
    given = batch()
    with torch.no_grad():  # until something is trained, sharing changes nothing but new weights
        shared.load_state_dict({n: own[n] for n in new}, strict=False)
        assert torch.equal(shared(**given).logits, model(**given).logits)


def test_from_encoder_with_other_layers(tmp_path):
    torch.manual_seed(0)
    given = config(num_hidden_layers=5)
    bert = bertfast.BertModel(given)
    bert.save_pretrained(tmp_path)
    tokens = {"decoder_start_token_id": START, "eos_token_id": END}
    make = bertfast.BertEncoderDecoder.from_encoder
    model = make(tmp_path, decoder_layers=3, **tokens)
    for i, source in enumerate((0, 2, 4)):
        layer = model.decoder.bert.encoder.layer[i]
        expected = bert.encoder.layer[source].attention.self.query.weight
        assert torch.equal(layer.attention.self.query.weight, expected)
    assert "decoder.cls.predictions.transform.dense.weight" in model.new_weights
    fresh = make(tmp_path, decoder_layers=7, fresh=True, **tokens)
    assert len(fresh.decoder.bert.encoder.layer) == 7
    first = fresh.decoder.bert.encoder.layer[0].attention.self.query.weight
    assert not torch.equal(first, bert.encoder.layer[0].attention.self.query.weight)
    tables = fresh.encoder.embeddings, fresh.decoder.bert.embeddings
    assert tables[0].word_embeddings.weight is tables[1].word_embeddings.weight
    assert torch.equal(tables[0].word_embeddings.weight, bert.embeddings.word_embeddings.weight)
    refused(ValueError, "decoder_layers is 6, the checkpoint has 5", make, tmp_path,
            decoder_layers=6, **tokens)  # fmt: skip
    refused(ValueError, "eos_token_id is 200", make, tmp_path,
            decoder_start_token_id=START, eos_token_id=200)  # fmt: skip


def _changed(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


BAD = {
    "model_type is 'bert'": lambda c: c.update(model_type="bert"),
    "encoder is None": lambda c: c.update(encoder=None),
    "model_type is 'gpt2'": lambda c: c["decoder"].update(model_type="gpt2"),
    "is_decoder and add_cross": lambda c: c["decoder"].update(add_cross_attention=False),
    "hidden_size is -3": lambda c: c["encoder"].update(hidden_size=-3),
    "it lacks decoder.bert.encoder.layer.3": lambda c: c["decoder"].update(num_hidden_layers=4),
    "no place for decoder.bert.encoder": lambda c: c["decoder"].update(num_hidden_layers=2),
    r"intermediate.dense.weight is \[100, 48\]": lambda c: c["encoder"].update(intermediate_size=9),
    "decoder_start_token_id is 200": lambda c: c.update(decoder_start_token_id=200),
    "tie_embeddings is true, but max_pos": lambda c: c["encoder"].update(max_position_embeddings=9),
}


@pytest.mark.parametrize("match", BAD)
def test_bad_checkpoints(match, tmp_path):
    ours().save_pretrained(tmp_path)
    _changed(tmp_path, BAD[match])
    load = bertfast.BertEncoderDecoder.from_pretrained
    refused(bertfast.model.CheckpointError, match, load, tmp_path)


def test_tables_that_are_one_but_differ(tmp_path):
    ours(tie=False).save_pretrained(tmp_path)
    _changed(tmp_path, lambda c: c.update(tie_embeddings=True))
    load = bertfast.BertEncoderDecoder.from_pretrained
    refused(bertfast.model.CheckpointError, "are one parameter", load, tmp_path)


def test_bad_inputs():
    model, given = ours(), batch()
    ids, labels = given["input_ids"], given["labels"]
    refused(ValueError, "decoder_input_ids or labels", model, ids)
    refused(
        ValueError, r"has shape \[3, 20\], expected \[4, length\]", model, ids, labels=labels[:3]
    )
    refused(ValueError, "41 tokens", model, ids, decoder_input_ids=torch.ones(4, 41, dtype=int))
    mask = torch.ones(4, 3)
    refused(ValueError, r"attention_mask has shape \[4, 3\], expected \[4, 20\]", model, ids,
            decoder_attention_mask=mask, labels=labels)  # fmt: skip
    with_padding = labels.masked_fill(labels == -100, 0)
    refused(ValueError, "a label stands where", model, ids, labels=with_padding)
    model.config.decoder_start_token_id = None
    refused(ValueError, "decoder_start_token_id is None", model, ids, labels=labels)
    refused(ValueError, "can't be saved", _without_a_layer().save_pretrained, "nowhere")


def _without_a_layer():
    model = ours()
    del model.decoder.bert.encoder.layer[0]
    return model
