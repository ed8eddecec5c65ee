"""`finetune pairs`: similarity and ranking, as sentence-transformers' CrossEncoder has them."""

import json

import numpy as np
import pytest
import tiny
import tiny_families
from helpers import refused
from scipy import stats
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sklearn.metrics import average_precision_score, ndcg_score

import bertfast
from bertfast.cli import main
from bertfast.data import Candidates, DataError, load_candidates
from bertfast.train import ConfigError, finetune, ranking
from bertfast.train.tasks import pairs
from bertfast.train.tasks.pairs import PairsConfig

COLOURS = tiny.WORDS[:3]


def similar(n, seed=0):
    """Labelled by whether the texts' colours are one."""
    one, two = tiny.rows(n, seed), tiny.rows(n, seed + 100)[::-1]
    return [
        {"text": a["text"], "text_pair": b["text"], "label": 5.0 * (a["label"] == b["label"])}
        for a, b in zip(one, two, strict=True)
    ]


def queries(n, seed=0):
    """A colour, and texts with it or without."""
    r, out = np.random.default_rng(seed), []
    for i in range(n):
        texts = tiny.rows(12, seed + i)
        colour = COLOURS[i % 3]
        own = [t["text"] for t in texts if t["label"] == colour]
        others = [t["text"] for t in texts if t["label"] != colour]
        out.append({
            "query": f"{colour} {' '.join(r.choice(tiny.WORDS[3:], 2))}",
            "positive": own[: r.integers(1, 4)], "negative": others[:6],
        })  # fmt: skip
    return out


def settings(tmp_path, make, goal, **options):
    given = tiny.settings(tmp_path, goal=goal, max_length=32) | options
    for name, n, seed in (("train", 36, 0), ("valid", 12, 50), ("test", 12, 90)):
        given[name] = tiny.write(tmp_path / f"{name}.jsonl", make(n, seed))
    return given


def test_measures_beside_scikit_learn():
    r = np.random.default_rng(0)
    for n in (1, 2, 5, 30):
        for _ in range(20):
            scores, labels = r.normal(size=n), r.integers(0, 3, n).astype(float)
            labels[r.integers(n)] = 2
            if n > 1:
                expected = ndcg_score([labels], [scores], k=10)
                assert ranking.ndcg(scores, labels) == pytest.approx(expected, rel=1e-12)
            expected = average_precision_score(labels > 0, scores)
            assert ranking.average_precision(scores, labels) == pytest.approx(expected, rel=1e-12)
    assert ranking.reciprocal_rank([0.1, 0.9, 0.5], [1, 0, 0]) == pytest.approx(1 / 3)
    far = np.arange(11)[::-1]
    assert ranking.reciprocal_rank(far, [0] * 10 + [1]) == 0
    assert ranking.reciprocal_rank(far, [0] * 9 + [1, 0]) == pytest.approx(0.1)
    assert ranking.reciprocal_rank([1, 1, 1], [0, 1, 1]) == 0.5  # equal scores in their order
    groups = [np.array([0, 2]), np.array([1])]
    found = ranking.of_queries(np.array([3.0, 2.0, 1.0]), np.array([0, 0, 1.0]), groups)
    assert found["mrr@10"] == 0.5 and (found["queries"], found["unanswerable"]) == (1, 1)
    x, y = r.normal(size=(2, 40))
    found = ranking.agreement(x, np.round(y))
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, np.round(y)).statistic)
    assert np.isnan(ranking.agreement(x, np.ones(40))["pearson"])


