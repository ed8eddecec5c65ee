"""`finetune`, `evaluate` and `predict` of tags, on several families, beside transformers."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tagging
import torch
import transformers
from helpers import refused

from bertfast import cli
from bertfast.data import DataError
from bertfast.data.aligned import align
from bertfast.data.tagged import Tagged, load_tagged
from bertfast.data.tagged_report import noise_candidates
from bertfast.train import finetune, plots
from bertfast.train.config import ConfigError
from bertfast.train.entities import entities_of, entity_scores
from bertfast.train.networks import outputs
from bertfast.train.packed import IGNORED
from bertfast.train.tasks import tokens_plots
from bertfast.train.tasks.tokens import TokensConfig, TokensTask
from bertfast.train.tasks.tokens_inference import evaluate, predict, predict_table

NAMES = {"Ada": "PER", "Charles": "PER", "London": "LOC", "Turin": "LOC", "C++": "LANG"}


def tagged_rows(n, seed=0, longest=9):
    """Words whose tag is their own, or of the one before."""
    r, words, tags = random.Random(seed), [], []
    for _ in range(n):
        row = [
            r.choice([*NAMES, "the", "and", "libraries", "in", "Lovelace", "Babbage"])
            for _ in range(r.randint(2, longest))
        ]
        own = []
        for i, word in enumerate(row):
            after = word in ("Lovelace", "Babbage") and i and row[i - 1] in ("Ada", "Charles")
            own.append("I-PER" if after else f"B-{NAMES[word]}" if word in NAMES else "O")
        words.append(row)
        tags.append(own)
    return words, tags


def conll(path, words, tags):
    blocks = (
        "\n".join(f"{w}\t{t}" for w, t in zip(*row, strict=True))
        for row in zip(words, tags, strict=True)
    )
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return str(path)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def models(tmp_path_factory):
    """A folder of each family's checkpoint, made once."""
    MODELS.clear()
    MODELS["folder"] = tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Drawn by the one test that looks for them."""
    if request.function is not test_every_file_of_a_run:
        for name in ("entity_f1", "score_histogram"):
            monkeypatch.setattr(tokens_plots, name, lambda *_: None)
        monkeypatch.setattr(plots, "training_curve", lambda *_: None)


MODELS = {}


def base(family="Bert"):
    if family not in MODELS:
        MODELS[family] = tagging.checkpoint(MODELS["folder"] / family, family)
    return str(MODELS[family])


def settings(folder, family="Bert", **options):
    given = {"model": base(family), "out": str(folder / "out"), "head": "fresh", "device": "cpu"}
    for name, n in (("train", 48), ("valid", 12), ("test", 12)):
        given[name] = conll(folder / f"{name}.conll", *tagged_rows(n, 5 + len(given)))
    return TokensConfig(
        **given | {"max_length": 32, "batch_size": 16, "lr": 5e-3, "epochs": 2} | options
    )


def task_of(config):
    """A task as `finetune` has it before training."""
    task = TokensTask(config, torch.device("cpu"), lambda line: None)
    task.read()
    task.tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    torch.manual_seed(0)
    task.model = task.build(Path(config.model))
    task.check(Path(config.model))
    task.rows = {name: task.encode(part) for name, part in task.parts.items()}
    return task


def stock(folder):
    return transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", tagging.KINDS)
def test_learns_and_predicts_as_the_pipeline(family, tmp_path):
    config = settings(tmp_path, family, epochs=3 if family == "Bert" else 2)
    results = finetune(config)
    losses = [
        json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    ]
    losses = [r["loss"] for r in losses if "loss" in r]
    assert losses[-1] < 0.7 * losses[0]
    again = evaluate(config.out, config.valid, device="cpu")
    assert again == json.loads(json.dumps(results["valid"]))
    assert results["test"]["rows"] == 12 and 0 <= results["test"]["micro_f1"] <= 1
    # transformers' own model and pipeline on words that are words for it too
    texts = ["Ada Lovelace to Charles London the toolchain Lovelace Charles the"]
    own = {"tokenizer": transformers.AutoTokenizer.from_pretrained(config.out)}
    pipe = transformers.pipeline(
        "token-classification", model=stock(config.out), **own, aggregation_strategy="first"
    )
    (expected,) = pipe(texts)
    (found,) = predict(config.out, texts, device="cpu")
    start = lambda e: (
        e["start"] + (texts[0][e["start"]] == " ")
    )  # ModernBERT's hold the space before
    assert [(e["start"], e["end"], e["label"]) for e in found["entities"]] == [
        (start(e), e["end"], e["entity_group"]) for e in expected
    ]
    assert [e["score"] for e in found["entities"]] == pytest.approx(
        [e["score"] for e in expected], rel=1e-4
    )
    assert all(texts[0][e["start"] : e["end"]] == e["text"] for e in found["entities"])


@pytest.mark.parametrize("label_all", [False, True])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_loss_is_stocks(family, label_all, tmp_path):
    """Of a batch, with weights, beside transformers' logits of each window in fp64."""
    config = settings(
        tmp_path, family, label_all=label_all, class_weights={"PER": 3.0, "O": 0.5}, max_length=12
    )
    task = task_of(config)
    batch = task.load([*range(16)])
    mean = task.loss(task.model, batch) / task.weight(batch)
    task.model.save_pretrained(tmp_path / "now")
    exact = stock(tmp_path / "now").double()
    names = list(exact.config.id2label.values())
    weights = torch.tensor(
        [3.0 if "PER" in n else 0.5 if n == "O" else 1.0 for n in names]
    ).double()
    losses, total = 0, 0
    for row in task.rows["train"][:16]:
        logits = exact(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        targets = torch.full((len(row["input_ids"]),), -100)
        targets[torch.from_numpy(row["places"])] = torch.from_numpy(row["tags"])
        losses += torch.nn.functional.cross_entropy(logits, targets, weights, reduction="sum")
        total += weights[targets[targets >= 0]].sum()
    assert mean.item() == pytest.approx((losses / total).item(), rel=1e-5)
    # every word once, although windows overlap
    known = sum(map(len, task.parts["train"].words))
    labelled = sum(int((row["tags"] != IGNORED).sum()) for row in task.rows["train"])
    assert len(task.rows["train"]) > 48 and (labelled > known if label_all else labelled == known)


def test_a_step_without_dropout_is_the_trainers(tmp_path):
    """transformers' collator and model on the same batch: the same loss, twice."""
    plain = {
        "batch_size": 48,
        "max_steps": 2,
        "warmup": 0.0,
        "clip": 0.0,
        "weight_decay": 0.0,
        "lr": 1e-2,
    }
    task = task_of(settings(tmp_path, max_length=60))
    task.model.save_pretrained(tmp_path / "now")
    task.tokenizer.save_pretrained(tmp_path / "now")
    config = settings(tmp_path, max_length=60, head="keep", **plain, model=str(tmp_path / "now"))
    finetune(config)
    ours = [
        json.loads(line)["loss"]
        for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()
        if "norm" in line
    ]
    model, read = stock(tmp_path / "now"), task.tokenizer
    rows = load_tagged(config.train)
    ids = read(rows.words, is_split_into_words=True)
    items = []
    for i, tags in enumerate(rows.tags):
        own, labels = ids.word_ids(i), []
        for j, w in enumerate(own):
            labels.append(
                -100 if w is None or (j and own[j - 1] == w) else model.config.label2id[tags[w]]
            )
        items.append({"input_ids": ids["input_ids"][i], "labels": labels})
    batch = transformers.DataCollatorForTokenClassification(read)(items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    theirs = []
    for rate in (1e-2, 5e-3):  # linear to 0
        optimizer.param_groups[0]["lr"] = rate
        loss = model(**batch).loss
        theirs.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ours == pytest.approx(theirs, rel=2e-4) and theirs[1] < theirs[0]


def test_text_with_spans_is_words_with_tags(tmp_path):
    """The same entities in either form give the same run, of a tokenizer whose words are its own."""
    first = task_of(settings(tmp_path, max_length=60))
    words, tags = tagged_rows(48, 9)
    rows = []
    for w, t in zip(words, tags, strict=True):
        part = Tagged([w], [t])
        spans = part.spans(0)
        rows.append(
            {
                "text": part.text(0),
                "entities": [
                    {"start": spans[a][0], "end": spans[b - 1][1], "label": k}
                    for a, b, k in entities_of(t)
                ],
            }
        )
    second = task_of(settings(tmp_path, max_length=60, train=jsonl(tmp_path / "t.jsonl", *rows)))
    assert second.config.spaced is False and first.config.spaced is True
    for a, b in zip(first.rows["train"], second.rows["train"], strict=True):
        assert a["input_ids"] == b["input_ids"]
        # "C++" is one word there, three here
        names = lambda task, row: [task.tags.names[t] for t in row["tags"]]
        assert [n for n in names(second, b) if n not in ("I-LANG",)] == names(first, a)


def test_predictions_of_long_texts_are_of_windows(tmp_path):
    """Nothing is dropped; the tags are those of transformers on the window with most context."""
    config = settings(tmp_path, max_steps=3, stride=4, max_length=14)
    finetune(config)
    words, tags = tagged_rows(3, seed=9, longest=60)
    words = [row * 4 for row in words]
    path = jsonl(tmp_path / "long.jsonl", *({"tokens": w} for w in words))
    found = list(predict_table(config.out, path, device="cpu"))
    model, read = stock(config.out), transformers.AutoTokenizer.from_pretrained(config.out)
    names = model.config.id2label
    for row, own in zip(words, found, strict=True):
        ids = read(
            " ".join(row), truncation=True, max_length=14, stride=4, return_overflowing_tokens=True
        )
        given = align(read, Tagged([row]), max_length=14, stride=4)
        expected = [None] * len(row)
        for i, window in enumerate(ids["input_ids"]):
            with torch.no_grad():
                best = model(input_ids=torch.tensor([window])).logits[0].argmax(-1)
            for t in np.flatnonzero(given.best[i] & given.first[i]):
                assert expected[given.word[i][t]] is None
                expected[given.word[i][t]] = names[best[t].item()]
        assert entities_of(own["tags"]) == entities_of(expected)
        text = " ".join(row)
        for e in own["entities"]:
            assert (
                text[e["start"] : e["end"]]
                == e["text"]
                == " ".join(row[e["start_word"] : e["end_word"]])
            )
    # evaluate agrees with what predict says
    truth = [t * 4 for t in tags]
    scores = evaluate(config.out, conll(tmp_path / "long.conll", words, truth), device="cpu")
    own = entity_scores(truth, [row["tags"] for row in found])
    assert scores["micro"] == own["micro"] and scores["words"] == sum(map(len, words))


def test_offsets_are_of_the_text_as_given(tmp_path):
    """Also of what no cleaning would leave, and words of the training data stay whole."""
    config = settings(tmp_path, "Roberta", max_steps=4)
    finetune(config)
    assert json.loads((tmp_path / "out/decision.json").read_text()) == {"forms": ["C++"]}
    texts = [
        "",
        "  ",
        "\u200b",
        "  Ada\u00a0Lovelace,\tC++\n\u200bLondon \U0001f469\u200d\U0001f4bb e\u0301t Turin  ",
    ]
    found = predict(config.out, texts, device="cpu")
    assert [row["entities"] for row in found[:2]] == [[], []]
    for entity in found[3]["entities"]:
        assert texts[3][entity["start"] : entity["end"]] == entity["text"] == entity["text"].strip()
        assert 0 < entity["score"] <= 1
    alike = [
        predict(config.out, [row], device="cpu")[0]
        for row in ("Ada C++ Turin", ["Ada", "C++", "Turin"])
    ]
    keys = ("text", "start", "end", "label", "score")
    assert [[e[k] for k in keys] for e in alike[0]["entities"]] == [
        [e[k] for k in keys] for e in alike[1]["entities"]
    ]
    path = jsonl(tmp_path / "t.jsonl", *({"text": t} for t in texts))
    assert list(predict_table(config.out, path, device="cpu")) == found
    rows = list(
        predict_table(
            config.out,
            jsonl(tmp_path / "w.jsonl", {"tokens": []}, {"tokens": ["\u200b", "Ada"]}),
            device="cpu",
        )
    )
    assert rows[0] == {"entities": [], "tags": []} and len(rows[1]["tags"]) == 2
    refused(
        DataError, "strings and lists of words", predict, config.out, ["a", ["b"]], device="cpu"
    )


@pytest.mark.parametrize("strategy", ["average", "max"])
def test_strategies(tmp_path, strategy):
    config = settings(tmp_path, max_steps=4, strategy=strategy, label_all=True)
    finetune(config)
    text = "Ada Lovelace in London and Turin, C, Babbage"
    pipe = transformers.pipeline(
        "token-classification",
        model=stock(config.out),
        tokenizer=transformers.AutoTokenizer.from_pretrained(config.out),
        aggregation_strategy=strategy,
    )
    (found,) = predict(config.out, [text], device="cpu")
    expected = pipe(text)
    assert [(e["start"], e["end"], e["label"]) for e in found["entities"]] == [
        (e["start"], e["end"], e["entity_group"]) for e in expected
    ]
    assert [e["score"] for e in found["entities"]] == pytest.approx(
        [e["score"] for e in expected], rel=1e-4
    )
    (first,) = predict(config.out, [text], device="cpu", strategy="first")
    assert first.keys() == found.keys()


def test_plain_tags(tmp_path, capsys):
    words, tags = tagged_rows(40)
    plain = [
        ["NOUN" if t == "O" else t.removeprefix("B-").removeprefix("I-") for t in row]
        for row in tags
    ]
    path = conll(tmp_path / "pos.conll", words, plain)
    config = settings(tmp_path, train=path, valid=None, test=None, max_steps=3)
    results = finetune(config)
    assert results["valid"]["micro_f1"] == results["valid"]["accuracy"]
    assert "per_type" not in results["valid"] and results["valid"]["per_tag"].keys() <= {
        "NOUN",
        "PER",
        "LOC",
        "LANG",
    }
    scores = evaluate(config.out, path, device="cpu")
    rows = list(predict_table(config.out, path, device="cpu"))
    assert [row["words"] for row in rows] == words and all(
        len(r["scores"]) == len(r["tags"]) for r in rows
    )
    right = sum(
        a == b
        for row, truth in zip(rows, plain, strict=True)
        for a, b in zip(row["tags"], truth, strict=True)
    )
    assert scores["accuracy"] == pytest.approx(right / sum(map(len, words)))
    refused(
        DataError,
        "has entities, .* was trained on plain tags",
        evaluate,
        config.out,
        conll(tmp_path / "e.conll", words, tags),
        device="cpu",
    )


def test_a_head_of_more_tags_stays(tmp_path, capsys):
    """As a published model's: the data have some of its types, in IOB1."""
    head = tagging.checkpoint(
        tmp_path / "h",
        "DistilBert",
        labels=("O", "B-MISC", "I-MISC", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    )
    words, tags = [["Ada", "Lovelace", "in", "London"]] * 9, [["I-PER", "I-PER", "O", "I-LOC"]] * 9
    paths = {
        n: conll(tmp_path / f"{n}.iob", words[:k], tags[:k])
        for n, k in (("train", 9), ("valid", 3))
    }
    config = TokensConfig(
        model=str(head),
        out=str(tmp_path / "out"),
        **paths,
        max_steps=1,
        lr=1e-9,
        device="cpu",
        max_length=24,
    )
    before = evaluate(str(head), paths["valid"], device="cpu")
    after = finetune(config)["valid"]
    assert "head: kept" in capsys.readouterr().err
    assert stock(config.out).config.id2label[1] == "B-MISC"
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert after["micro"] == before["micro"] and after["entities"] == 6


def test_a_model_of_bioes_is_read_as_it_is(tmp_path):
    labels = ("O", *(f"{p}-PER" for p in "BIES"))
    head = tagging.checkpoint(tmp_path / "h", "Bert", labels=labels)
    rows = list(predict(str(head), [["Ada", "Lovelace", "in", "London"] * 3], device="cpu"))
    assert {t[0] for t in rows[0]["tags"]} <= {"O", "B", "I"}
    path = conll(tmp_path / "d.conll", [["Ada", "Lovelace", "x"]], [["B-PER", "E-PER", "O"]])
    assert evaluate(str(head), path, device="cpu")["entities"] == 1


REPORT = (
    [
        ["the", "C", "library"],
        ["a", "C", "program"],
        ["C", "in", "C"],
        ["the", "c", "Library"],
        ["big", "GNU", "Emacs"],
        ["GNU", "x"],
    ],
    [
        ["O", "B-LANG", "O"],
        ["O", "O", "O"],
        ["O", "O", "O"],
        ["O", "O", "O"],
        ["O", "B-X", "I-X"],
        ["B-Y", "O"],
    ],
)


def test_report_names_what_may_be_noise(tmp_path, capsys):
    """ "C" is a language once of four times; "GNU" inside of another entity doesn't count."""
    path = conll(tmp_path / "r.conll", *REPORT)
    (only,) = noise_candidates(load_tagged(path))
    assert only == {
        "text": "C",
        "label": "LANG",
        "tagged": 1,
        "occurrences": 4,
        "places": [f"{path}: row 1 (line 1), word 2"],
    }
    config = settings(tmp_path, train=path, valid=path, test=None)
    assert finetune(config, dry_run=True) is None
    said = capsys.readouterr().err
    assert "'C' as LANG 1 of 4 times" in said and "rows stand in both train and valid" in said
    assert (
        f"1 rows have the words of another with other tags: {path}: row 4 (line 13) and row 1"
        in said
    )
    assert not (tmp_path / "out").exists()


def test_figures_of_the_report(tmp_path):
    """Beside counts over transformers' own tokens."""
    words, tags = tagged_rows(30, seed=2)
    words[0], tags[0] = ["\u200b", "Ada", "\u4e00"], ["O", "B-PER", "O"]  # no token; an unknown one
    path = conll(tmp_path / "d.conll", [*words, words[1]], [*tags, tags[1]])
    task = task_of(settings(tmp_path, train=path, max_length=20))
    part = task.report().parts["train"]
    ids = task.tokenizer([" ".join(row) for row in words] + [" ".join(words[1])])["input_ids"]
    lengths = sorted(map(len, ids))
    assert (part.rows, part.words) == (31, sum(map(len, words)) + len(words[1]))
    assert (
        part.tokens["min"] == lengths[0]
        and part.tokens["median"] == lengths[15]
        and part.tokens["max"] == lengths[-1]
    )
    assert part.windowed == pytest.approx(np.mean([n > 20 for n in lengths]))
    assert (part.silent, part.duplicates, part.conflicting) == (
        1,
        1 + sum(words.index(w) < i for i, w in enumerate(words)),
        [],
    )
    unknown = sum(row.count(task.tokenizer.unk_token_id) for row in ids)
    assert unknown == 1 and part.unknown > 0
    flat = [t for row in [*tags, tags[1]] for t in row]
    assert part.kinds == {k: flat.count(f"B-{k}") for k in ("PER", "LOC", "LANG")}
    assert "word 1 '\\u200b'" in str(task.report())


def test_every_file_of_a_run(tmp_path):
    config = settings(tmp_path, max_steps=2, max_length=60)
    results = finetune(config)
    out = tmp_path / "out"
    made = {p.name for p in out.iterdir()}
    assert {
        "entity_f1.png",
        "entity_scores.png",
        "training_curve.png",
        "eval_results.json",
        "data_report.json",
        "README.md",
        "model.safetensors",
    } <= made
    assert (
        json.loads((out / "eval_results.json").read_text())["test"].keys() == results["test"].keys()
    )
    card = (out / "README.md").read_text()
    assert (
        "pipeline_tag: token-classification" in card and "B-PER" in card and "| micro_f1 |" in card
    )
    report = json.loads((out / "data_report.json").read_text())
    assert report["parts"]["train"]["rows"] == 48 and report["parts"]["train"]["windowed"] == 0


BAD = {  # the training file, what the error says
    "mixed": ("d.conll", "a\tB-A\nb\tO\nc\tI-A\n", ["row 1 (line 3)", "the tag of word 3, 'c', is 'I-A'", "name the scheme"]),
    "one column": ("d.conll", "a\tO\nb\n", ["line 2", "expected a word and its tag"]),
    "columns": ("d.conll", "a\tO\nb\tx\tO\n", ["line 2 has 3 columns"]),
    "empty": ("d.conll", "", ["is empty"]),
    "one tag": ("d.conll", "a\tO\n\nb\tO\n", ["all tags are O; expected 2 or more"]),
    "lengths": ("d.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', ["row 1 (line 1)", "1 tags for 2 tokens"]),
    "numbers": ("d.jsonl", '{"tokens": ["a"], "tags": [1]}', ["row 1 (line 1)", "names such as B-PER"]),
    "json": ("d.jsonl", '{"tokens": ["a"]', ["line 1 is not valid JSON"]),
    "no column": ("d.jsonl", '{"words": ["a"], "tags": ["O"]}', ["no column 'text'; it has: 'words', 'tags'"]),
    "inside": ("d.jsonl", '{"text": "Paris", "entities": [{"start": 0, "end": 3, "label": "LOC"}]}', ["row 1 (line 1)", "span 1, 0 to 3", "inside the word 'Paris'"]),
    "overlap": ("d.jsonl", '{"text": "a b", "entities": [{"start": 0, "end": 3, "label": "X"}, {"start": 2, "end": 3, "label": "Y"}]}', ["row 1 (line 1)", "span 2", "overlaps span 1", "keep one"]),
    "beyond": ("d.jsonl", '{"text": "a b", "entities": [{"start": 2, "end": 9, "label": "X"}]}', ["row 1 (line 1)", "span 1, 2 to 9, of a text of 3"]),
    "bytes": ("d.conll", "a\tO\n\udcff\tO\n", ["not UTF-8", "line 2"]),
    "format": ("d.xml", "<a/>", ["unknown format '.xml'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_training_files(tmp_path, case, capsys):
    name, text, parts = BAD[case]
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    model, out = base(), tmp_path / "out"
    arguments = [
        "--train",
        str(path),
        "--valid",
        str(path),
        "--model",
        str(model),
        "--out",
        str(out),
    ]
    assert cli.main(["finetune", "tokens", *arguments]) == 1
    said = capsys.readouterr().err
    for part in (str(path), *parts):
        assert part in said
    assert not out.exists()


def test_bad_settings_and_unknown_tags(tmp_path):
    for options, message in (
        ({"strategy": "last"}, "strategy is 'last', expected one of first, average, max"),
        ({"scheme": "iob"}, "scheme is 'iob', expected one of iob1"),
        ({"stride": 32}, "stride is 32, expected 0 to max_length - 1, 31"),
        ({"metric": "f1"}, "metric is 'f1', expected one of micro_f1"),
        ({"class_weights": {"PER": -1.0}}, "class_weights: PER is -1.0"),
    ):
        refused(ConfigError, message, settings, tmp_path, **options)
    unknown = settings(tmp_path, class_weights={"PERSON": 2.0})
    refused(
        ConfigError,
        "class_weights names PERSON, which no word has; known are B-LANG",
        finetune,
        unknown,
    )
    other = conll(tmp_path / "other.conll", [["a", "b"]], [["O", "B-NEW"]])
    message = r"other.conll: row 1 \(line 1\): word 2, 'b', has the unknown tag 'B-NEW'; known are"
    refused(DataError, message, finetune, settings(tmp_path, valid=other))
    refused(
        ConfigError, "stride 20 leaves none", finetune, settings(tmp_path, max_length=21, stride=20)
    )
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys):
    config = settings(tmp_path)
    arguments = [
        "--train",
        config.train,
        "--valid",
        config.valid,
        "--model",
        config.model,
        "--out",
        config.out,
    ]
    assert (
        cli.main(
            [
                "finetune",
                "tokens",
                *arguments,
                "--head",
                "fresh",
                "--max-steps",
                "2",
                "--max-length",
                "32",
                "--label-all",
                "--class-weights",
                "PER=2",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert (
        cli.main(
            ["evaluate", "tokens", "--model", config.out, "--data", config.test, "--device", "cpu"]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["rows"] == 12
    table = tmp_path / "t.csv"
    with open(table, "w", newline="") as f:
        csv.writer(f).writerows([("id", "text"), (1, "Ada in London"), (2, "")])
    out = tmp_path / "o.jsonl"
    assert (
        cli.main(
            [
                "predict",
                "tokens",
                "--model",
                config.out,
                "--input",
                str(table),
                "--output",
                str(out),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2 and rows[1] == {"entities": []}
    assert (
        cli.main(
            [
                "predict",
                "tokens",
                "--model",
                config.out,
                "--input",
                config.test,
                "--device",
                "cpu",
                "--precision",
                "int8",
            ]
        )
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 12


def test_outputs_that_are_not_finite(tmp_path):
    task = task_of(settings(tmp_path))
    found = outputs(task.model, task.rows["valid"], 0, True)
    brief = task.figures("valid", found, brief=True)
    assert {*brief} == {*TokensConfig.metrics} and all(np.isfinite(v) for v in brief.values())
    found[0][0, 0] = np.nan
    assert all(np.isnan(v) for v in task.figures("valid", found, brief=True).values())
