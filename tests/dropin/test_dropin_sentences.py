"""sentence-transformers' own objects, accelerated: encode, predict, and their trainers."""

import copy

import pytest
import torch
from families import FAMILIES
from helpers import close_to_truth
from sentences import TEXTS, checkpoint

import bertfast

st = pytest.importorskip("sentence_transformers")


def sentence_model(folder, family="Bert"):
    return st.SentenceTransformer(checkpoint(folder, family), device="cpu")  # and mean pooling


@pytest.mark.parametrize("family", FAMILIES)
def test_encode(family, tmp_path):
    theirs = sentence_model(tmp_path, family)
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    assert report.fused == 2
    models = ours, copy.deepcopy(theirs).double(), theirs
    for batch in (32, 4, 1):
        options = {"batch_size": batch, "convert_to_tensor": True, "show_progress_bar": False}
        close_to_truth(*(m.encode(TEXTS, **options) for m in models))
    assert not any(report.fallbacks.values())
    tokens = [
        m.encode(TEXTS, output_value="token_embeddings", show_progress_bar=False) for m in models
    ]
    for found in zip(*tokens, strict=True):
        close_to_truth(*found)


def test_save_and_load(tmp_path):
    ours = sentence_model(tmp_path / "base")
    bertfast.accelerate(ours)
    before = ours.encode(TEXTS, show_progress_bar=False)
    ours.save(str(tmp_path / "saved"))
    loaded = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert not bertfast.is_accelerated(loaded)
    stock, exact = (
        torch.tensor(m.encode(TEXTS, show_progress_bar=False)) for m in (loaded, loaded.double())
    )
    close_to_truth(torch.tensor(before), exact, stock)


def test_cross_encoder(tmp_path):
    folder = checkpoint(tmp_path, "Roberta", "ForSequenceClassification", num_labels=1)
    theirs = st.CrossEncoder(folder, device="cpu", max_length=32)
    ours = st.CrossEncoder(folder, device="cpu", max_length=32)
    report = bertfast.accelerate(ours)
    assert report.fused == 2
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    found = [
        torch.tensor(m.predict(pairs, show_progress_bar=False))
        for m in (ours, copy.deepcopy(theirs).double(), theirs)
    ]
    close_to_truth(*found)
    ranked = [m.rank(TEXTS[3], TEXTS[:9]) for m in (ours, theirs)]
    assert [r["corpus_id"] for r in ranked[0]] == [r["corpus_id"] for r in ranked[1]]
    assert not any(report.fallbacks.values())


def arguments(kind, folder):
    return kind(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )


def losses(trainer):
    trainer.train()
    return [e["loss"] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.slow
def test_sentence_transformer_trainer(tmp_path):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer import losses as losses_of

    data = datasets.Dataset.from_dict({"anchor": TEXTS[:20], "positive": TEXTS[1:]})
    theirs = sentence_model(tmp_path / "base")
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    found = []
    for name, model in (("ours", ours), ("theirs", theirs)):
        trainer = st.SentenceTransformerTrainer(
            model,
            arguments(st.SentenceTransformerTrainingArguments, tmp_path / name),
            train_dataset=data,
            loss=losses_of.MultipleNegativesRankingLoss(model),
        )
        found.append(losses(trainer))
    assert len(found[0]) == 5 and len(set(found[0])) > 1
    close_to_truth(*map(torch.tensor, found), floor=3e-4)  # the log rounds to 4 digits
    found = [torch.tensor(m.encode(TEXTS, show_progress_bar=False)) for m in (ours, theirs)]
    close_to_truth(*found, floor=1e-3)
    assert not any(report.fallbacks.values())


@pytest.mark.slow
def test_cross_encoder_trainer(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(
        {"a": TEXTS[:20], "b": TEXTS[1:], "label": [float(i % 2) for i in range(20)]}
    )
    folder = checkpoint(tmp_path, "Bert", "ForSequenceClassification", num_labels=1)
    found = []
    for name in ("ours", "theirs"):
        model = st.CrossEncoder(folder, device="cpu", max_length=32)
        if name == "ours":
            report = bertfast.accelerate(model)
        trainer = st.cross_encoder.CrossEncoderTrainer(
            model,
            arguments(st.cross_encoder.CrossEncoderTrainingArguments, tmp_path / name),
            train_dataset=data,
            loss=st.cross_encoder.losses.BinaryCrossEntropyLoss(model),
        )
        found.append(losses(trainer))
    assert len(found[0]) == 5 and len(set(found[0])) > 1
    close_to_truth(*map(torch.tensor, found), floor=3e-4)
    assert not any(report.fallbacks.values())
