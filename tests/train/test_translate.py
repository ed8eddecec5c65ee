"""`finetune translate`: from pairs of texts to an evaluated model."""

import csv
import gzip
import json
import random

import pytest
import sacrebleu
import torch
import transformers
from helpers import refused
from tiny import WORDS, checkpoint
from tiny import write as write_rows

import bertfast
from bertfast import cli, data
from bertfast.data.errors import ConfigError
from bertfast.files import read_json
from bertfast.train import finetune
from bertfast.train.packed_pairs import Pairs
from bertfast.train.tasks import translate
from bertfast.train.tasks.translate_inference import encode_sources, lowercases, text_of

pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")
TranslateConfig = translate.Task.Config


def pairs(n, seed=0):
    """A text, and the same backwards."""
    r = random.Random(seed)
    sources = [[r.choice(WORDS) for _ in range(r.randint(1, 5))] for _ in range(n)]
    return [(" ".join(s), " ".join(s[::-1])) for s in sources]


def tsv(path, rows):
    path.write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    return str(path)


def settings(folder, **options):
    if not (folder / "model").exists():
        checkpoint(folder / "model")
        tsv(folder / "train.tsv", pairs(200))
        tsv(folder / "valid.tsv", pairs(24, 1))
    base = {"model": str(folder / "model"), "train": str(folder / "train.tsv")}
    base |= {"valid": str(folder / "valid.tsv"), "out": str(folder / "out"), "epochs": 1}
    base |= {"lr": 3e-3, "max_length": 16, "device": "cpu"}
    return base | ({} if "batch_tokens" in options else {"batch_size": 20}) | options


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, results) of a run that has learnt something."""
    folder = tmp_path_factory.mktemp("translate")
    test = tsv(folder / "test.tsv", pairs(24, 2))
    torch.manual_seed(0)
    given = settings(folder, epochs=9, batch_tokens=400, test=test, eval_steps=20, num_beams=3)
    return folder, finetune(TranslateConfig(**given, label_smoothing=0.05, warmup=0.05))


def test_it_learns(run):
    """The decoder looks at the source: without it a token's entropy is 2.2 nats and more."""
    folder, results = run
    records = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < 0.7 * losses[0]
    assert results["valid"]["loss"] < 2.0
    for part in ("valid", "test"):
        assert 10 < results[part]["chrf"] < 100
        assert results[part]["num_beams"] == (1 if part == "valid" else 3)
    names = {"README.md", "run_config.yaml", "training_curve.png", "data_report.json"}
    names |= {"eval_results.json", "generation_config.json", "model.safetensors"}
    assert names <= {p.name for p in (folder / "out").iterdir()}
    card = (folder / "out/README.md").read_text()
    assert "pipeline_tag: translation" in card and "| bleu |" in card
    assert read_json(folder / "out/eval_results.json")["test"]["bleu"] == results["test"]["bleu"]


def test_transformers_translates_the_same(run):
    """The folder as it is, by transformers' generate, beside `predict`."""
    folder, results = run
    out = folder / "out"
    stock = transformers.EncoderDecoderModel.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    test = pairs(24, 2)
    given = tokenizer([a for a, _ in test], padding=True, return_tensors="pt")
    given.pop("token_type_ids")
    made = stock.generate(**given, num_beams=3, max_new_tokens=16)
    expected = tokenizer.batch_decode(made, skip_special_tokens=True)
    rows = list(translate.predict_table(str(out), str(folder / "test.tsv"), device="cpu"))
    assert [r["translation"] for r in rows] == expected
    assert all(r["score"] < 0 for r in rows)
    bleu = sacrebleu.corpus_bleu(expected, [[b for _, b in test]], lowercase=True).score
    assert abs(results["test"]["bleu"] - bleu) < 1e-9


def test_evaluate_is_the_runs_own(run):
    folder, results = run
    found = translate.evaluate(str(folder / "out"), str(folder / "test.tsv"), device="cpu")
    for name in ("bleu", "chrf", "examples"):
        assert found[name] == results["test"][name]
    assert abs(found["loss"] - results["test"]["loss"]) < 1e-5
    greedy = translate.evaluate(
        str(folder / "out"), str(folder / "valid.tsv"), num_beams=1, precision="fp32"
    )
    assert greedy["bleu"] == results["valid"]["bleu"]


