"""MiniLM in servers on a CPU: worker threads, one core, and forked workers, beside the stock model.

    python benchmarks/serving.py [--seconds 2] [--rounds 2]

Each case is a process of its own that answers requests, one text of natural length each, for so
many seconds, in each of these ways:

    worker      one worker thread, torch.set_num_threads(1)
    workers     as many worker threads as cores, torch.set_num_threads(1)
    one_core    the process may use one core; OMP_NUM_THREADS=16, torch.set_num_threads(1)
    fork        the parent loads the model and forks a worker for each core
    fork_after  the same, once the parent has answered requests itself
    encode      eight worker threads, SentenceTransformer.encode, torch.set_num_threads(1)

Told of each: texts a second, CPU seconds a second, threads of the operating system beyond what the
process had before, MB that its memory grew by once each text had come, and how many workers
answered: of threads those whose every embedding is to the bit what one thread alone gets. Models
take turns; the embeddings of the first texts are compared with the stock model's.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from memory import resident

MODELS = {"stock": None, "accelerated": "fp32", "frozen fp32": "fp32", "frozen int8": "int8"}
WAYS = ("worker", "workers", "one_core", "fork", "fork_after", "encode")
THREADS = 8  # that encode
CHECKED = 4  # texts whose embeddings are compared
PATIENCE = 30  # seconds after which a worker counts as hung


def load(name: str, way: str):
    import transformers
    from harness import minilm

    import bertfast

    if way == "encode":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(minilm(), device="cpu")
    elif name.startswith("frozen"):
        model = bertfast.BertModel.from_pretrained(minilm())
    else:
        model = transformers.BertModel.from_pretrained(minilm(), attn_implementation="sdpa").eval()
    if name.startswith("frozen"):
        return bertfast.freeze(model, MODELS[name])
    if name == "accelerated":
        bertfast.accelerate(model, strict=True)
    return model


def requests(way: str) -> list[dict] | list[str]:
    import transformers
    from harness import minilm, natural_lengths, real_batch

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    texts = real_batch(tokenizer, natural_lengths(32))
    if way == "encode":
        return tokenizer.batch_decode(texts["input_ids"], skip_special_tokens=True)
    lengths = texts["attention_mask"].sum(1).tolist()
    return [{k: v[i : i + 1, :n] for k, v in texts.items()} for i, n in enumerate(lengths)]


def embed(model, text):
    import torch

    if isinstance(text, str):
        return model.encode(text, convert_to_tensor=True, show_progress_bar=False)
    with torch.inference_mode():
        return model(**text).last_hidden_state.mean(1)[0]


def answer(model, texts, seconds, expected=None) -> dict:
    """Requests for so long: how many, the CPU's seconds, threads at the end, and MB grown by."""
    import torch

    count, start, used = 0, time.perf_counter(), time.process_time()
    before, wrong = None, 0
    while time.perf_counter() - start < seconds:
        i = count % len(texts)
        found = embed(model, texts[i])
        wrong += expected is not None and not torch.equal(found, expected[i])
        count += 1
        if count == len(texts):
            before = resident()["VmRSS"]
    wall = time.perf_counter() - start
    return {
        "texts": count / wall,
        "cpu": (time.process_time() - used) / wall,
        "threads": len(os.listdir("/proc/self/task")),
        "grown": 0.0 if before is None else resident()["VmRSS"] - before,
        "wrong": wrong,
    }


