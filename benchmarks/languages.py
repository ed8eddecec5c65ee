"""Fine-tuning in many languages, on the translated messages of this system's packages.

    python benchmarks/languages.py [--languages Chinese Russian French] [--rows 2400]
        [--test-rows 800] [--size tiny] [--locales /usr/share/locale]

For each language `prepare` trains a tokenizer on the training messages, and a BERT with random
weights and that tokenizer learns two tasks: which package a message is of (beside transformers'
Trainer with the same settings and weights), and where its options and placeholders stand, in
characters of the raw text; these tags are made by rules. For scripts whose vowels are marks,
held-out messages must come back from their tokens with every letter and mark.
"""

import argparse
import gettext
import json
import re
import tempfile
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import torch
import transformers
from finetune_sections import Settings, one_seed
from finetune_tokens import Settings as TokenSettings
from finetune_tokens import config_of
from harness import median, save
from sklearn.metrics import f1_score

import bertfast
from bertfast.data.clean import clean_text
from bertfast.data.config import PrepareConfig
from bertfast.data.prepare import prepare
from bertfast.model.presets import bert_config
from bertfast.train import finetune
from bertfast.train.tasks.tokens import evaluate, predict_table

LOCALES = Path("/usr/share/locale")
TASKS = {"Chinese": "zh_CN", "Russian": "ru", "French": "fr"}
SIGNS = {"Hindi": "hi", "Bengali": "bn", "Punjabi": "pa", "Tamil": "ta", "Telugu": "te"}
SIGNS |= {"Thai": "th"}
CLASSES = 8  # the packages with most messages
LONGEST = 300  # characters of a message; longer ones are whole help texts
VOCABULARY = 6000
PARTS = {0: "test", 1: "test", 2: "val"}  # of ten; the others are for training
UNKNOWN = 0.01  # of the tokens of held-out messages, at most

_HAN = "\u3400-\u9fff"
# Between words, where what stands beside may be a Chinese character but no other letter.
_APART, _ENDS = rf"(?<![^\W{_HAN}])", rf"(?![^\W{_HAN}])"
TAGS = re.compile(
    r"%%|(?P<PLACEHOLDER>%(?:\(\w+\)|\d+\$)?[-+#0']*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh?|ll?|[jqtz])?"
    r"(?:[cdeEfgGiorsuxX]|p[AB]?)|\{\w*\})"
    rf"|{_APART}(?<!-)(?P<OPTION>--?[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*)"
)
_WHOLE = re.compile(_ENDS)


def messages(folder: Path, language: str) -> tuple[list[dict], Counter]:
    """The translated messages, {"text", "label" (the package), "source" (the English)}, each text
    once, and how many were left out and why. Those that several packages have are of none."""
    found, owners, lost = {}, {}, Counter()
    for path in sorted((folder / language / "LC_MESSAGES").glob("*.mo")):
        if path.is_symlink() or path.name.startswith("iso_"):  # names of countries, languages
            continue
        with path.open("rb") as f:
            catalog = gettext.GNUTranslations(f)._catalog  # with all forms of plurals
        for key, text in catalog.items():
            source = (key[0] if isinstance(key, tuple) else key).split("\x04")[-1]
            same = clean_text(text).casefold()
            if not source:  # the header
                continue
            fault = (
                "untranslated" if same == clean_text(source).casefold()
                else "of fewer than 3 letters" if sum(map(str.isalpha, text)) < 3
                else "long" if len(text) > LONGEST
                else "repeated" if same in found
                else None
            )  # fmt: skip
            if fault != "untranslated":
                owners.setdefault(same, set()).add(path.stem)
            if fault:
                lost[fault] += 1
            else:
                found[same] = {"text": text, "label": path.stem, "source": source}
    rows = [row for same, row in found.items() if len(owners[same]) == 1]
    lost["of several packages"] = len(found) - len(rows)
    return rows, lost


def split(rows: list[dict]) -> dict[str, list[dict]]:
    """train, val and test, in an order at random. The forms of a plural, and what several packages
    translate of one English message, are in one part."""
    parts = {"train": [], "val": [], "test": []}
    for row in sorted(rows, key=lambda r: (zlib.crc32(r["text"].encode()), r["text"])):
        parts[PARTS.get(zlib.crc32(row["source"].encode()) % 10, "train")].append(row)
    return parts


def largest(parts: dict, limits: dict) -> dict[str, list[dict]]:
    """The first rows of each part that are of the largest packages."""
    counts = Counter(row["label"] for part in parts.values() for row in part)
    names = {name for name, _ in counts.most_common(CLASSES)}
    return {p: [r for r in rows if r["label"] in names][: limits[p]] for p, rows in parts.items()}


