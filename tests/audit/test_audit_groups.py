"""Figures by group: fairlearn's own; a planted bias is found, an unbiased control isn't."""

import csv
import json
import sys

import audited
import numpy as np
import pytest
import tiny
from fairlearn import metrics as fm
from helpers import refused
from sklearn.metrics import accuracy_score, f1_score

from bertfast.audit import figures, groups
from bertfast.cli import main
from bertfast.data import DataError
from bertfast.train import ConfigError, predict


def drawn(n=400, classes=3, seed=0):
    r = np.random.default_rng(seed)
    truth, group = r.integers(0, classes, n), r.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1])
    said = np.where(
        r.random(n) < np.where(group == "a", 0.8, 0.5), truth, r.integers(0, classes, n)
    )
    return truth, said, group


def test_figures_are_fairlearns():
    truth, said, group = drawn()
    found = figures.by_group(truth, said, group, [0, 2], samples=10)
    named = {"accuracy": accuracy_score, "macro_f1": lambda y, s: f1_score(y, s, average="macro")}
    frame = fm.MetricFrame(metrics=named, y_true=truth, y_pred=said, sensitive_features=group)
    for name in named:
        block = found["metrics"][name]
        for g in "abc":
            assert block["groups"][g]["value"] == pytest.approx(frame.by_group[name][g], abs=1e-12)
        assert block["overall"]["value"] == pytest.approx(frame.overall[name], abs=1e-12)
        assert block["difference"]["value"] == pytest.approx(frame.difference()[name], abs=1e-12)
        assert block["ratio"]["value"] == pytest.approx(frame.ratio()[name], abs=1e-12)
    for c in (0, 2):
        rates, given = found["rates"][c], {"y_true": truth == c, "y_pred": said == c}
        for name in figures.RATES:
            own = fm.MetricFrame(metrics=getattr(fm, name), **given, sensitive_features=group)
            for g in "abc":
                value = rates[name]["groups"][g]["value"]
                assert value == pytest.approx(own.by_group[g], abs=1e-12)
        for what in ("demographic_parity", "equalized_odds"):
            for key in ("difference", "ratio"):
                expected = getattr(fm, f"{what}_{key}")(**given, sensitive_features=group)
                assert rates[what][key]["value"] == pytest.approx(expected, abs=1e-12)


def test_a_table_of_counts_tells_what_its_rows_do():
    """Rows drawn with replacement, by fairlearn; a group may be missing, a class too."""
    truth, said, group = drawn(60)
    kinds, kind, counts = np.unique(
        np.stack([np.unique(group, return_inverse=True)[1], truth, said]),
        axis=1, return_inverse=True, return_counts=True,
    )  # fmt: skip
    table = figures._Table(kinds, 3)
    named = {"accuracy": accuracy_score, "macro_f1": lambda y, s: f1_score(y, s, average="macro")}
    for seed in range(4):
        at = np.random.default_rng(seed).integers(0, 60, 60)
        n = np.bincount(kind.ravel()[at], minlength=len(counts))[None]
        given = {"y_true": truth[at], "y_pred": said[at], "sensitive_features": group[at]}
        own = fm.MetricFrame(metrics=named, **given)
        for name in named:
            expected = [*own.by_group[name], own.overall[name]]
            assert getattr(table, name)(n)[0] == pytest.approx(expected)
        for c in range(3):
            given |= {"y_true": truth[at] == c, "y_pred": said[at] == c}
            for name, found in zip(figures.RATES, table.rates(n, c)[0], strict=True):
                rate = fm.MetricFrame(metrics=getattr(fm, name), **given)
                expected = [*rate.by_group, rate.overall]
                assert np.nan_to_num(found) == pytest.approx(expected)  # fairlearn's 0 of nothing


