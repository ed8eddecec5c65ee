# ruff: noqa: RUF001
"""bertfast prepare: cleaning, sentences, duplicates, tokenizer, shards, restart."""

import json
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from helpers import refused
from transformers import AutoTokenizer

from bertfast.cli import main
from bertfast.data import DataError, dedup
from bertfast.data import prepare as module
from bertfast.data.errors import ConfigError
from bertfast.data.prepare import PrepareConfig, prepare
from bertfast.data.shards import Shards, read_index, token_dtype

WORDS = [
    a + b for a in ("ba", "de", "fi", "go", "lu", "mé") for b in ("na", "ros", "tik", "Wem", "x")
]


def texts(n, seed=0):
    r = random.Random(seed)
    sentence = lambda: " ".join(r.choice(WORDS) for _ in range(r.randint(6, 12))).capitalize() + "."
    return [" ".join(sentence() for _ in range(r.randint(1, 4))) for _ in range(n)]


def write(path, documents):
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return str(path)


def options(tmp_path, **changes):
    base = {"corpus": [str(tmp_path / "c.txt")], "out": str(tmp_path / "out"), "vocab_size": 200}
    return PrepareConfig(
        **(base | {"processes": 1, "shard_mb": 0.01, "valid_fraction": 0.1} | changes)
    )


def quiet(config):
    return prepare(config, lambda text: None)


def decoded(out, part):
    """The documents of a part as lists of sentences."""
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    shards = Shards(out, part)
    found = []
    for i in range(len(shards)):
        tokens, sentences, documents = shards.load(i)
        for a, b in pairwise(documents):
            pieces = [tokens[sentences[j] : sentences[j + 1]] for j in range(a, b)]
            found.append([tokenizer.decode(p) for p in pieces])
    return found


def files(out):
    return {p.name: p.read_bytes() for p in out.glob("*.npy")}


def test_similarity_estimates_jaccard():
    r = random.Random(0)
    words = [f"w{i}" for i in range(5000)]
    a = [r.choice(words) for _ in range(400)]
    changed = [w if r.random() > 0.03 else r.choice(words) for w in a]
    other = [r.choice(words) for _ in range(400)]
    shingles = lambda d: {tuple(d[i : i + 5]) for i in range(len(d) - 4)}
    table = sorted(set(words))
    hashes = dict(zip(table, dedup.word_hashes(table), strict=True))
    flat = np.array([hashes[w] for d in (a, changed, other, a[:3], a[:3]) for w in d])
    offsets = np.cumsum([0, 400, 400, 400, 3, 3])
    signature = dedup.signatures(flat, offsets)
    estimate = lambda i, j: float((signature[i] == signature[j]).mean())
    truth = len(shingles(a) & shingles(changed)) / len(shingles(a) | shingles(changed))
    assert 0.6 < truth < 0.95 and abs(estimate(0, 1) - truth) < 0.15
    assert estimate(0, 2) < 0.05 and estimate(3, 4) == 1
    exact = dedup.sequence_hashes(flat, offsets)
    assert exact[3] == exact[4] and len(set(exact.tolist())) == 4
    swapped = flat[:400].copy()
    swapped[[3, 7]] = swapped[[7, 3]]
    assert dedup.sequence_hashes(swapped, np.array([0, 400]))[0] != exact[0]


def test_repeats_in_parts(monkeypatch):
    """The same answer when memory admits only a few hashes at a time."""
    r = np.random.default_rng(0)
    parts = [r.integers(0, 50, n).astype(np.uint64) for n in (30, 0, 45)]
    everything = np.concatenate(parts)
    loads = [lambda p=p: p for p in parts]
    expected = {i for i, h in enumerate(everything) if h in everything[:i]}
    for limit in (10**6, 20):
        monkeypatch.setattr(dedup, "_IN_MEMORY", limit)
        found = [p for _, later in dedup.repeats(loads) for p in later.tolist()]
        assert sorted(found) == sorted(expected)
        firsts = [p for pair in dedup.repeats(loads) for p in zip(*map(list, pair), strict=True)]
        assert all(everything[a] == everything[b] and a < b for a, b in firsts)
        common = dedup.frequent(loads, 2)
        assert common.tolist() == [h for h in range(50) if (everything == h).sum() > 2]