def test_the_loss_is_the_mean_over_target_tokens(run):
    """Without smoothing, as transformers computes it on padded pairs."""
    folder, results = run
    stock = transformers.EncoderDecoderModel.from_pretrained(folder / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    total = count = 0
    for a, b in pairs(24, 2):
        labels = tokenizer(b, return_tensors="pt")["input_ids"][:, 1:]
        given = tokenizer(a, return_tensors="pt")
        with torch.no_grad():
            loss = stock(given["input_ids"], labels=labels).loss
        total, count = total + loss.item() * labels.numel(), count + labels.numel()
    assert abs(results["test"]["loss"] - total / count) < 1e-5 * total / count


def test_command_line(run, capsys, tmp_path):
    folder, _ = run
    sources = tmp_path / "sources.txt"
    sources.write_text("red cat\n\nstone\n")
    model = ["--model", str(folder / "out"), "--device", "cpu"]
    assert (
        cli.main(["predict", "translate", *model, "--input", str(sources), "--num-beams", "1"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"translation", "score"}] * 2
    path = str(folder / "valid.tsv")
    assert cli.main(["evaluate", "translate", *model, "--data", path]) == 0
    assert {"bleu", "chrf", "loss"} <= set(json.loads(capsys.readouterr().out))


def test_going_on_from_a_trained_model(run, tmp_path):
    folder, _ = run
    given = settings(folder, model=str(folder / "out"), out=str(tmp_path / "out"), max_steps=1)
    assert finetune(TranslateConfig(**given))["train"]["step"] == 1
    more = TranslateConfig(**given | {"decoder_layers": 1, "out": str(tmp_path / "other")})
    refused(ConfigError, "holds a decoder", finetune, more)


def test_new_weights_from_a_tokenizer(tmp_path):
    """A folder without a model, and a decoder of another depth; nothing held out is given."""
    given = settings(tmp_path, size="tiny", decoder_layers=1, max_steps=1, valid=None, eval_rows=2)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "model" / name).unlink()
    results = finetune(TranslateConfig(**given))
    assert results["valid"]["examples"] == 2 and results["test"]["examples"] > 2
    model = bertfast.BertEncoderDecoder.from_pretrained(tmp_path / "out")
    sides = model.config.encoder, model.config.decoder
    assert [s.num_hidden_layers for s in sides] == [2, 1]
    assert model.config.encoder.vocab_size == 5 + len(WORDS)


def test_what_a_step_is(tmp_path):
    """Micro-batches hold up to so many tokens of both sides, and are what transformers is given."""
    config = TranslateConfig(**settings(tmp_path, batch_tokens=60))
    task = translate.Task(config, torch.device("cpu"))
    task.read()
    task.tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    task.model = task.build(tmp_path / "model")
    task.rows = {name: task.encode(part) for name, part in task.parts.items()}
    assert task.model.encoder.pooler.dense.weight.requires_grad is False
    seen, batches = [], task.batches(0)
    for chosen in batches:
        batch = task.load(chosen)
        assert isinstance(batch, Pairs) and task.tokens(batch) <= 60
        assert task.weight(batch) == (batch.labels >= 0).sum()
        seen += chosen
    assert sorted(seen) == list(range(200)) and task.batches(1) != batches
    source, target = task.parts["train"].sources[seen[0]], task.parts["train"].targets[seen[0]]
    row = task.rows["train"][seen[0]]
    assert task.tokenizer(source)["input_ids"] == row["input_ids"]
    assert task.tokenizer(target)["input_ids"][1:] == row["labels"]
    first = task.load([seen[0]])
    assert first.decoder_input_ids.tolist() == [task.tokenizer.cls_token_id, *row["labels"][:-1]]


def test_cut_texts_are_told(tmp_path, capsys):
    rows = [*pairs(20), (" ".join(WORDS), "cat"), ("dog", " ".join(WORDS * 2))]
    given = settings(tmp_path) | {"train": tsv(tmp_path / "long.tsv", rows), "max_length": 8}
    assert finetune(TranslateConfig(**given), dry_run=True) is None
    said = capsys.readouterr().err
    assert "train: 4.5% of the sources are cut at 8 tokens" in said
    assert "train: 4.5% of the targets are cut at 8 tokens" in said
    assert not (tmp_path / "out/model.safetensors").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    (cut, whole), flags = encode_sources(tokenizer, [" ".join(WORDS), "cat dog"], 8)
    expected = tokenizer(" ".join(WORDS), truncation=True, max_length=8)["input_ids"]
    assert cut["input_ids"] == expected and flags == [True, False]
    assert whole["input_ids"] == tokenizer("cat dog")["input_ids"]


def formats(folder):
    """The same pairs in every format: (file, columns)."""
    rows = pairs(7)
    tsv(folder / "plain.tsv", rows)
    (folder / "packed.tsv.gz").write_bytes(gzip.compress((folder / "plain.tsv").read_bytes()))
    named = [{"source": a, "target": b, "more": "x"} for a, b in rows]
    with open(folder / "t.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, named[0])
        writer.writeheader()
        writer.writerows(named)
    (folder / "headed.tsv").write_text("de\ten\n" + (folder / "plain.tsv").read_text())
    write_rows(folder / "t.jsonl", named)
    write_rows(folder / "nested.jsonl", [{"translation": {"en": a, "fr": b}} for a, b in rows])
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(named), folder / "t.parquet")
    columns = {"headed.tsv": ("de", "en"), "nested.jsonl": ("en", "fr")}
    names = "plain.tsv", "packed.tsv.gz", "t.csv", "headed.tsv", "t.jsonl", "nested.jsonl"
    return rows, [(folder / n, columns.get(n, (None, None))) for n in (*names, "t.parquet")]


def test_formats(tmp_path):
    rows, files = formats(tmp_path)
    for path, columns in files:
        found = data.load_translations(path, *columns)
        assert list(zip(found.sources, found.targets, strict=True)) == rows, path
        chunks = list(data.read_sources(path, columns[0], rows=3))
        assert [len(c) for c in chunks] == [3, 3, 1]
        assert [s for c in chunks for s in c.sources] == [a for a, _ in rows]
        assert chunks[2].place(0).startswith(f"{path}: row 7")


BAD = {
    "no_tab.tsv": (b"a\tb\nonly one\n", "line 2 has 0 tabs, expected one"),
    "two_tabs.tsv": (b"a\tb\tc\n", "line 1 has 2 tabs"),
    "empty_target.tsv": (b"a\tb\nc\t \n", r"row 2 \(line 2\): column 'target' is an empty text"),
    "empty_source.tsv": (b"\tb\n", "column 'source' is an empty text"),
    "latin.tsv": ("é\tb\n".encode("latin-1"), "not UTF-8: byte 0xe9 at line 1"),
    "nothing.tsv": (b"", "is empty; expected a text, a tab"),
    "blank.tsv": (b"\n\n", "is empty; expected a text, a tab"),
    "cut.tsv.gz": (gzip.compress(b"a\tb\n" * 99, mtime=0)[:-9], "damaged or truncated gzip"),
    "other.csv": (b"en,fr\na,b\n", "no column 'source'; it has: 'en', 'fr'; name those"),
    "null.jsonl": (b'{"source": "a", "target": null}\n', "column 'target' is missing"),
    "number.jsonl": (b'{"source": "a", "target": 3}\n', "is 3, a int; expected a string"),
    "nested.jsonl": (b'{"translation": {"en": "a"}}\n', "has 'en'; expected texts by the names"),
    "flat.jsonl": (b'{"translation": "a"}\n', "column 'translation' has 'a'; expected texts"),
    "pairs.xlsx": (b"a\tb\n", "unknown format"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_data(name, tmp_path):
    content, match = BAD[name]
    (tmp_path / name).write_bytes(content)
    refused(data.DataError, match, data.load_translations, tmp_path / name)


@pytest.mark.parametrize("options, match", [
    ({"size": "huge"}, "config is 'huge', expected tiny"),
    ({"num_beams": 0}, "num_beams is 0, expected 1 or more"),
    ({"eval_rows": 0}, "eval_rows is 0"),
    ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected from 0 to less than 1"),
    ({"head": "fresh"}, "head is 'fresh', expected auto"),
    ({"decoder_layers": 0}, "decoder_layers is 0, expected 1 or more"),
    ({"decoder_layers": 5}, "decoder_layers is 5, the checkpoint has 2"),
    ({"max_length": 33}, "max_length is 33, expected 3 to 32"),
    ({"metric": "accuracy"}, "expected one of bleu, chrf, loss"),
    ({"freeze_layers": 3}, "the model has 2 layers"),
], ids=str)  # fmt: skip
def test_bad_settings(options, match, tmp_path):
    given = settings(tmp_path)
    refused(ConfigError, match, lambda: finetune(TranslateConfig(**given | options), dry_run=True))


def test_bad_models(tmp_path):
    given = settings(tmp_path)
    other = tmp_path / "other"
    checkpoint(other, vocab_size=9)
    config = TranslateConfig(**given | {"model": str(other)})
    refused(bertfast.model.CheckpointError, "the tokenizer has 17 tokens", finetune, config)
    model = str(tmp_path / "model")
    for use in (translate.evaluate, translate.predict_table):
        match = "model_type is 'bert', expected 'encoder-decoder'"
        refused(bertfast.model.CheckpointError, match, use, model, given["valid"])


def test_a_model_that_does_not_say_how_targets_begin(run, tmp_path):
    """As some of transformers' own are saved."""
    folder, _ = run
    bertfast.BertEncoderDecoder.from_pretrained(folder / "out").save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder / "out").save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        values = read_json(tmp_path / name)
        values["decoder_start_token_id"] = None
        (tmp_path / name).write_text(json.dumps(values))
    match = "targets begin with None"
    path = str(folder / "test.tsv")
    refused(bertfast.model.CheckpointError, match, translate.evaluate, str(tmp_path), path)


def test_texts_of_word_pieces(tmp_path):
    """As they were written, as far as pieces tell."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "L", "l", "##e", "arbre", "2", "09"]
    vocabulary += ["x", "##y", "'", "\u2019", "-", ".", ",", "(", ")", ":", "?", "«", "»", "A", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=False)
    for text in ("Le l'arbre x.", "l\u2019arbre-xy, (le 2.09).", "xy : « le » ?", "2:09 x"):
        ids = tokenizer(text)["input_ids"]
        assert text_of(tokenizer, ids) == text
        # An id past the tokenizer's, of a table with more rows, is nothing, as transformers has it.
        assert text_of(tokenizer, [*ids, len(tokenizer) + 7]) == text
    assert not lowercases(tokenizer)
    assert lowercases(transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=True))
