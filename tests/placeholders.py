"""What the pages' placeholders stand for: MODEL, train.jsonl, run and the others, each made small
when a command first names it. A page that writes one of them itself gets its own."""

import csv
import gzip
import json
import random
from pathlib import Path

import tiny
import tiny_families
import tiny_pretrain
import tiny_qa
from foreign import built, google_folder, tensors, training

from bertfast.cli import main

PEOPLE = [("she", "f"), ("he", "m"), ("mother", "f"), ("father", "m")]
PLACES = ["France", "China", "Germany", "Japan"]


def checkpoint(path: Path, head="Model"):
    words = [*tiny.WORDS, *tiny_qa.WORDS, *(p for p, _ in PEOPLE), *map(str.lower, PLACES)]
    return tiny_families.checkpoint(path, "Bert", head, words, max_position_embeddings=512)


def texts(n=64, seed=0) -> list[dict]:
    """Texts about people and places whose label is the colour in them."""
    r, rows = random.Random(seed), []
    for i in range(n):
        person, sex = PEOPLE[i % 4]
        words = [r.choice(tiny.WORDS[3:]) for _ in range(r.randint(2, 9))]
        for word in (person, r.choice(PLACES), ("red", "blue")[i // 2 % 2]):
            words.insert(r.randrange(len(words) + 1), word)
        label = ("yes", "no")[i // 2 % 2]
        rows.append({"id": f"r{seed}-{i}", "text": " ".join(words), "label": label, "sex": sex})
    return rows


def table(path: Path, rows: list[dict]):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="") as f:
        if ".jsonl" in path.suffixes:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def classified(seed):
    return lambda path: table(path, texts(seed=seed))


def tagged(seed):
    """Names are people."""

    def write(path):
        names, lines = ("Ada", "Bob", "Eve"), []
        for row in tiny_qa.rows(40, seed):
            lines += [f"{w} {'B-PER' if w in names else 'O'}" for w in row["context"].split()] + [
                ""
            ]
        path.write_text("\n".join(lines))

    return write


def squad(seed):
    return lambda path: path.write_text(json.dumps(tiny_qa.squad(tiny_qa.rows(48, seed))))


def questions(path):
    table(path, [{k: row[k] for k in ("question", "context")} for row in tiny_qa.rows(6, 5)])


def similar(path):
    pairs = zip(texts(), texts(seed=1), strict=True)
    rows = [{"text": a["text"], "text_pair": b["text"], "label": i % 5} for i, (a, b) in
            enumerate(pairs)]  # fmt: skip
    table(path, rows)


def candidates(path):
    """For each query the text that is about the same, and two others."""
    r, rows = random.Random(0), []
    for row in texts(32):
        query, *others = (" ".join(r.choices(tiny.WORDS, k=4)) for _ in range(3))
        rows.append({"query": query, "positive": [f"{query} {row['text']}"], "negative": others})
    table(path, rows)


def translated(seed):
    def write(path):
        words = [row["text"].split() for row in texts(48, seed)]
        path.write_text("".join(f"{' '.join(w)}\t{' '.join(w[::-1])}\n" for w in words))

    return write


def corpus(path):
    """Documents of several sentences, of words of two syllables."""
    r, text = random.Random(0), []
    syllables = ["ka", "mo", "si", "tu", "re", "ni", "fo", "la"]
    for _ in range(120):
        topic = [r.choice(syllables) + r.choice(syllables) for _ in range(8)]
        made = [" ".join(r.choices(topic, k=r.randint(5, 9))) for _ in range(4)]
        text.append(" ".join(s.capitalize() + "." for s in made))
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as f:
        f.write("\n\n".join(text) + "\n")


def stereotypes(path):
    header = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    pairs = [(f"she {t}", f"he {t}") for t in (row["text"] for row in texts(24, 3))]
    table(path, [dict(zip(header, (*pair, "stereo", "gender"), strict=True)) for pair in pairs])


def google(path):
    path.mkdir()
    google_folder(path, training(tensors(built("ForPreTraining"), flax=False)))


def command(line: str):
    """What a command leaves: {} is the placeholder's own path, @ stands before others."""

    def make(path):
        words = [str(path.parent / w[1:]) if w[0] == "@" else w for w in line.split()]
        for word in line.split():
            if word[0] == "@":
                given(path.parent, word[1:])
        assert main([word.replace("{}", str(path)) for word in words]) == 0, line

    return make


FINETUNE = " --model @MODEL --out {} --epochs 1 --max-length 24"
MAKERS = {
    "MODEL": checkpoint,
    "bert": lambda path: checkpoint(path, "ForMaskedLM"),
    "bert_model_folder": google,
    "config.json": lambda path: path.write_text(
        json.dumps(tiny_pretrain.SIZES | {"max_position_embeddings": 128})
    ),
    "corpus.txt.gz": corpus,
    "corpus": lambda path: corpus(path / "a.txt.gz"),
    "crows_pairs_anonymized.csv": stereotypes,
    "candidates.jsonl": candidates,
    "ranking.jsonl": candidates,
    "mine.txt": lambda path: path.write_text("female | male\nshe | he\nmother, mum | father\n"),
    "new.txt": lambda path: path.write_text("".join(f"{row['text']}\n" for row in texts(4, 7))),
    "questions.jsonl": questions,
    "sts.csv": similar,
    "run": command("finetune classify --train @train.jsonl" + FINETUNE),
    "ner": command("finetune tokens --train @train.conll" + FINETUNE),
    "data": command("prepare --corpus @corpus.txt.gz --out {} --vocab-size 200 --similarity 0"),
    "small": command("quantize --model @MODEL --precision int8 --out {}"),
}
MAKERS |= {f"{name}.conll": tagged(i) for i, name in enumerate(("train", "valid", "test"))}
MAKERS |= {f"{name}.json": squad(i) for i, name in enumerate(("train", "dev"))}
names = "train.jsonl valid.jsonl test.jsonl texts.jsonl texts.jsonl.gz private.jsonl public.jsonl"
MAKERS |= {name: classified(i) for i, name in enumerate(f"{names} new.csv docs.csv".split())}
names = "en-fr.tsv en-fr.train.tsv en-fr.val.tsv en-fr.test.tsv"
MAKERS |= {name: translated(i) for i, name in enumerate(names.split())}


def given(folder: Path, *words: str):
    """Makes those words that are placeholders without a file in the folder."""
    for word in words:
        name = word.split("/")[0]
        if name in MAKERS and not (folder / name).exists():
            MAKERS[name](folder / name)