def test_prepare(tmp_path):
    documents = texts(300)
    longest = max(documents, key=len)
    near = longest.rsplit(" ", 1)[0] + " changed."
    boiler = "This sentence stands everywhere."
    listed = [f"{d} {boiler}" for d in documents] + [
        documents[7] + " " + boiler,
        near + " " + boiler,
    ]
    write(tmp_path / "c.txt", listed)
    statistics = quiet(options(tmp_path, similarity=0.6))
    assert statistics["documents"] == 302 and statistics["documents_equal"] == 1
    assert statistics["documents_similar"] == 1
    assert statistics["sentences_boilerplate"] >= 300
    train, valid = (decoded(tmp_path / "out", p) for p in ("train", "valid"))
    assert 10 < len(valid) < 60
    assert len(train) + len(valid) == 300
    flat = [" ".join(d) for d in train + valid]
    assert "everywhere" not in " ".join(flat) and len(set(flat)) == len(flat)
    assert not set(map(tuple, train)) & set(map(tuple, valid))
    plain = lambda s: s.lower().replace("é", "e").replace(" ", "")
    assert {plain(f) for f in flat} == {plain(d) for d in documents}
    assert not (tmp_path / "out" / "work").exists()
    assert statistics["unknown_share"] == 0


def test_half_alike_and_seldom_repeated_stays(tmp_path):
    """What --similarity and --boilerplate ask for, no more."""
    r, documents = random.Random(0), []
    for _ in range(20):
        words = ["".join(r.choices("abcdefghij", k=6)) for _ in range(120)]
        documents += [" ".join(words), " ".join([*words[:95], *reversed(words[95:])])]
    seldom = " This stands in fifteen of them."
    write(tmp_path / "c.txt", [d + "." + seldom * (i < 15) for i, d in enumerate(documents)])
    found = quiet(options(tmp_path, boilerplate=0.01, min_words=1))
    assert found["documents_similar"] == found["sentences_boilerplate"] == 0
    assert found["train"]["documents"] + found["valid"]["documents"] == 40
    found = quiet(options(tmp_path, out=str(tmp_path / "b"), similarity=0.3, boilerplate=0))
    assert found["documents_similar"] > 12


def test_tokens_are_the_tokenizers(tmp_path):
    """Word by word through a table: the same ids as the tokenizer gives whole documents."""
    strange = [
        "Ünïcode ＡＢＣ, don't [MASK] foo-bar_baz (x86)! a+b=c;'q' [SEP]. <p>~`^| 日本語 text… naïve"
        + c
        for c in "abc"
    ]
    documents = [d + " " + s for d, s in zip(texts(60), strange * 20, strict=True)]
    write(tmp_path / "c.txt", documents)
    quiet(options(tmp_path, boilerplate=0, similarity=0, valid_fraction=0))
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    assert (tokenizer.cls_token, tokenizer.mask_token, tokenizer.vocab_size) == (
        "[CLS]",
        "[MASK]",
        read_index(out)["vocab_size"],
    )
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    shards, found = Shards(out, "train"), []
    for i in range(len(shards)):
        tokens, sentences, docs = shards.load(i)
        found += [tokens[sentences[a] : sentences[b]].tolist() for a, b in pairwise(docs)]
    assert found == [backend.encode(d, add_special_tokens=False).ids for d in documents]


def test_processes_and_restart_change_nothing(tmp_path, monkeypatch):
    write(tmp_path / "c.txt", texts(200))
    quiet(options(tmp_path))
    expected = files(tmp_path / "out")
    quiet(options(tmp_path, out=str(tmp_path / "two"), processes=2))
    assert files(tmp_path / "two") == expected
    for stage in ("_clean", "_find_duplicates", "_make_tokenizer", "_shard", "statistics"):
        out, calls = tmp_path / stage, [0]
        real = getattr(module, stage)

        def failing(*arguments, real=real, calls=calls):
            calls[0] += 1
            if calls[0] == (3 if real.__name__ in ("_clean", "_shard") else 1):
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as m:
            m.setattr(module, stage, failing)
            with pytest.raises(KeyboardInterrupt):
                quiet(options(tmp_path, out=str(out)))
        done = {p: p.stat().st_mtime_ns for p in out.rglob("clean-*.npz")}
        if stage == "_shard":
            assert done
            with monkeypatch.context() as m:
                m.setattr(module, "_clean", None)  # must not be needed again
                quiet(options(tmp_path, out=str(out)))
        else:
            quiet(options(tmp_path, out=str(out)))
        assert files(out) == expected
    refused(DataError, "other settings", quiet, options(tmp_path, min_words=7))