def test_intervals_are_a_bootstraps_of_rows():
    """A plain one draws others: ends differ by chance."""
    truth, said, group = drawn(300, 2)
    found = figures.by_group(truth, said, group, [1], samples=4000)
    r, samples = np.random.default_rng(5), []
    for _ in range(4000):
        at = r.integers(0, 300, 300)
        y, s, g = truth[at], said[at], group[at]
        accuracy = [(y == s)[g == name].mean() for name in "abc"]
        rate = [s[(g == name) & (y == 1)].mean() for name in "abc"]
        samples.append([*accuracy, np.ptp(accuracy), *rate, np.ptp(rate), (y == s).mean()])
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    accuracy, rate = found["metrics"]["accuracy"], found["rates"][1]["true_positive_rate"]
    blocks = [*(accuracy["groups"][g] for g in "abc"), accuracy["difference"]]
    blocks += [*(rate["groups"][g] for g in "abc"), rate["difference"], accuracy["overall"]]
    assert [block["low"] for block in blocks] == pytest.approx(low, abs=0.02)
    assert [block["high"] for block in blocks] == pytest.approx(high, abs=0.02)


def test_a_rate_of_nothing_is_none():
    truth, said = np.array([1, 0, 1, 0, 0]), np.array([1, 0, 0, 1, 0])
    rates = figures.by_group(truth, said, list("aaabb"), [1], samples=50)["rates"][1]
    assert np.isnan(rates["true_positive_rate"]["groups"]["b"]["value"])
    assert rates["true_positive_rate"]["difference"]["value"] == 0  # of the one group that has it
    assert rates["false_positive_rate"]["groups"]["b"]["value"] == 0.5
    assert all(np.isfinite([*v.values()]).all() for v in rates["equalized_odds"].values())


def test_few_rows_are_never_marked():
    """A bootstrap of rows that are all right has no width."""
    group = np.array(["few"] * 29 + ["many"] * 300)
    truth = np.arange(329) % 2
    said = np.where((group == "few") | (np.arange(329) % 3 > 0), truth, 1 - truth)
    for name, marked in (("few", False), ("many", True)):
        block = figures.by_group(truth, said, group, [1], samples=200)["metrics"]["accuracy"]
        assert block["groups"][name]["apart"] is marked


def test_planted_bias_and_control(classifiers, table):
    biased = groups(classifiers["group"], table, group_column="sex", positive=["yes"])
    control = groups(classifiers["colour"], table, group_column="sex", positive=["yes"])
    rates, other = biased["rates"]["yes"], control["rates"]["yes"]
    assert rates["equalized_odds"]["difference"]["low"] > 0.8
    assert all(v["apart"] for v in rates["selection_rate"]["groups"].values())
    assert other["equalized_odds"]["difference"]["value"] < 0.1
    assert not any(v["apart"] for v in other["true_positive_rate"]["groups"].values())
    assert biased["metrics"]["accuracy"]["overall"]["high"] < 0.65
    assert control["metrics"]["accuracy"]["overall"]["value"] > 0.95
    texts = [row["text"] for row in audited.rows(200, 3)]
    said = [row["label"] for row in predict(classifiers["group"], texts, device="cpu")]
    females = [
        s == "yes" for s, r in zip(said, audited.rows(200, 3), strict=True) if r["sex"] == "female"
    ]
    assert rates["selection_rate"]["groups"]["female"]["value"] == pytest.approx(np.mean(females))
    assert biased["sizes"]["female"]["rows"] == len(females) and not biased["left_out"]


def test_groups_by_terms(classifiers, tmp_path):
    texts = [*audited.rows(120, 4), {"text": "the red cat", "label": "yes", "sex": "male"}]
    texts.append({"text": "she saw him", "label": "no", "sex": "male"})
    path = tiny.write(tmp_path / "rows.jsonl", texts)
    named = groups(classifiers["group"], path, group_column="sex", samples=20)
    found = groups(
        classifiers["group"], path, lexicon=["gender", "names"], ignore_case=True, samples=20
    )
    assert found["left_out"] == {"no term": 1, "terms of several groups": 1}
    assert found["rows"] == 122
    assert {g: s["rows"] for g, s in found["sizes"].items()} == {
        "female": named["sizes"]["female"]["rows"],
        "male": named["sizes"]["male"]["rows"] - 2,
    }


