"""`finetune qa`, `evaluate qa`, `predict qa` on tiny models, beside transformers' own model."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_families
import tiny_qa
import torch
import transformers
import yaml
from torch.nn import functional as F

from bertfast import cli
from bertfast.data.questions import load_questions
from bertfast.model import CheckpointError
from bertfast.train import finetune, networks, opening
from bertfast.train.config import ConfigError
from bertfast.train.packed import Packed
from bertfast.train.tasks import qa

FAMILIES = ("Bert", *tiny_families.FAMILIES)
WORDS = [w.lower() for w in (*tiny_qa.WORDS, *tiny_qa.ASKED)]


def write(path: Path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(tiny_qa.squad(rows)))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(folder: Path, family="Bert", **options) -> dict:
    """QAConfig's arguments for a short run."""
    if not (folder / "model").exists():
        tiny_families.checkpoint(folder / "model", family, words=WORDS, initializer_range=0.1)
        write(folder / "train.jsonl", tiny_qa.rows(160))
        write(folder / "valid.json", tiny_qa.rows(40, 1))
        write(folder / "test.jsonl", tiny_qa.rows(40, 2))
    base = {
        n: str(folder / f"{n}.{'json' if n == 'valid' else 'jsonl'}")
        for n in ("train", "valid", "test")
    }
    base |= {"model": str(folder / "model"), "out": str(folder / "out"), "device": "cpu"}
    base |= {"max_length": 24, "stride": 4, "max_answer_length": 6, "batch_size": 16, "lr": 3e-3}
    return base | {"epochs": 1} | options


def run(folder, **options):
    return finetune(qa.QAConfig(**settings(folder, **options)))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def predicted(model, path, **options):
    return list(qa.predict_table(str(model), str(path), device="cpu", **options))


def loop(model, tokenizer, question, contexts, *, max_length, stride, longest, null):
    """The answer by transformers' model and tokenizer, one span at a time, over all contexts:
    (text, start, end, context, score, null score)."""
    found, least = [], None
    for number, context in enumerate(contexts):
        given = tokenizer(
            question, context, truncation="only_second", max_length=max_length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        for k, ids in enumerate(given["input_ids"]):
            more = {n: torch.tensor([given[n][k]]) for n in ("token_type_ids",) if n in given}
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids]), **more)
            start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
            score = start[0] + end[0]
            least = score if least is None else min(least, score)
            inside = [i for i, s in enumerate(given.sequence_ids(k)) if s == 1]
            for i in inside:
                for j in inside:
                    a, b = given["offset_mapping"][k][i][0], given["offset_mapping"][k][j][1]
                    text = context[a:b]
                    if i <= j < i + longest and text.strip():
                        a, b = (
                            a + len(text) - len(text.lstrip()),
                            b - len(text) + len(text.rstrip()),
                        )
                        found.append((start[i] + end[j], a, b, number))
    best = max(found)
    score, a, b, number = best
    if null is not None and least - score > null:
        return "", None, None, None, least, least
    return contexts[number][a:b], a, b, number, score, least


@pytest.mark.seconds("DistilBert", "DebertaV2")
@pytest.mark.parametrize("family", FAMILIES)
def test_learns_and_transformers_answers_the_same(family, tmp_path, capsys):
    results = run(tmp_path, family=family, epochs=3, eval_steps=100)
    losses = [r["loss"] for r in records(tmp_path / "out") if "loss" in r]
    assert np.mean(losses[-4:]) < 0.8 * losses[0]
    out = tmp_path / "out"
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(out).eval()
    assert type(model).__name__ == f"{family}ForQuestionAnswering"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    null = json.loads((out / "decision.json").read_text())["null_threshold"]
    rows = tiny_qa.rows(12, 3, longest=60)  # several windows
    answers = predicted(out, write(tmp_path / "new.json", rows))
    options = {"max_length": 24, "stride": 4, "longest": 6, "null": null}
    for row, found in zip(rows, answers, strict=True):
        expected = loop(model, tokenizer, row["question"], [row["context"]], **options)
        assert found["id"] == row["id"]
        got = [found[k] for k in ("answer", "start", "end", "context")]
        assert got == list(expected[:4])
        assert [found["score"], found["null_score"]] == pytest.approx(expected[4:], abs=1e-4)
    again = qa.evaluate(str(out), str(tmp_path / "test.jsonl"), device="cpu")
    assert again["f1"] == results["test"]["f1"]
    assert again["loss"] == pytest.approx(results["test"]["loss"], rel=1e-6)


