"""Resident memory of CPU inference: a frozen model beside transformers, each in its own process.

    python benchmarks/memory.py [--models MiniLM BERT-base] [--threads N]

A process loads the model, runs a batch of natural-length sequences some times and tells its
resident set (VmRSS) and its highest (VmHWM). What the interpreter has with torch loaded is taken
off. Target: no more than the weights in their precision plus 150 MB; the weights are the encoder's
matrices at 4, 2 or 1 bytes, the embedding tables at 4 or 2, everything else at 4. MB are 10^6
bytes. transformers in bf16 is left out where torch has no instructions for it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ALLOWED = 150  # MB beside the weights
LENGTHS = {"MiniLM": 32, "BERT-base": 16}  # sequences in the batch
CASES = {
    "torch": ("torch", None),
    "transformers fp32": ("transformers", "fp32"),
    "transformers bf16": ("transformers", "bf16"),
    "bertfast fp32": ("bertfast", "fp32"),
    "bertfast bf16": ("bertfast", "bf16"),
    "bertfast int8": ("bertfast", "int8"),
}


def resident() -> dict:
    """MB of this process: now, and at most so far."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024 / 1e6
    return found


def child(case: str, folder: str, batch: str, threads: int):
    """One case: prints its memory, and the mean-pooled states to compare."""
    import torch

    side, precision = CASES[case]
    torch.set_num_threads(threads)
    given, pooled = torch.load(batch), None
    if side != "torch":
        model = load(side, precision, folder)
        mask = given["attention_mask"].unsqueeze(-1)
        with torch.inference_mode():
            # Once for a rival, which is slow where it has no instructions for bf16.
            for _ in range(3 if side == "bertfast" else 1):
                states = model(**given).last_hidden_state
            pooled = ((states * mask).sum(1) / mask.sum(1)).float().tolist()
    print(json.dumps(resident() | {"pooled": pooled}))


def load(side: str, precision: str, folder: str):
    import torch

    if side == "bertfast":
        import bertfast

        return bertfast.freeze(bertfast.BertModel.from_pretrained(folder), precision)
    import transformers

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return transformers.BertModel.from_pretrained(
        folder, attn_implementation="sdpa", dtype=dtype
    ).eval()


def weights(config, precision: str) -> float:
    """MB of a BertModel's weights in a precision."""
    h, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    matrices = layers * (4 * h * h + 2 * h * inner)
    tables = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size) * h
    others = layers * (9 * h + inner) + 2 * h + h * h + h
    size = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 2)}[precision]
    return (size[0] * matrices + size[1] * tables + 4 * others) / 1e6


def measure(model: str, threads: int) -> list[dict]:
    import torch
    import transformers
    from encoder_inference import checkpoint
    from harness import natural_lengths, real_batch

    from bertfast.bench.encoder import COSINE
    from bertfast.bench.measure import emulated

    folder = checkpoint(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    cases = {c: at for c, at in CASES.items() if at[0] != "transformers" or not emulated(at[1])}
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as work:
        batch = Path(work) / "batch.pt"
        torch.save(real_batch(tokenizer, natural_lengths(LENGTHS[model])), batch)

        def run(case):
            command = [sys.executable, __file__, "--child", case, folder, str(batch)]
            return subprocess.run([*command, str(threads)], capture_output=True, text=True)

        with ThreadPoolExecutor(2) as pool:  # company changes times, not memory
            for case, done in zip(cases, pool.map(run, cases), strict=True):
                if done.returncode:
                    raise SystemExit(f"{case}: {done.stderr}")
                found[case] = json.loads(done.stdout.splitlines()[-1])
    expected = torch.tensor(found["transformers fp32"]["pooled"])
    for case, (side, precision) in cases.items():
        if side == "torch":
            continue
        pooled = torch.tensor(found[case].pop("pooled"))
        cosine = torch.cosine_similarity(pooled, expected).mean().item()
        if not cosine >= COSINE[precision]:
            raise SystemExit(f"{case}: cosine {cosine:.6f} to transformers fp32")
        row = {"model": model, "side": side, "precision": precision, "cosine": round(cosine, 6)}
        for name, key in (("rss_mb", "VmRSS"), ("peak_mb", "VmHWM")):
            row[name] = round(found[case][key] - found["torch"][key], 1)
        row["weights_mb"] = round(weights(config, precision), 1)
        row["beside_weights_mb"] = round(row["rss_mb"] - row["weights_mb"], 1)
        rows.append(row)
        print(
            "{model:10} {side:13} {precision}: {rss_mb:7.1f} MB over torch (peak {peak_mb:7.1f}), "
            "weights {weights_mb:6.1f}, beside them {beside_weights_mb:6.1f}".format(**row),
            flush=True,
        )
    return rows


def summary(rows) -> list[dict]:
    """Ours beside transformers in the same precision, or else in the smallest that was measured."""
    found = {(r["model"], r["side"], r["precision"]): r["rss_mb"] for r in rows}
    out = []
    for (model, side, precision), mb in found.items():
        if side == "bertfast":
            others = [p for m, s, p in found if (m, s) == (model, "transformers")]
            other = precision if precision in others else others[-1]
            rival = found[model, "transformers", other]
            row = {"task": f"{model} inference, {precision}: resident memory over torch's own"}
            row |= {"unit": "MB", "bertfast": mb, "rival": rival}
            row |= {"rival_name": f"transformers {other}", "ratio": round(rival / mb, 2)}
            out.append(row)
    return out


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:5], int(sys.argv[5]))
    import torch
    import transformers
    from harness import save

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: expected 1 or more")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = [row for model in args.models for row in measure(model, args.threads)]
    save("memory", {"rows": rows, "summary": summary(rows)}, args.out)
    over = [r for r in rows if r["side"] == "bertfast" and r["beside_weights_mb"] > ALLOWED]
    for row in over:
        print(f"{row['model']} {row['precision']}: more than {ALLOWED} MB beside the weights")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