def spans(text: str) -> list[dict] | None:
    """Options and placeholders; None where a letter follows one at once, so that it is no
    word of its own."""
    found = []
    for m in TAGS.finditer(text):
        if m.lastgroup:
            if text[m.end() - 1].isalnum() and not _WHOLE.match(text, m.end()):
                return None
            found.append({"start": m.start(), "end": m.end(), "label": m.lastgroup})
    return found


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer_of(texts: list[str], out: Path, lowercase: bool = True) -> Path:
    """The folder of the tokenizer that `prepare` trains on texts."""
    out.mkdir()
    corpus = write(out / "corpus.jsonl", [{"text": text} for text in texts])
    config = PrepareConfig(
        [str(corpus)], str(out / "prepared"), valid_fraction=0, vocab_size=VOCABULARY,
        lowercase=lowercase, min_words=1, similarity=0, boilerplate=0, processes=1,
    )  # fmt: skip
    prepare(config, say=lambda line: None)
    return out / "prepared" / "tokenizer"


def checkpoint(tokenizer: Path, size: str, out: Path, seed: int = 0) -> str:
    """A BERT of random weights with the tokenizer."""
    made = transformers.AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(seed)
    # So small a model, trained on so little from nothing, learns slowly from less and with dropout.
    sizes = {"initializer_range": 0.1, "vocab_size": len(made)}
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    bertfast.BertModel(bert_config(size, **sizes, **rates)).save_pretrained(out)
    made.save_pretrained(out)
    return str(out)


