"""`finetune`, `evaluate` and `predict` on families other than BERT."""

import json
from pathlib import Path

import families
import numpy as np
import pytest
import tiny
import tiny_families
import torch
import transformers
from helpers import refused

from bertfast.cli import main
from bertfast.data import encode
from bertfast.dropin import is_accelerated
from bertfast.model import CheckpointError
from bertfast.train import ClassifyConfig, evaluate, finetune, predict

NAMES = ("blue", "green", "red")


def settings(tmp_path, family, **options):
    given = tiny.settings(tmp_path, max_length=30, **options)
    more = {"seq_classif_dropout": 0.0} if family == "DistilBert" else {}
    return given | {"model": str(tiny_families.checkpoint(tmp_path / "base", family, **more))}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def stock(folder, texts):
    """transformers' own logits, one text at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = encode(tokenizer, texts, None, 30)
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    return model, torch.stack(found).double().softmax(1).numpy()


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_learns_and_transformers_loads_it(family, tmp_path, capsys):
    given = settings(tmp_path, family, epochs=2, lr=3e-3, batch_size=16)
    results = finetune(ClassifyConfig(**given))
    losses = [r["loss"] for r in lines(tmp_path / "out" / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < 0.6 * losses[0]
    texts = [row["text"] for row in tiny.rows(9, 2)]
    model, expected = stock(given["out"], texts)
    assert tuple(model.config.id2label.values()) == NAMES and not is_accelerated(model)
    assert type(model).__name__ == f"{family}ForSequenceClassification"
    for row, truth in zip(predict(given["out"], texts), expected, strict=True):
        np.testing.assert_allclose([*row["probabilities"].values()], truth, atol=1e-5)
    again = evaluate(given["out"], given["valid"])
    assert again == json.loads(json.dumps(results["valid"]))
    assert "0 of" not in capsys.readouterr().err


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_a_step_is_stocks(family, tmp_path):
    """Without dropout: the loss of the first step, and the weights after it."""
    given = settings(tmp_path, family, max_steps=1, batch_size=48, warmup=0.0, lr=1e-2, clip=0.0)
    given |= {"weight_decay": 0.0, "seed": 3}
    rows = lines(given["train"])
    finetune(ClassifyConfig(**given | {"train": tiny.write(tmp_path / "few.jsonl", rows[:48])}))
    torch.manual_seed(3)
    kind = transformers.AutoModelForSequenceClassification
    config = transformers.AutoConfig.from_pretrained(given["model"], num_labels=3)
    base = transformers.AutoModel.from_pretrained(given["model"])
    torch.manual_seed(3)
    transformers.AutoModel.from_pretrained(given["model"])
    model = kind.from_config(config).double()
    own = model.base_model.state_dict()
    model.base_model.load_state_dict({k: v for k, v in base.state_dict().items() if k in own})
    tokenizer = transformers.AutoTokenizer.from_pretrained(given["model"])
    losses = []
    for row in rows[:48]:
        ids = encode(tokenizer, [row["text"]], None, 30)[0]["input_ids"]
        target = torch.tensor([NAMES.index(row["label"])])
        losses.append(model(input_ids=torch.tensor([ids]), labels=target).loss)
    first = lines(tmp_path / "out" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("family", ["NomicBert", "Gte"])
def test_a_pooler_that_the_head_alone_has(family, tmp_path):
    """transformers' AutoModel leaves it out; a checkpoint's is kept beside a new head."""
    if family not in families.FAMILIES:
        pytest.skip("transformers has it not")
    given = settings(tmp_path, family, max_steps=1, lr=1e-9)
    finetune(ClassifyConfig(**given))
    again = given | {"model": given["out"], "head": "fresh", "seed": 1}
    again |= {"out": str(tmp_path / "again")}
    finetune(ClassifyConfig(**again))
    texts = [row["text"] for row in tiny.rows(5, 2)]
    (first, _), (model, expected) = stock(given["out"], texts), stock(again["out"], texts)
    ours = [[*row["probabilities"].values()] for row in predict(again["out"], texts)]
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    first, found = first.state_dict(), model.state_dict()
    (pooler,) = [name for name in found if name.endswith("pooler.dense.weight")]
    torch.testing.assert_close(found[pooler], first[pooler], atol=1e-6, rtol=0)
    assert not torch.equal(found["classifier.weight"], first["classifier.weight"])


OTHERS = {
    "GPT2": dict(n_embd=48, n_layer=1, n_head=3, n_positions=64),  # types are words to it
    "Bart": dict(d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
                 decoder_attention_heads=3, encoder_ffn_dim=80, decoder_ffn_dim=80),
    "XLNet": dict(d_model=48, n_layer=1, n_head=3, d_inner=80),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_families_that_are_no_encoders(family, tmp_path):
    """They are as transformers has them, or refused."""
    given = settings(tmp_path, "Roberta", max_steps=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given["model"])
    given |= {"model": str(tmp_path / "other")}
    tokenizer.save_pretrained(given["model"])
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    special |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = getattr(transformers, f"{family}Config")(**special, **OTHERS[family])
    torch.manual_seed(0)
    getattr(transformers, f"{family}Model")(config).save_pretrained(given["model"])
    if family == "XLNet":
        return refused(CheckpointError, "the last place", finetune, ClassifyConfig(**given))
    finetune(ClassifyConfig(**given))
    texts = [row["text"] for row in tiny.rows(5, 2)]
    ours = [[*row["probabilities"].values()] for row in predict(given["out"], texts, max_length=30)]
    np.testing.assert_allclose(ours, stock(given["out"], texts)[1], atol=1e-5)
    pairs = given | {"out": str(tmp_path / "p"), "text_pair_column": "text", "max_length": 60}
    finetune(ClassifyConfig(**pairs))


def test_a_base_model_is_no_classifier(tmp_path):
    folder = tiny_families.checkpoint(tmp_path / "m", "Roberta")
    refused(CheckpointError, "no fine-tuned model .*RobertaModel", predict, str(folder), ["cat"])
    head = tiny_families.checkpoint(tmp_path / "h", "Roberta", "ForTokenClassification")
    refused(CheckpointError, "RobertaForTokenClassification", predict, str(head), ["cat"])


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_heads_stay_or_go(family, tmp_path, capsys):
    """A head of the data's classes in another order stays; another is new where that is asked."""
    given = settings(tmp_path, family, max_steps=1, lr=1e-9)
    names = {0: "red", 1: "blue", 2: "green"}
    head = tiny_families.checkpoint(
        tmp_path / "headed", family, "ForSequenceClassification", num_labels=3, id2label=names
    )
    finetune(ClassifyConfig(**given | {"model": str(head)}))
    assert "kept from" in capsys.readouterr().err
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [*saved["id2label"].values()] == [*names.values()]
    texts = [row["text"] for row in tiny.rows(4, 2)]
    before, after = stock(head, texts)[1], stock(given["out"], texts)[1]
    np.testing.assert_allclose(after, before, atol=1e-4)
    given |= {"model": str(head), "out": str(tmp_path / "fresh"), "head": "fresh"}
    finetune(ClassifyConfig(**given))
    assert "head: new" in capsys.readouterr().err
    saved = json.loads((tmp_path / "fresh" / "config.json").read_text())
    assert tuple(saved["id2label"].values()) == NAMES