def test_existing_tokenizer_and_validation_files(tmp_path):
    documents = texts(60)
    write(tmp_path / "c.txt", documents)
    write(tmp_path / "v.txt", texts(10, 9) + documents[:3])
    quiet(options(tmp_path, valid_fraction=0))
    again = options(
        tmp_path, out=str(tmp_path / "b"), valid_corpus=[str(tmp_path / "v.txt")],
        tokenizer=str(tmp_path / "out" / "tokenizer"),
    )  # fmt: skip
    statistics = quiet(again)
    # What both hold stays in validation alone.
    assert statistics["valid"]["documents"] == 13 and statistics["train"]["documents"] == 57
    from transformers import RobertaTokenizer

    folder = tmp_path / "roberta"
    RobertaTokenizer(
        vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5}, merges=[]
    ).save_pretrained(folder)
    refused(
        DataError,
        "no WordPiece",
        quiet,
        options(tmp_path, out=str(tmp_path / "c"), tokenizer=str(folder)),
    )


def test_vocabulary_is_of_the_training_part(tmp_path):
    write(tmp_path / "c.txt", texts(60))
    write(tmp_path / "v.txt", [f"quizzy {t}" for t in texts(60, 1)])
    quiet(options(tmp_path, valid_corpus=[str(tmp_path / "v.txt")]))
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").get_vocab()
    assert "ba" in vocabulary and not any("q" in token for token in vocabulary)


def test_tokens_fit_into_their_dtype():
    assert token_dtype(2**16) == np.uint16 and token_dtype(2**16 + 1) == np.uint32