@pytest.mark.seconds
def test_learns_to_answer_and_not_to(tmp_path):
    results = run(tmp_path, epochs=10, eval_steps=50)
    assert results["test"]["has_answer_f1"] > 0.8 and results["test"]["no_answer_f1"] > 0.6
    out = tmp_path / "out"
    for name in ("README.md", "score_diffs.png", "training_curve.png", "data_report.json"):
        assert (out / name).stat().st_size > 0, name
    card = (out / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card and "none is given where" in card
    saved = json.loads((out / "eval_results.json").read_text())
    null = json.loads((out / "decision.json").read_text())["null_threshold"]
    assert saved["valid"]["decision"] == {"null_threshold": null}
    counts = saved["test"]["counts"]
    assert counts["questions"] == 40 and 0 < counts["unanswerable"] < 40
    answers = predicted(out, tmp_path / "test.jsonl", alternatives=3)
    assert sum(a["answer"] == "" for a in answers) == counts["without_prediction"]
    for answer, row in zip(answers, tiny_qa.rows(40, 2), strict=True):
        assert len(answer["n_best"]) == 3
        assert sum(s["probability"] for s in answer["n_best"]) <= 1
        diff = answer["null_score"] - answer["n_best"][0]["score"]
        assert (answer["answer"] == "") == (diff > null)
        for span in answer["n_best"]:
            assert row["context"][span["start"] : span["end"]] == span["answer"]
    every = predicted(out, tmp_path / "test.jsonl", null_threshold="none")
    assert all(a["answer"] and a["null_score"] is None for a in every)
    none = predicted(out, tmp_path / "test.jsonl", null_threshold=-1e6)
    assert not any(a["answer"] for a in none) and none[0]["score"] == none[0]["null_score"]


@pytest.mark.seconds
def test_the_threshold_is_the_one_that_does_best(tmp_path):
    """Every threshold between the diffs of the validation questions, tried by `evaluate`."""
    results = run(tmp_path, epochs=3, eval_steps=100)
    out, valid = tmp_path / "out", str(tmp_path / "valid.json")
    answers = predicted(out, valid, alternatives=1, null_threshold=1e6)
    diffs = sorted(a["null_score"] - a["n_best"][0]["score"] for a in answers)
    tried = [qa.evaluate(str(out), valid, null_threshold=d + 1e-7, device="cpu")["f1"] for d in [diffs[0] - 1, *diffs][::4]]  # fmt: skip
    assert results["valid"]["f1"] >= max(tried) - 1e-9


def test_questions_that_all_have_an_answer(tmp_path, capsys):
    folder = tmp_path
    settings(folder)
    write(folder / "train.jsonl", tiny_qa.rows(32, 4, impossible=0))
    write(folder / "valid.json", tiny_qa.rows(16, 5, impossible=0))
    results = run(folder)
    assert json.loads((folder / "out" / "decision.json").read_text()) == {"null_threshold": None}
    assert not (folder / "out" / "score_diffs.png").exists()
    assert "every question gets one" in (folder / "out" / "README.md").read_text()
    assert "no_answer_f1" not in results["valid"]
    # the test part has some without: never a null, and SQuAD 2's score of them is 0
    assert "test: " in capsys.readouterr().err and results["test"]["no_answer_f1"] == 0
    assert all(a["answer"] for a in predicted(folder / "out", folder / "test.jsonl"))


def test_the_loss_is_that_of_each_window_alone(tmp_path):
    """Beside fp64 over each window's own tokens; packed (native) and padded (transformers)."""
    for family in ("Bert", "Roberta"):
        folder = tiny_families.checkpoint(tmp_path / family, family, words=WORDS)
        model = opening.pretrained(folder, qa.HEAD, "fresh", 2, False)[0]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        given = load_questions(write(tmp_path / "r.jsonl", tiny_qa.rows(7)))
        windows = qa.question_windows(tokenizer, given, max_length=20, stride=3)
        rows = [r | {"labels": t} for r, t in zip(windows.rows, windows.targets, strict=True)]
        pad = tokenizer.pad_token_id if networks.padded(model) else None
        batch = Packed.of_rows(rows, pad)
        logits = networks.logits(model, batch, per_token=True)
        found = qa.span_loss(logits.float(), batch)
        expected, starts = 0, batch.cu_seqlens.tolist()
        for i, target in enumerate(windows.targets):
            own = logits[starts[i] : starts[i + 1]].double()
            expected += F.cross_entropy(own.T, torch.tensor(target)) * 1.0
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        numbers = np.split(logits.detach().numpy(), starts[1:-1])
        mean = qa.answers.mean_loss(numbers, windows.targets)
        assert mean == pytest.approx(expected.item() / len(rows), rel=1e-5)


def test_the_loss_with_fillers(tmp_path):
    """In the buckets that a GPU's graphs have: the same, and no gradient to what is filled in."""
    folder = tiny_families.checkpoint(tmp_path / "m", "Bert", words=WORDS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = load_questions(write(tmp_path / "r.jsonl", tiny_qa.rows(5)))
    windows = qa.question_windows(tokenizer, given, max_length=20, stride=3)
    rows = [r | {"labels": t} for r, t in zip(windows.rows, windows.targets, strict=True)]
    batch = Packed.of_rows(rows)
    layout, values = batch.filled(False)
    filled = layout.batch(values)
    torch.manual_seed(0)
    logits = torch.randn(len(filled.input_ids), 2, requires_grad=True)
    real = len(batch.input_ids)
    loss = qa.span_loss(logits, filled)
    assert loss.item() == pytest.approx(qa.span_loss(logits[:real], batch).item(), rel=1e-6)
    loss.backward()
    assert logits.grad[:real].abs().sum() > 0 and not logits.grad[real:].any()
    assert logits.grad.isfinite().all()


def test_replayed_steps_are_launched_ones(tmp_path, tape, monkeypatch):
    losses = []
    for graphs in ("0", "1"):
        monkeypatch.setenv("BERTFAST_GRAPHS", graphs)
        results = run(tmp_path, out=str(tmp_path / graphs), max_steps=8, max_answer_length=6)
        losses.append([r["loss"] for r in records(tmp_path / graphs) if "loss" in r])
    assert results["train"]["graphs"]["hits"] > 4 and results["train"]["graphs"]["launched"] == 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_step_is_stocks(tmp_path):
    """Without dropout, of windows of one length: the loss of each of four steps is the one that
    transformers' model, loss and AdamW come to."""
    rows = [r for r in tiny_qa.rows(400, 6, longest=8) if len(r["context"].split()) == 9][:32]
    given = settings(tmp_path, max_length=24, epochs=1, batch_size=8, warmup=0.0, clip=0.0)
    given |= {"schedule": "constant", "weight_decay": 0.0, "seed": 3, "lr": 1e-3}
    given |= {"train": write(tmp_path / "same.jsonl", rows)}
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(given["model"])
    model.save_pretrained(tmp_path / "headed")
    transformers.AutoTokenizer.from_pretrained(given["model"]).save_pretrained(tmp_path / "headed")
    config = qa.QAConfig(**given | {"model": str(tmp_path / "headed")})
    task = qa.QATask(config, torch.device("cpu"), lambda text: None)
    finetune(config)
    task.read()
    task.tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "headed")
    task.model = task.build(tmp_path / "headed")
    task.check(tmp_path / "headed")
    encoded = task.encode(task.parts["train"])
    assert len({len(r["input_ids"]) for r in encoded}) == 1
    task.rows = {"train": encoded}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for batch in task.batches(0):
        part = [encoded[i] for i in batch]
        ids, types = (torch.tensor(np.stack([r[n] for r in part]).astype(int)) for n in ("input_ids", "token_type_ids"))  # fmt: skip
        places = torch.tensor(np.stack([r["labels"] for r in part]))
        out = model(input_ids=ids, token_type_ids=types, start_positions=places[:, 0], end_positions=places[:, 1])  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    ours = [r["loss"] for r in records(tmp_path / "out") if "loss" in r]
    assert len(ours) == 4 and ours == pytest.approx(losses, rel=2e-5)


def test_several_contexts_and_code_points(tmp_path):
    """The best of all contexts, beside the plain loop; offsets count an emoji once."""
    run(tmp_path)
    out = tmp_path / "out"
    contexts = ["the 🎉🎉 red Ada of", "is 🎉 Bob at Rome by", "Oslo"]
    path = tmp_path / "several.jsonl"
    path.write_text(json.dumps({"question": "who", "contexts": contexts}) + "\n")
    (found,) = predicted(out, path, null_threshold="none")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    expected = loop(
        model, tokenizer, "who", contexts, max_length=24, stride=4, longest=6, null=None
    )
    assert [found[k] for k in ("answer", "start", "end", "context")] == list(expected[:4])
    assert found["id"] == "1" and contexts[found["context"]][found["start"] : found["end"]] == found["answer"]  # fmt: skip


def test_the_report(tmp_path):
    given = settings(tmp_path)
    rows = [
        {"id": "1", "question": "who " * 9, "context": "Ada is red", "answers": [{"text": "Ada", "start": 0}]},
        {"id": "2", "question": "where", "context": "stone in Rome", "answers": [{"text": "one", "start": 2}]},
        {"id": "3", "question": "Where", "context": "stone  in Rome", "answers": [{"text": "Rome", "start": 10}]},
        {"id": "4", "question": "where", "context": "the of in by at red by", "answers": [{"text": "the of in by at red by", "start": 0}]},
        {"id": "5", "question": "who", "context": "xyz", "answers": []},
        {"id": "6", "question": "who", "context": "東京に行く", "answers": [{"text": "京", "start": 1}]},
    ]  # fmt: skip
    given |= {"train": write(tmp_path / "t.jsonl", rows), "max_query_length": 5, "test": None}
    given["valid"] = write(tmp_path / "v.jsonl", [rows[0] | {"id": "v"}, rows[4]])
    said = []
    task = qa.QATask(qa.QAConfig(**given), torch.device("cpu"), said.append)
    task.read()
    folder = Path(given["model"])
    task.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    task.model = task.build(folder)
    task.check(folder)
    report = task.report()
    part = report.parts["train"]
    place = lambda i: f"{given['train']}: row {i} (line {i}), id '{i}'"
    assert part.cut == [place(1)] and part.inside_words == [place(2)]
    assert part.disagreeing == [place(3)] and part.unreachable == [place(4)]
    assert (part.questions, part.answerable, part.contexts, part.duplicates) == (6, 5, 6, 1)
    assert report.leakage == {"questions of train and valid": 2, "contexts of train and valid": 2}
    text = str(report)
    for line in (
        "2 questions of train and valid are the same",
        f"train: 1 questions are cut: {place(1)}",
        "have more than 6 tokens, or are in no window: they can't be found",
        "answers begin or end inside a word",
        "asked again, with other answers",
    ):
        assert line in text, text
    json.dumps(report.as_dict())


ROW = {"id": "x", "question": "who", "context": "Ada sings", "answers": [{"text": "Ada", "start": 0}]}  # fmt: skip


@pytest.mark.parametrize(
    "rows, options, parts",
    [
        ([ROW, ROW | {"id": "y", "answers": [{"text": "Ada", "start": 1}]}], {}, ["row 2 (line 2)", "id 'y'", "'Ada' at character 1", "there is 'da '", "correct them"]),
        ([ROW, ROW], {}, ["row 2", "id 'x'", "already in row 1", "its own"]),
        ([ROW | {"answers": None}], {}, ["row 1", "is missing", "an empty list"]),
        ([ROW | {"answers": [{"text": "", "start": 0}]}], {}, ["row 1", "an empty list"]),
        ([ROW | {"answers": "Ada"}], {}, ["row 1", "answer_start"]),
        ([ROW | {"context": ""}], {}, ["row 1", "empty text", "drop the row"]),
        ([ROW | {"question": None}], {}, ["row 1", "question", "is missing"]),
        ([ROW | {"is_impossible": True}], {}, ["row 1", "is_impossible is True", "correct"]),
        ([ROW | {"answers": []}], {}, ["no question has an answer"]),
        ([ROW], {"context_column": "text"}, ["no column 'text'", "'context'"]),
        ([ROW], {"stride": 24}, ["stride is 24", "0 to max_length - 1"]),
        ([ROW], {"stride": 20}, ["smaller stride"]),
        ([ROW], {"max_length": 1000}, ["max_length is 1000", "takes up to 64"]),
        ([ROW], {"head": "keep"}, ["head is 'keep'", "--head fresh"]),
        ([ROW], {"train": "absent.json"}, ["absent.json", "No such file"]),
    ],
)  # fmt: skip
def test_bad_inputs_leave_nothing(tmp_path, capsys, rows, options, parts):
    given = settings(tmp_path) | {"train": write(tmp_path / "bad.jsonl", rows)} | options
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    assert cli.main(["finetune", "qa", *arguments]) in (1, 2)
    said = capsys.readouterr()
    told = said.err.splitlines()[-1]
    assert all(part in told for part in parts), told
    if "row" in " ".join(parts):
        assert str(tmp_path / "bad.jsonl") in told
    assert not said.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"stride": -1}, "stride is -1, expected 0 or more"),
        ({"max_query_length": 0}, "max_query_length is 0, expected 1 or more"),
        ({"max_answer_length": 0}, "max_answer_length is 0"),
        ({"n_best": 0}, "n_best is 0"),
        ({"metric": "accuracy"}, "metric is 'accuracy', expected one of f1, exact_match, loss"),
    ],
)
def test_bad_settings(change, expected):
    with pytest.raises(ConfigError, match=expected):
        qa.QAConfig(**change)