def test_freezing_and_checkpointing(tmp_path):
    given = settings(tmp_path, "Roberta", max_steps=2, lr=1e-2, seed=1)
    kept = transformers.AutoModel.from_pretrained(given["model"]).state_dict()
    finetune(ClassifyConfig(**given | {"freeze_layers": 1, "gradient_checkpointing": True}))
    found = transformers.AutoModel.from_pretrained(given["out"]).state_dict()
    for name, t in found.items():
        frozen = name.startswith(("embeddings.", "encoder.layer.0."))
        if not name.startswith("pooler."):
            assert torch.equal(t, kept[name]) == frozen, name


@pytest.mark.parametrize("family", families.FAMILIES)
def test_frozen_layers_are_the_first(family):
    """With all that is before them; what is behind them is learnt."""
    from bertfast.dropin import accelerate
    from bertfast.train import networks

    model = families.build(family, "ForSequenceClassification", num_labels=3)
    accelerate(model)
    networks.freeze(model, 1)
    model.train()(**families.inputs_for()).logits.square().sum().backward()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    layers = networks.layers(model)
    assert len(layers) == 2 and not any(p.requires_grad for p in layers[0].parameters())
    assert any(p.grad is not None for p in layers[1].parameters())
    assert not [
        n for n in names if "embeddings" in n.replace("rel_embeddings", "") or "_mapping_" in n
    ]
    assert not [n for n in names if "embed_tokens" in n]


def test_padded_rows_are_left_out(tmp_path, monkeypatch):
    """Whatever the head: the loop takes real tokens alone."""
    from bertfast.dropin import fused
    from bertfast.train import networks, opening
    from bertfast.train.packed import Packed

    folder = tiny_families.checkpoint(tmp_path / "m", "Roberta", "ForTokenClassification")
    head = opening.Head("TokenClassification", None, "classifier", True)
    model = opening.trained(folder, head, False)
    rows = [{"input_ids": [0, 5, 6, 2]}, {"input_ids": [0, 5, 6, 7, 8, 9, 2]}]
    with torch.no_grad():
        found = networks.logits(model, Packed.of_rows(rows, 1), per_token=True)
    encoder = next(m for m in model.modules() if isinstance(m, fused.FusedEncoder))
    assert encoder.bertfast_last.padded == "skipped: nobody reads them"
    plain = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    with torch.no_grad():
        alone = [plain(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_encoders_are_replayed_in_the_loop(tmp_path, tape, capsys, monkeypatch):
    """On a GPU: the step is launched, the layers and the update replayed; the same losses."""
    given = settings(tmp_path, "Roberta", epochs=2, batch_size=12)
    found = finetune(ClassifyConfig(**given))
    counts = found["train"]["graphs"]
    assert counts["launched"] == 10 and counts["captures"] == 1 and counts["hits"] > 5  # the update
    assert "not replayed" not in capsys.readouterr().err
    monkeypatch.setenv("BERTFAST_GRAPHS", "0")
    plain = finetune(ClassifyConfig(**given | {"out": str(tmp_path / "plain")}))
    assert "graphs" not in plain["train"]
    of = lambda out: [r["loss"] for r in lines(tmp_path / out / "metrics.jsonl") if "loss" in r]
    np.testing.assert_allclose(of("out"), of("plain"), rtol=1e-5)


@pytest.mark.parametrize("value", ["\ud800", "no such model", 5, ["bert"]])
def test_a_model_type_that_is_none(value, tmp_path, capsys):
    folder = tiny_families.checkpoint(tmp_path / "m", "Roberta")
    values = json.loads((folder / "config.json").read_text()) | {"model_type": value}
    (folder / "config.json").write_text(json.dumps(values))
    data = tiny.write(tmp_path / "d.jsonl", tiny.rows(3))
    capsys.readouterr()
    assert main(["evaluate", "classify", "--model", str(folder), "--data", data]) == 1
    err = capsys.readouterr().err
    assert "config.json" in err and len(err.strip().splitlines()) == 1