def in_threads(model, texts, seconds, workers) -> dict:
    expected = [embed(model, text) for text in texts]
    before = len(os.listdir("/proc/self/task"))
    found, used, start = [], time.process_time(), time.perf_counter()
    threads = [
        threading.Thread(target=lambda: found.append(answer(model, texts, seconds, expected)))
        for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cpu = (time.process_time() - used) / (time.perf_counter() - start)
    return {
        "texts": sum(one["texts"] for one in found),
        "cpu": cpu,
        "threads": max(one["threads"] for one in found) - before - workers,
        "grown": max(one["grown"] for one in found),
        "answered": sum(not one["wrong"] for one in found),
    }


def in_forks(model, texts, seconds, workers) -> dict:
    children = []
    for _ in range(workers):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE + int(seconds))
            os.write(writer, json.dumps(answer(model, texts, seconds)).encode())
            os._exit(0)
        os.close(writer)
        children.append((child, reader))
    found = []
    for child, reader in children:
        if os.waitpid(child, 0)[1] == 0:
            found.append(json.loads(os.read(reader, 10_000)))
    return {
        "texts": sum(one["texts"] for one in found),
        "cpu": sum(one["cpu"] for one in found),
        "threads": max((one["threads"] - 1 for one in found), default=None),
        "grown": max((one["grown"] for one in found), default=None),
        "answered": len(found),
    }


def child(name: str, way: str, seconds: float) -> None:
    """One case: prints what came of it."""
    if way == "one_core":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    import torch

    torch.set_num_threads(1)
    model, texts = load(name, way), requests(way)
    cores = len(os.sched_getaffinity(0))
    workers = {"worker": 1, "one_core": 1, "encode": THREADS}.get(way, cores)
    if way == "fork_after":
        answer(model, texts, 0.5)
    if way.startswith("fork"):
        found = in_forks(model, texts, seconds, workers)
    else:
        found = in_threads(model, texts, seconds, workers)
    found["expected"] = workers
    found["embeddings"] = [embed(model, text).tolist() for text in texts[:CHECKED]]
    print(json.dumps(found))


def measure(rounds: int, seconds: float) -> list[dict]:
    import torch
    from harness import median

    from bertfast.bench.measure import turns

    rows = []
    for way in WAYS:
        runs = {name: [] for name in MODELS}
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        environment |= {"OMP_NUM_THREADS": "16"} if way == "one_core" else {}
        for _, name in turns(list(MODELS), rounds):
            command = [sys.executable, __file__, "--child", name, way, str(seconds)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{name}, {way}: {done.stderr}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        expected = torch.tensor(runs["stock"][0]["embeddings"])
        for name, found in runs.items():
            actual = torch.tensor(found[0]["embeddings"])
            cosine = torch.cosine_similarity(actual, expected).min().item()
            if not cosine >= (0.99 if MODELS[name] == "int8" else 0.99999):
                raise SystemExit(f"{name}, {way}: cosine {cosine:.6f} to stock")
            row = {"way": way, "model": name, "cosine": round(cosine, 6)}
            row |= {k: round(median([f[k] for f in found]), 2) for k in ("texts", "cpu")}
            row["threads"] = max(f["threads"] or 0 for f in found)
            row["grown"] = round(max(f["grown"] or 0 for f in found), 1)
            row["answered"] = min(f["answered"] for f in found)
            row["workers"] = found[0]["expected"]
            rows.append(row)
            print(
                "{way:10} {model:12} {texts:7.1f} texts/s, {cpu:.2f} CPU s/s, {threads} more "
                "threads, {grown:+} MB, {answered} of {workers} answered".format(**row),
                flush=True,
            )
    return rows


def summary(rows) -> list[dict]:
    each = {(row["way"], row["model"]): round(1e3 / row["texts"], 2) for row in rows}
    return [
        {
            "task": f"serving MiniLM, {way}: {model}",
            "unit": "ms a text",
            "bertfast": ms,
            "rival": each[way, "stock"],
            "rival_name": f"{'sentence-' * (way == 'encode')}transformers SDPA, fp32",
            "ratio": round(each[way, "stock"] / ms, 2),
        }
        for (way, model), ms in each.items()
        if model != "stock"
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    from harness import save

    rows = measure(args.rounds, args.seconds)
    save("serving", {"rows": rows, "summary": summary(rows)}, args.out)


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(*sys.argv[-3:-1], float(sys.argv[-1]))
    else:
        main()