def test_bad_calls_of_a_trained_model(tmp_path):
    run(tmp_path, max_steps=1)
    out, path = str(tmp_path / "out"), str(tmp_path / "test.jsonl")
    for options, said in (
        ({"null_threshold": "much"}, "null_threshold is 'much', expected a number or none"),
        ({"null_threshold": "nan"}, "null_threshold is 'nan'"),
        ({"alternatives": -1}, "alternatives is -1"),
        ({"n_best": 0}, "n_best is 0"),
        ({"stride": 30}, "stride is 30"),
        ({"max_length": 65}, "takes up to 64"),
    ):
        with pytest.raises(ConfigError, match=said):
            predicted(out, path, **options)
    with pytest.raises(CheckpointError, match="no fine-tuned model for this task"):
        predicted(tmp_path / "model", path)
    (tmp_path / "out" / "decision.json").write_text('{"null_threshold": "x"}')
    with pytest.raises(CheckpointError, match="null_threshold 'x', expected a number, or null"):
        predicted(out, path)


def test_a_model_of_anothers_making(tmp_path, capsys):
    """No decision.json and no settings: 0 where the data have questions without an answer."""
    folder = tiny_families.checkpoint(
        tmp_path / "m", "Roberta", "ForQuestionAnswering", words=WORDS
    )
    path = write(tmp_path / "q.jsonl", tiny_qa.rows(10))
    options = {"stride": 8, "max_length": 40, "device": "cpu"}
    found = qa.evaluate(str(folder), path, **options)
    assert found["decision"] == {"null_threshold": 0.0} and "null_threshold is 0" in capsys.readouterr().err  # fmt: skip
    assert found == qa.evaluate(str(folder), path, null_threshold=0, **options)
    assert qa.evaluate(str(folder), path, null_threshold="none", **options)["no_answer_f1"] == 0
    assert all(a["answer"] for a in predicted(folder, path, stride=8, max_length=40))


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_a_checkpoint_of_another_task(family, tmp_path, capsys):
    """Its encoder stays, its classes go; a head for questions stays, unless told otherwise."""
    given = settings(tmp_path, max_steps=1, lr=1e-9)
    other = tiny_families.checkpoint(tmp_path / "other", family, "ForSequenceClassification", words=WORDS, num_labels=5)  # fmt: skip
    finetune(qa.QAConfig(**given | {"model": str(other)}))
    assert "head: new" in capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "id2label" not in config or len(config["id2label"]) == 2
    model, told = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", output_loading_info=True)  # fmt: skip
    assert not told["missing_keys"] and model.qa_outputs.out_features == 2
    own = transformers.AutoModel.from_pretrained(other).state_dict()
    for name, t in model.base_model.state_dict().items():
        torch.testing.assert_close(t, own[name], atol=1e-6, rtol=0)
    for which, kept in (("auto", True), ("fresh", False)):
        more = {"model": given["out"], "head": which, "out": str(tmp_path / which), "seed": 1}
        finetune(qa.QAConfig(**given | more))
        again = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / which)
        same = torch.allclose(again.qa_outputs.weight, model.qa_outputs.weight, atol=1e-6)
        assert same == kept and ("head: kept from" in capsys.readouterr().err) == kept


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_precisions_and_frozen_folders(family, tmp_path):
    """The same answers from packed weights, to what they round to."""
    import bertfast

    run(tmp_path, family=family, epochs=3, eval_steps=100)
    out, path = tmp_path / "out", tmp_path / "test.jsonl"
    plain = predicted(out, path)
    for precision in ("fp32", "int8"):
        for found, row in zip(predicted(out, path, precision=precision), plain, strict=True):
            near = 1e-4 if precision == "fp32" else 0.5
            assert found["null_score"] == pytest.approx(row["null_score"], abs=near)
    model = bertfast.freeze(opening.trained(out, qa.HEAD, False), "fp32")
    bertfast.save_frozen(model, tmp_path / "frozen")
    transformers.AutoTokenizer.from_pretrained(out).save_pretrained(tmp_path / "frozen")
    options = {"max_length": 24, "stride": 4, "max_answer_length": 6, "null_threshold": "none"}
    every = predicted(out, path, null_threshold="none")
    for found, row in zip(predicted(tmp_path / "frozen", path, **options), every, strict=True):
        assert found["answer"] == row["answer"] and found["score"] == pytest.approx(row["score"], abs=1e-4)  # fmt: skip


