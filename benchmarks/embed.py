"""`bertfast embed` over many short texts: memory over time, two kills, speed beside bare `encode`.

    python benchmarks/embed.py [--texts 200000] [--precision int8] [--tiny]

The texts are pieces of the standard library's docstrings. One run is left alone, and its memory is
looked at twice a second; one is killed (SIGKILL) at two random moments and started again, and its
file must be the first one's to the byte. Then `embed` and sentence-transformers' `encode` on the
same frozen model take turns on a sample; their vectors are compared.
"""

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import median, minilm, real_text, save

EVERY = 0.5  # seconds between two looks at the memory


def pieces(count: int, seed: int = 0) -> list[str]:
    """Runs of 3 to 40 words, each with its number: no two are equal."""
    words, r = real_text().split(), random.Random(seed)
    found = []
    for i in range(count):
        start, length = r.randrange(len(words)), 3 + int(37 * r.random() ** 2)
        found.append(f"{i}: {' '.join(words[start : start + length])}")
    return found


def write(path: Path, texts) -> Path:
    with open(path, "w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def start(source: Path, output: Path, precision: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bertfast", "embed", "--model", minilm(), "--input", source]
    command += ["--output", output, "--precision", precision]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process) -> dict:
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"embed failed: {err}")
    return json.loads(out)


def resident(process) -> float:
    """MiB of memory that is the process's own, without the pages of files."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    anonymous = re.search(r"RssAnon:\s+(\d+)", status)  # not there once it has ended
    return int(anonymous[1]) / 1024 if anonymous else 0.0


def watched(source: Path, output: Path, precision: str) -> dict:
    """A run left alone: texts/s, seconds, and its memory over time."""
    begin, process, memory = time.perf_counter(), start(source, output, precision), []
    while process.poll() is None:
        memory.append(resident(process))
        time.sleep(EVERY)
    found, seconds = ended(process), time.perf_counter() - begin
    memory = [round(m, 1) for m in memory if m]
    third, last = memory[len(memory) // 3 :][:5], memory[-6:-1]
    return {
        "texts": found["shape"][0],
        "texts_per_second": found["texts_per_second"],
        "seconds": round(seconds, 1),
        "peak_mib": max(memory),
        "growth_mib": round(median(last) - median(third), 1),  # from a third of the run to its end
        "memory_mib": memory[:: max(1, len(memory) // 200)],
    }


def killed(source: Path, output: Path, precision: str, seconds: float, seed: int) -> list[dict]:
    """A run of which the texts take so long, killed at two random moments, then left to end."""
    r, kills = random.Random(seed), []
    partial = Path(f"{output}.partial")
    for _ in range(2):
        after, process = r.uniform(0.1, 0.4) * seconds, start(source, output, precision)
        while process.poll() is None and not (partial / "rows").exists():
            time.sleep(0.05)
        time.sleep(after)
        process.kill()
        process.communicate()
        state = partial / "state.json"
        done = json.loads(state.read_text())["done"] if state.exists() else 0
        kills.append({"after_seconds": round(after, 1), "texts_done": done})
    ended(start(source, output, precision))
    return kills


def speeds(folder: Path, texts, precision: str, rounds: int) -> dict:
    """Texts a second of `embed` and of `encode`, which take turns; the faster batch size counts."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    import bertfast

    model = SentenceTransformer(minilm(), device="cpu")
    bertfast.accelerate(model)
    bertfast.freeze(model, precision)
    source, output = write(folder / "sample.jsonl", texts), folder / "sample.npy"
    model.encode(texts[:64])
    runs = {"embed": [], "encode, 32": [], "encode, 128": []}
    for _ in range(rounds):
        found = bertfast.embed(minilm(), source, output, precision=precision, restart=True)
        runs["embed"].append(found["texts_per_second"])
        for size in (32, 128):
            begin = time.perf_counter()
            expected = model.encode(texts, batch_size=size, show_progress_bar=False)
            runs[f"encode, {size}"].append(len(texts) / (time.perf_counter() - begin))
    cosines = (np.load(output) * expected).sum(1)
    if not cosines.min() >= 0.999:
        raise SystemExit(f"embed's vectors are not encode's: cosine {cosines.min():.6f}")
    rates = {name: round(median(values), 1) for name, values in runs.items()}
    return rates | {"least_cosine": round(float(cosines.min()), 6), "sample": len(texts)}


def measure(folder: Path, args) -> dict:
    texts = pieces(args.texts, args.seed)
    source, outputs = write(folder / "texts.jsonl", texts), (folder / "a.npy", folder / "b.npy")
    whole = watched(source, outputs[0], args.precision)
    print("{texts} texts, {texts_per_second} texts/s, peak {peak_mib} MiB, growth from a third of "
          "the run to its end {growth_mib} MiB".format(**whole), flush=True)  # fmt: skip
    seconds = whole["texts"] / whole["texts_per_second"]
    kills = killed(source, outputs[1], args.precision, seconds, args.seed)
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in outputs]
    if sums[0] != sums[1]:
        raise SystemExit(f"after kills {kills} the vectors differ from those of an unbroken run")
    print(f"killed {kills}: equal vectors", flush=True)
    rates = speeds(folder, texts[: args.sample], args.precision, args.rounds)
    print(f"texts/s: {rates}", flush=True)
    return {"precision": args.precision, "run": whole, "kills": kills, "rates": rates}


def summary(found: dict) -> list[dict]:
    rates = found["rates"]
    rival = max((name for name in rates if name.startswith("encode")), key=rates.get)
    return [
        {
            "task": f"embedding {found['run']['texts']} short texts with MiniLM, "
            f"{found['precision']}",
            "unit": "ms a text",
            "bertfast": round(1e3 / rates["embed"], 3),
            "rival": round(1e3 / rates[rival], 3),
            "rival_name": f"bare {rival.replace(', ', ' in batches of ')}, same weights",
            "ratio": round(rates["embed"] / rates[rival], 2),
        }
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=200_000)
    parser.add_argument("--sample", type=int, default=8192, help="texts of which speeds are taken")
    parser.add_argument("--precision", default="int8", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the texts and the kills")
    parser.add_argument("--tiny", action="store_true", help="600 texts: does it run at all?")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    if args.tiny:
        args.texts, args.sample, args.rounds = 600, 64, 1
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args)
    save("embed", found | {"summary": summary(found)}, args.out)


if __name__ == "__main__":
    main()