def test_similarity(tmp_path):
    given = settings(tmp_path, similar, "similarity", epochs=2)
    results = finetune(PairsConfig(**given))
    for part in ("valid", "test"):
        assert results[part]["pairs"] == 12 and -1 <= results[part]["spearman"] <= 1
    texts = [(row["text"], row["text_pair"]) for row in similar(12, 90)]
    theirs = CrossEncoder(given["out"], device="cpu")
    expected = theirs.predict(texts)
    np.testing.assert_allclose(pairs.predict(given["out"], texts), expected, atol=1e-5)
    labels = [row["label"] for row in similar(12, 90)]
    assert results["test"]["mse"] == pytest.approx(np.mean((expected - labels) ** 2), rel=1e-4)
    truth = stats.spearmanr(expected, labels).statistic
    assert results["test"]["spearman"] == pytest.approx(truth, abs=1e-3)
    assert theirs.max_length == 32
    again = pairs.evaluate(given["out"], given["test"])
    assert again == pytest.approx(results["test"], rel=1e-5)
    assert {"scores.png", "training_curve.png", "README.md"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert "pipeline_tag: text-ranking" in (tmp_path / "out" / "README.md").read_text()


def test_a_heads_one_output_is_kept(tmp_path, capsys):
    """Also one that is called a class, if that is asked."""
    given = settings(tmp_path, similar, "similarity")
    config = bertfast.BertModel.from_pretrained(given["model"]).config
    config.num_labels, config.problem_type = 1, "multi_label_classification"
    bertfast.BertForSequenceClassification(config).save_pretrained(given["model"])
    refused(ConfigError, "--head keep", finetune, PairsConfig(**given), dry_run=True)
    finetune(PairsConfig(**given, head="keep"), dry_run=True)
    assert "kept from" in capsys.readouterr().err


def test_a_querys_documents_are_not_one_text(tmp_path, capsys):
    given = settings(tmp_path, queries, "ranking")
    rows = queries(6, 50)
    rows[1]["positive"] *= 2
    rows[2]["negative"] += rows[2]["positive"]
    given["valid"] = tiny.write(tmp_path / "valid.jsonl", rows)
    finetune(PairsConfig(**given), dry_run=True)
    said = capsys.readouterr().err.splitlines()
    count = lambda title: next(line for line in said if line.startswith(title)).split()[-3:]
    repeated = len(queries(6, 50)[1]["positive"]), len(rows[2]["positive"])
    assert count("repeated texts") == ["0", str(sum(repeated)), "0"]
    assert count("texts of several labels") == ["0", str(repeated[1]), "0"]
    assert [w for w in said if "more than one label" in w] == [
        f"warning: valid: {repeated[1]} texts have more than one label"
    ]


@pytest.mark.parametrize("family", ["Bert", *tiny_families.FAMILIES])
def test_ranking_is_a_cross_encoders(family, tmp_path, capsys):
    given = settings(tmp_path, queries, "ranking", max_steps=4)
    if family != "Bert":
        given["model"] = str(tiny_families.checkpoint(tmp_path / "other", family))
        given["max_length"] = 40
    results = finetune(PairsConfig(**given))
    theirs, rows = CrossEncoder(given["out"], device="cpu"), queries(12, 90)
    evaluator = CrossEncoderRerankingEvaluator(rows, at_k=10, show_progress_bar=False)
    expected = evaluator(theirs)
    for ours, name in (("mrr@10", "mrr@10"), ("ndcg@10", "ndcg@10"), ("map", "map")):
        assert results["test"][ours] == pytest.approx(expected[name], abs=1e-6)
    table = tiny.write(tmp_path / "t.jsonl", rows)
    capsys.readouterr()
    assert main(["predict", "pairs", "--model", given["out"], "--input", table]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, one in zip(rows, found, strict=True):
        documents = row["positive"] + row["negative"]
        truth = theirs.rank(row["query"], documents)
        assert [r["document"] for r in one["ranking"]] == [t["corpus_id"] for t in truth]
        np.testing.assert_allclose(
            [r["score"] for r in one["ranking"]], [t["score"] for t in truth], atol=1e-5
        )
    assert main(["evaluate", "pairs", "--model", given["out"], "--data", given["test"]]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == pytest.approx(results["test"], rel=1e-6)


def test_forms_of_candidates(tmp_path):
    """Flat rows, and lists; a query in several rows is one."""
    flat = [
        {"query": q, "document": d, "label": y}
        for q, d, y in (("a", "x", 1), ("b", "y", 0), ("a", "z", 0), ("b", "w", 2))
    ]
    found = load_candidates(tiny.write(tmp_path / "f.jsonl", flat))
    assert [g.tolist() for g in found.groups()] == [[0, 2], [1, 3]] and not found.listed
    lists = [{"query": "a", "documents": ["x", "z"], "labels": [1, 0]},
             {"query": "b", "documents": ["y", "w"], "labels": [0, 2]}]  # fmt: skip
    other = load_candidates(tiny.write(tmp_path / "l.jsonl", lists))
    assert other.listed and other.texts == ["a", "a", "b", "b"] and other.labels == [1, 0, 0, 2]
    assert other.rows == [1, 1, 2, 2]
    both = [{"query": "a", "positive": "x", "negative": ["z"]}, {"query": "b", "positive": ["w"]}]
    third = load_candidates(tiny.write(tmp_path / "p.jsonl", both))
    assert third.pairs == ["x", "z", "w"] and third.labels == [1, 0, 1]


def test_a_query_stands_in_one_part(tmp_path):
    given = settings(tmp_path, queries, "ranking", max_steps=1)
    flat = [
        {"query": row["query"], "document": d, "label": float(d in row["positive"])}
        for row in queries(30) for d in row["positive"] + row["negative"]
    ]  # fmt: skip
    given["train"] = tiny.write(tmp_path / "flat.jsonl", flat[::2] + flat[1::2])
    del given["valid"], given["test"]
    results = finetune(PairsConfig(**given))
    told = json.loads((tmp_path / "out" / "data_report.json").read_text())["leakage"]
    assert (
        set(told.values()) == {0} and results["valid"]["queries"] + results["test"]["queries"] > 2
    )


def test_weight_of_relevant_documents():
    """The loss beside its formula."""
    import torch

    task = pairs.PairsTask(
        PairsConfig(goal="ranking", positive_weight=3.0), torch.device("cpu"), print
    )
    logits, targets = torch.tensor([[0.3], [-1.2], [2.0]]), torch.tensor([1.0, 0.0, 0.5])
    batch = type("Batch", (), {"targets": targets, "real": None})
    task.logits = lambda model, batch: logits
    p = torch.sigmoid(logits[:, 0].double())
    expected = -(3 * targets * p.log() + (1 - targets) * (1 - p).log()).sum()
    assert task.loss(None, batch).item() == pytest.approx(expected.item(), rel=1e-6)
    batch.real = torch.tensor([1, 0, 1])
    expected = -(3 * targets * p.log() + (1 - targets) * (1 - p).log())[[0, 2]].sum()
    assert task.loss(None, batch).item() == pytest.approx(expected.item(), rel=1e-6)


BAD = {
    "no query column": ([{"document": "x", "label": 1}], "no column 'query'.*with lists"),
    "no document": ([{"query": "a", "label": 1}], "no column 'document'"),
    "no label": ([{"query": "a", "document": "x"}], "no column 'label'"),
    "empty query": ([{"query": " ", "document": "x", "label": 1}], r"row 1 \(line 1\).*empty text"),
    "negative label": ([{"query": "a", "document": "x", "label": -1}], "is -1; expected a relevance"),
    "text label": ([{"query": "a", "document": "x", "label": "yes"}], "'yes'; expected a number"),
    "nan": ([{"query": "a", "document": "x", "label": float("nan")}], "expected a finite number"),
    "no list": ([{"query": "a", "positive": 3}], "is 3, expected a list of texts"),
    "empty list": ([{"query": "a", "positive": []}], "is an empty list; give a text"),
    "a number in a list": ([{"query": "a", "positive": ["x", 3]}], "is 3, a int; expected a string"),
    "lists that differ": (
        [{"query": "a", "documents": ["x", "y"], "labels": [1]}], "1 labels for 2 documents"),
    "labels are no list": ([{"query": "a", "documents": ["x"], "labels": 1}], "expected a list of num"),
    "no labels": ([{"query": "a", "documents": ["x"]}], "no column 'labels' beside 'documents'"),
    "nothing relevant": ([{"query": "a", "document": "x", "label": 0}], "no document is relevant"),
    "nothing": ([], "is empty|has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_candidates(name, tmp_path):
    rows, message = BAD[name]
    given = settings(tmp_path, queries, "ranking")
    given["train"] = tiny.write(tmp_path / "bad.jsonl", rows)
    refused(DataError, f"bad.jsonl.*({message})", finetune, PairsConfig(**given))
    assert not (tmp_path / "out").exists()


def test_bad_similarities(tmp_path):
    given = settings(tmp_path, similar, "similarity")
    for rows, message in (
        ([{"text": "a", "label": 1}], "no column 'text_pair'"),
        ([{"text": "", "text_pair": "", "label": 1}], r"row 1 .*is empty, and so is"),
        ([{"text": "a", "text_pair": "b", "label": "much"}], "expected a number"),
        ([{"text": "a", "text_pair": "b", "label": 1}] * 3, "all labels of train are 1"),
    ):
        given["train"] = tiny.write(tmp_path / "bad.jsonl", rows)
        refused(DataError, f"bad.jsonl.*{message}", finetune, PairsConfig(**given))
    assert not (tmp_path / "out").exists()


def test_settings():
    refused(ConfigError, "goal is 'best', expected one of", PairsConfig, goal="best")
    refused(ConfigError, "positive_weight is 0", PairsConfig, goal="ranking", positive_weight=0.0)
    refused(ConfigError, "positive_weight is 2.0, expected 1", PairsConfig, positive_weight=2.0)
    refused(ConfigError, "metric is 'map'", PairsConfig, metric="map")
    assert PairsConfig(goal="ranking").metric == "mrr@10" and PairsConfig().metric == "spearman"


def test_a_classifier_scores_no_pairs(tmp_path):
    folder = tiny_families.checkpoint(
        tmp_path / "m", "Roberta", "ForSequenceClassification", num_labels=3
    )
    refused(bertfast.model.CheckpointError, "3 outputs.*evaluate classify",
            pairs.predict, str(folder), [("a", "b")])  # fmt: skip


def test_groups_of_nothing():
    assert Candidates([], [], []).groups() == []