def test_the_command_line(tmp_path, capsys):
    given = settings(tmp_path, max_steps=3)
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    assert cli.main(["finetune", "qa", *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"f1", "exact_match", "has_answer_f1", "no_answer_f1", "loss"} <= figures.keys()
    config = yaml.safe_load((tmp_path / "out" / "run_config.yaml").read_text())
    assert config["kind"] == "qa" and config["stride"] == 4 and config["metric"] == "f1"
    out = given["out"]
    assert cli.main(["evaluate", "qa", "--model", out, "--data", given["test"]]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["f1"] == figures["f1"]
    to = str(tmp_path / "answers.jsonl")
    options = ["--alternatives", "2", "--null-threshold", "none", "--output", to]
    assert cli.main(["predict", "qa", "--model", out, "--input", given["valid"], *options]) == 0
    lines = [json.loads(line) for line in Path(to).read_text().splitlines()]
    assert [line["id"] for line in lines] == [r["id"] for r in tiny_qa.rows(40, 1)]
    assert all(len(line["n_best"]) == 2 and line["answer"] for line in lines)


def test_a_split_of_one_file(tmp_path):
    given = settings(tmp_path) | {"valid": None, "test": None}
    rows = tiny_qa.rows(60)
    twice = [row | {"id": row["id"] + "b", "question": "who is"} for row in rows]
    given |= {"train": write(tmp_path / "all.jsonl", rows + twice)}
    task = qa.QATask(qa.QAConfig(**given), torch.device("cpu"), print)
    task.read()
    assert {n: len(p) for n, p in task.parts.items()} == {"train": 96, "valid": 12, "test": 12}
    contexts = [{c for (c,) in part.contexts} for part in task.parts.values()]
    assert not contexts[0] & contexts[1] and not contexts[1] & contexts[2]