def test_flipped_bit(tmp_path):
    write(tmp_path / "c.txt", texts(60))
    quiet(options(tmp_path))
    path = next((tmp_path / "out").glob("train-*.tokens.npy"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    shards = Shards(tmp_path / "out", "train")
    with pytest.raises(DataError, match="does not match its checksum"):
        for i in range(len(shards)):
            shards.load(i)


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    """Twenty times the text: the peak of a process grows by less than half of what was added."""
    code = """
import re, sys
from bertfast.data import dedup
dedup._IN_MEMORY = 20_000  # so that this corpus, too, is more than it holds
from bertfast.data.prepare import PrepareConfig, prepare
prepare(PrepareConfig(corpus=[sys.argv[1]], out=sys.argv[2], vocab_size=200, processes=1, shard_mb=0.5), print)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    peaks = []
    for n in (5_000, 100_000):
        path = write(tmp_path / f"{n}.txt", texts(n))
        run = subprocess.run(
            [sys.executable, "-c", code, path, str(tmp_path / f"o{n}")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(run.stdout.split()[-1]) * 1024)
    extra = (tmp_path / "100000.txt").stat().st_size - (tmp_path / "5000.txt").stat().st_size
    assert extra > 11_000_000
    assert peaks[1] - peaks[0] < 0.5 * extra, peaks


def heard(config):
    """What `prepare` says beside its stages, and its statistics."""
    said = []
    statistics = prepare(config, said.append)
    return "\n".join(s for s in said if s.startswith("warning")), statistics


def test_another_encoding(tmp_path):
    """Letters that are lost are counted out loud, with the file and the way out."""
    documents = ["Déjà vu à la fenêtre de l'été"] * 2 + texts(40)
    (tmp_path / "c.txt").write_bytes("\n\n".join(documents).encode("cp1252"))
    said, statistics = heard(options(tmp_path, min_words=1, similarity=0))
    n = sum("é" in d.lower() or "à" in d for d in documents)
    lost = sum(not c.isascii() for d in documents for c in d)
    assert f"{n} of 42 documents are not utf-8: {lost} characters" in said and "--encoding" in said
    assert f"({tmp_path / 'c.txt'})" in said and statistics["undecoded"] == {
        str(tmp_path / "c.txt"): n
    }
    assert heard(options(tmp_path, min_words=1, similarity=0))[0] == said  # when asked again, too
    (tmp_path / "c.jsonl").write_bytes(
        "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents).encode(
            "cp1252"
        )
    )
    right = {"encoding": "cp1252", "lowercase": False, "similarity": 0, "boilerplate": 0}
    jsonl = [str(tmp_path / "c.jsonl")]
    wrong = options(tmp_path, corpus=jsonl, out=str(tmp_path / "x"))
    refused(DataError, "c.jsonl: .* is not utf-8 .*--encoding", quiet, wrong)
    for name in ("c.txt", "c.jsonl"):
        out = tmp_path / name[2:]
        said, _ = heard(options(tmp_path, corpus=[str(tmp_path / name)], out=str(out), **right))
        assert "not cp1252" not in said
        found = decoded(out, "train") + decoded(out, "valid")
        assert "Déjà vu à la fenêtre" in " ".join(s for d in found for s in d)
    for wrong in ("utf-16", "none such", "rot13"):
        refused(
            ConfigError, f"encoding is '{wrong}', expected one", options, tmp_path, encoding=wrong
        )


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999])
def test_both_parts_have_a_document(tmp_path, fraction):
    write(tmp_path / "c.txt", texts(5))
    said, found = heard(options(tmp_path, valid_fraction=fraction, similarity=0))
    counts = [found[part]["documents"] for part in ("train", "valid")]
    assert min(counts) >= 1 and sum(counts) == 5 and "validation" not in said
    assert fraction == 0.5 or min(counts) == 1


def test_what_a_corpus_lacks_is_said(tmp_path):
    sentences = [s + "." for d in texts(60) for s in d.split(". ")]
    write(tmp_path / "c.txt", ["\n".join(sentences)])
    said, _ = heard(options(tmp_path))
    assert "no validation part: the corpus is one document" in said
    assert "is one document" in said and "--no-nsp" in said
    assert heard(options(tmp_path, out=str(tmp_path / "n"), valid_fraction=0))[0].count("\n") == 0
    write(tmp_path / "c.txt", sentences)
    said, _ = heard(options(tmp_path, out=str(tmp_path / "b"), boilerplate=0))
    assert "one sentence in each document" in said and "validation" not in said
    write(
        tmp_path / "c.txt",
        texts(20) + ["Привет, мир: тут есть слова."] * 2 + ["one two", "12 3 45"] * 9,
    )
    tokenizer = str(tmp_path / "out" / "tokenizer")
    said, _ = heard(options(tmp_path, out=str(tmp_path / "c"), tokenizer=tokenizer))
    assert "of the training tokens are [UNK]; " in said and "leave --tokenizer out" in said
    assert "18 of 40 documents are left out: they have fewer than --min-words 5" in said
    assert "sentences are left out: they hold fewer letters" in said
    write(tmp_path / "c.txt", ["one two"] * 3 + ["12 34"])
    message = "of 4 documents none has --min-words 5 words, and 1 of 4 sentences"
    refused(DataError, message, quiet, options(tmp_path, out=str(tmp_path / "d")))


def test_command_line(tmp_path, capsys):
    write(tmp_path / "c.txt", texts(80))
    rows = [json.dumps({"body": t}) for t in texts(20, 3)]
    (tmp_path / "c.jsonl").write_text("\n".join(rows) + "\n")
    arguments = ["prepare", "--corpus", str(tmp_path / "c.txt"), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--vocab-size", "150", "--processes", "1"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["documents"] == 80 and "clean" in captured.err
    jsonl = [
        "prepare",
        "--corpus",
        str(tmp_path / "c.jsonl"),
        "--out",
        str(tmp_path / "j"),
        "--vocab-size",
        "150",
    ]
    assert main([*jsonl, "--processes", "1", "--text-column", "body"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 20
    assert main([*jsonl[:-3], str(tmp_path / "k"), "--processes", "1"]) == 1
    assert "text" in capsys.readouterr().err
    assert (
        main(["prepare", "--corpus", str(tmp_path / "none.txt"), "--out", str(tmp_path / "n")]) == 1
    )
    assert "none.txt" in capsys.readouterr().err