def letters(text: str) -> str:
    """Without case, spaces and signs, each letter and mark by itself."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFC", text).lower())
    return "".join(c for c in text if unicodedata.category(c)[0] in "LM")


def round_trip(tokenizer: Path, texts: list[str]) -> dict:
    """Of held-out texts the share of [UNK], and how many come back with all letters and marks."""
    made = transformers.AutoTokenizer.from_pretrained(tokenizer, model_max_length=10**6)
    ids = made(texts, add_special_tokens=False)["input_ids"]
    pairs = list(zip(texts, ids, strict=True))
    known = [pair for pair in pairs if made.unk_token_id not in pair[1]]
    tokens = sum(map(len, ids))
    unknown = sum(row.count(made.unk_token_id) for row in ids)
    kept = sum(letters(made.decode(row)) == letters(text) for text, row in known)
    marks = sum(unicodedata.category(c)[0] == "M" for text in texts for c in letters(text))
    return {
        "messages": len(texts), "marks": marks, "tokens": tokens, "unknown": unknown / tokens,
        "without_unknown": len(known), "kept": kept,
    }  # fmt: skip


def classification(model, parts, s: Settings, work: Path) -> dict:
    """Test macro F1 and seconds of both sides, beside always the largest class."""
    files = {p: write(work / f"{p}.jsonl", parts[p]) for p in ("train", "val")}
    found = one_seed(0, model, parts, files, s, work)
    truth = [row["label"] for row in parts["test"]]
    top = Counter(row["label"] for row in parts["train"]).most_common(1)[0][0]
    always = f1_score(truth, [top] * len(truth), average="macro", zero_division=0)
    seconds = [found[n]["training_seconds"] for n in ("transformers", "bertfast")]
    return {
        "classes": sorted({row["label"] for row in parts["train"]}),
        "rows": {p: len(rows) for p, rows in parts.items()},
        "largest_class": {"macro_f1": float(always), "accuracy": truth.count(top) / len(truth)},
        **{name: found[name] for name in ("bertfast", "transformers")},
        "ratio": round(seconds[0] / seconds[1], 3),
    }


def tagging(model, parts, s: TokenSettings, work: Path) -> dict:
    """Test F1 of entities by evaluate, which the characters of those predicted must give too."""
    rows = {p: [{"text": r["text"], "spans": spans(r["text"])} for r in parts[p]] for p in parts}
    unfit = sum(row["spans"] is None for part in rows.values() for row in part)
    rows = {p: [row for row in part if row["spans"] is not None] for p, part in rows.items()}
    files = {p: write(work / f"tagged-{p}.jsonl", part) for p, part in rows.items()}
    out = work / "tagged"
    finetune(config_of(model, files, s, 0, out))
    test, said = str(files["test"]), []
    scores = evaluate(str(out), test, device="cpu")
    for row, told in zip(rows["test"], predict_table(str(out), test, device="cpu"), strict=True):
        for e in told["entities"]:
            if e["text"] != row["text"][e["start"] : e["end"]]:
                raise SystemExit(f"{e} is not in {row['text']!r}")
        said.append({(e["start"], e["end"], e["label"]) for e in told["entities"]})
    true = [{(e["start"], e["end"], e["label"]) for e in row["spans"]} for row in rows["test"]]
    right = sum(len(a & b) for a, b in zip(true, said, strict=True))
    f1 = 2 * right / max(1, sum(map(len, true)) + sum(map(len, said)))
    if abs(f1 - scores["micro_f1"]) > 1e-9:
        raise SystemExit(f"F1 of characters is {f1}, evaluate's of words {scores['micro_f1']}")
    texts = [row["text"] for row in rows["test"]]
    cut = [t[a:b] for t, o in zip(texts, said, strict=True) for a, b, k in o if k == "PLACEHOLDER"]
    exact = sum(bool(m := TAGS.fullmatch(c)) and m.lastgroup == "PLACEHOLDER" for c in cut)
    return {
        "rows": {p: len(part) for p, part in rows.items()}, "unfit": unfit, "micro_f1": f1,
        "per_type": scores["per_type"], "placeholders": {"found": len(cut), "exact": exact},
    }  # fmt: skip


def language(name: str, args, work: Path) -> dict:
    """Everything of one of TASKS."""
    rows, lost = messages(args.locales, TASKS[name])
    parts = split(rows)
    limits = {"train": args.rows, "val": args.test_rows // 2, "test": args.test_rows}
    chosen = largest(parts, limits)
    texts = {p: [row["text"] for row in part] for p, part in parts.items()}
    folders = {low: tokenizer_of(texts["train"], work / f"{low}", low) for low in (True, False)}
    trips = {f"lowercase={low}": round_trip(f, texts["test"]) for low, f in folders.items()}
    model = checkpoint(folders[True], args.size, work / "model")
    short = {"max_length": 64, "epochs": args.epochs}
    found = {"messages": len(rows), "left_out": dict(lost), "tokenizer": trips}
    found["classify"] = classification(model, chosen, Settings(**short, lr=args.lr), work)
    found["tokens"] = tagging(model, chosen, TokenSettings(**short, lr=args.lr), work)
    print(f"{name}: {json.dumps(found)}", flush=True)
    return found


def marks(name: str, args, work: Path) -> dict:
    """Whether the tokenizer of one of SIGNS keeps every letter and mark; stops where not."""
    rows, _ = messages(args.locales, SIGNS[name])
    parts = {p: [row["text"] for row in part] for p, part in split(rows).items()}
    found = {}
    for low in (True, False):
        trip = round_trip(tokenizer_of(parts["train"], work / f"{low}", low), parts["test"])
        found[f"lowercase={low}"] = trip
        print(f"{name}, lowercase={low}: {trip}", flush=True)
        if trip["kept"] < trip["without_unknown"] or not trip["unknown"] < UNKNOWN:
            raise SystemExit(f"{name}: letters or marks are lost, or unknown: {trip}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--locales", type=Path, default=LOCALES, help="folder of gettext catalogs")
    parser.add_argument("--languages", nargs="+", default=[*TASKS], choices=TASKS)
    parser.add_argument("--rows", type=int, default=2400, help="training messages, at most")
    parser.add_argument("--test-rows", type=int, default=800, help="test messages, at most")
    parser.add_argument("--size", default="tiny", help="of the BERT: tiny, mini, ...")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found, signs = {}, {}
    for names, one, results in ((SIGNS, marks, signs), (args.languages, language, found)):
        for name in names:
            with tempfile.TemporaryDirectory() as work:
                results[name] = one(name, args, Path(work))
    side = lambda n: {k: r["classify"][n]["macro_f1"] for k, r in found.items()}
    ours, theirs = side("bertfast"), side("transformers")
    of = f"{args.size} of random weights, {args.rows:,} messages at most, {args.epochs} epochs"
    summary = [
        {
            "task": f"test macro F1 of {CLASSES} packages' messages in {name}, {of}", "unit": "",
            "bertfast": ours[name], "rival": theirs[name],
            "rival_name": "transformers Trainer", "ratio": None,
        }
        for name in found
    ]  # fmt: skip
    ratio = median([r["classify"]["ratio"] for r in found.values()])
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "locales")}
    result = {"settings": settings, "source": "gettext catalogs of the installed packages"}
    result |= {"languages": found, "marks": signs, "ratio": ratio, "summary": summary}
    save("languages", result, args.out)


if __name__ == "__main__":
    main()