def test_small_groups_are_said(classifiers, table, tmp_path):
    some = audited.rows(60, 5)
    for i, row in enumerate(some):
        row["sex"] = "x" if i < 3 else row["sex"]
        row["label"] = "no" if i < 3 else row["label"]
    path = tiny.write(tmp_path / "rows.jsonl", some)
    notes = "\n".join(groups(classifiers["colour"], path, group_column="sex", samples=20)["notes"])
    assert "group 'x' is small (3 rows)" in notes
    assert "group 'x' has 0 rows of 'yes': its true positive rate is missing" in notes


def test_command(classifiers, table, tmp_path, capsys):
    given = ["audit", "groups", "--model", classifiers["group"], "--data", table]
    given += ["--group-column", "sex", "--samples", "50"]
    out = tmp_path / "audit.json"
    assert main([*given, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    for text in ("female", "macro F1", "class 'yes' against the others", "equalized odds: diff"):
        assert text in shown
    assert main([*given, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert main([*given, "--positive", "maybe"]) == 2
    assert (
        "positive is 'maybe', no class of the model; known are no, yes" in capsys.readouterr().err
    )


def test_wrong_input(classifiers, table, tmp_path):
    run = lambda rows, **options: groups(
        classifiers["colour"], tiny.write(tmp_path / "x.jsonl", rows), **options
    )
    by = {"group_column": "sex"}
    rows = audited.rows(20)
    refused(ConfigError, "give either group_column or lexicon", run, rows)
    refused(DataError, r"x.jsonl: no column 'age'; it has: 'text'", run, rows, group_column="age")
    bad = [rows[0], rows[1] | {"sex": None}, *rows[2:]]
    refused(DataError, r"x.jsonl: row 2 \(line 2\): column 'sex' is missing", run, bad, **by)
    one = [row for row in rows if row["sex"] == "male"]
    refused(
        DataError, "x.jsonl: the groups by column 'sex' are: male; expected two", run, one, **by
    )
    none = [{"text": "the red cat", "label": "yes"}] * 3
    refused(DataError, r"are: none; .*'no term': 3", run, none, lexicon="gender")
    refused(DataError, "x.jsonl: is empty", run, [], **by)
    (tmp_path / "e.csv").write_text("text,label,sex\n")
    refused(
        DataError,
        "e.csv: has a header .* but no rows",
        groups,
        classifiers["colour"],
        tmp_path / "e.csv",
        **by,
    )


def test_without_fairlearn(classifiers, table, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fairlearn", None)
    given = ["audit", "groups", "--model", classifiers["group"], "--data", table]
    assert main([*given, "--group-column", "sex"]) == 1
    assert "pip install 'bertfast[audit]'" in capsys.readouterr().err


def test_csv_and_a_model_of_more_classes(tmp_path):
    """The rates wait for a class to be named."""
    settings = tiny.settings(tmp_path, epochs=1)
    from bertfast.train import ClassifyConfig, finetune

    finetune(ClassifyConfig(**settings))
    with open(tmp_path / "t.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["text", "label", "g"])
        out.writerows([r["text"], r["label"], i % 2] for i, r in enumerate(tiny.rows(80)))
    found = groups(settings["out"], tmp_path / "t.csv", group_column="g", samples=20)
    assert found["rates"] == {} and "give positive" in found["notes"][0]
    found = groups(
        settings["out"], tmp_path / "t.csv", group_column="g", samples=20, positive=["red", "blue"]
    )
    assert [*found["rates"]] == ["red", "blue"]
    truth = found["sizes"]["0"]["positives"]["red"] + found["sizes"]["1"]["positives"]["red"]
    assert truth == 27
