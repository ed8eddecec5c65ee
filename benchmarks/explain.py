"""Occlusion by words beside captum's FeatureAblation on transformers' model, the same ablations.

    python benchmarks/explain.py [--texts 24] [--rounds 3] [--tiny]

MiniLM with a head for 8 classes, of random weights, on the Debian descriptions where they are and
on the standard library's docstrings where not. captum ablates a text's words one a call, as by its
default, and 32 a call; every difference of the target's probability must be ours within 1e-5 in
this very run. They take turns.
"""

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from harness import ROOT, median, minilm, real_text, save

from bertfast.data import Examples
from bertfast.explain import Settings
from bertfast.explain.explainer import Explainer
from bertfast.explain.words import read

TOLERANCE, LENGTH = 1e-5, 128
TITLES = {1: "captum, a word a call", 32: "captum, 32 words a call"}


def texts(count: int, data: Path) -> list[str]:
    """Spread over the descriptions, or runs of the docstrings' words."""
    if data.exists():
        with gzip.open(data, "rt", encoding="utf-8") as f:
            rows = [json.loads(line)["text"] for line in f]
        return rows[:: max(1, len(rows) // count)][:count]
    words = real_text().split()
    return [" ".join(words[60 * i : 60 * i + 20 + 7 * i % 60]) for i in range(count)]


def classifier(folder: Path) -> str:
    """MiniLM with a new head that has opinions; in `folder`, as transformers saves it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=8)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
    return str(folder)


class Captum:
    """FeatureAblation of a text's words by transformers' model, several a call."""

    def __init__(self, folder: str, together: int):
        from captum.attr import FeatureAblation

        load = transformers.AutoModelForSequenceClassification.from_pretrained
        model = load(folder, attn_implementation="sdpa").eval()
        forward = lambda ids: model(ids, torch.ones_like(ids)).logits.softmax(1)
        self.method, self.together = FeatureAblation(forward), together

    def scores(self, text, target: int, mask: int) -> np.ndarray:
        """[words]"""
        count = len(text.spans)
        groups = torch.from_numpy(np.where(text.word < 0, count, text.word))[None]
        groups = torch.unique(groups, return_inverse=True)[1]  # without gaps, as captum wants them
        with torch.no_grad():
            found = self.method.attribute(
                torch.tensor([text.row["input_ids"]]),
                mask,
                target,
                feature_mask=groups,
                perturbations_per_eval=self.together,
            )[0].double()
        return text.total(found.numpy()) / text.total(np.ones(len(text.word)))


def ours(given: Explainer, examples) -> tuple[list[np.ndarray], list[int]]:
    results = given.explained(examples, LENGTH)
    scores = [[w["scores"]["occlusion"] for w in r["words"]] for r in results]
    targets = [given.labels.names.index(r["target"]) for r in results]
    return [np.array(s, np.float64) for s in scores], targets


def measure(folder: Path, args) -> dict:
    model = classifier(folder)
    given = Explainer(model, Settings(methods=("occlusion",)), device="cpu")
    examples = Examples(texts(args.texts, args.data))
    read_texts = read(given.tokenizer, examples.texts, None, LENGTH)
    rivals = {n: Captum(model, n) for n in TITLES}
    expected, targets = ours(given, examples)
    seconds, apart = {name: [] for name in ("bertfast", *TITLES.values())}, 0.0
    for _ in range(args.rounds):
        begin = time.perf_counter()
        ours(given, examples)
        seconds["bertfast"].append(time.perf_counter() - begin)
        for n, rival in rivals.items():
            begin = time.perf_counter()
            found = [
                rival.scores(text, target, given.tokenizer.mask_token_id)
                for text, target in zip(read_texts, targets, strict=True)
            ]
            seconds[TITLES[n]].append(time.perf_counter() - begin)
            for a, b in zip(found, expected, strict=True):
                assert np.array_equal(np.isnan(a), np.isnan(b)), "words that are read differ"
                apart = max(apart, float(np.nanmax(abs(a - b))))
    if not apart <= TOLERANCE:
        raise SystemExit(f"scores are {apart:.1e} from captum's, more than {TOLERANCE}")
    words = sum(int(text.read().sum()) for text in read_texts)
    largest = max(float(np.nanmax(abs(s))) for s in expected)
    print(f"{words} words of {len(examples)} texts, scores at most {apart:.1e} apart", flush=True)
    return {
        "texts": len(examples),
        "words": words,
        "tokens": sum(len(text.word) for text in read_texts),
        "largest_score": largest,
        "largest_difference": apart,
        "seconds": {name: round(median(values), 3) for name, values in seconds.items()},
    }


def summary(found: dict) -> list[dict]:
    own, words = found["seconds"]["bertfast"], found["words"]
    return [
        {
            "task": f"occlusion of {words} words of {found['texts']} texts, MiniLM, fp32",
            "unit": "ms a word",
            "bertfast": round(1e3 * own / words, 3),
            "rival": round(1e3 * found["seconds"][title] / words, 3),
            "rival_name": f"{title}, on transformers with SDPA",
            "ratio": round(found["seconds"][title] / own, 2),
        }
        for title in TITLES.values()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    data = ROOT.parent / "shared" / "data" / "debian" / "sections.test.jsonl.gz"
    parser.add_argument("--data", type=Path, default=data, help="texts, a JSON line each")
    parser.add_argument("--tiny", action="store_true", help="3 texts: does it run at all?")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    if args.tiny:
        args.texts, args.rounds = 3, 1
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args)
    found["summary"] = summary(found)
    for row in found["summary"]:
        print(f"{row['bertfast']} {row['unit']}, {row['rival_name']}: {row['rival']}; "
              f"{row['ratio']} times as fast", flush=True)  # fmt: skip
    save("explain", found, args.out)


if __name__ == "__main__":
    main()
