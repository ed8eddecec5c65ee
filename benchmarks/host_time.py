"""What a call costs before and between its kernels: models so small that these take no time.

    python benchmarks/host_time.py [--beside PYTHON] [--rounds 9]

Microseconds of one call at 1 x 32 tokens, on one thread. --beside: the interpreter of another
checkout's environment, which takes turns with this one.
"""

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
import time

import torch
import transformers

LAYERS, TOKENS, CALLS = 12, 32, 60


def calls() -> dict:
    """{what is called: a function that calls it}"""
    import bertfast

    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    batch = {"input_ids": torch.arange(1, 1 + TOKENS)[None]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    short = batch | {"attention_mask": batch["attention_mask"].clone()}
    short["attention_mask"][0, -4:] = 0
    stock = transformers.BertModel(config).eval()
    faster = transformers.BertModel(config).eval()
    bertfast.accelerate(faster, strict=True)
    native = bertfast.BertModel(config).eval()
    frozen = bertfast.freeze(bertfast.BertModel(config))
    trained = [copy.deepcopy(m).train() for m in (stock, faster, native)]

    def call(model, given):
        mode = contextlib.nullcontext if model.training else torch.no_grad

        def run():
            with mode():
                model(**given)

        return run

    names = ("stock", "accelerated", "native")
    return {
        f"{n}, training's forward": call(m, batch) for n, m in zip(names, trained, strict=True)
    } | {
        "stock, inference": call(stock, batch),
        "accelerated, inference": call(faster, batch),
        "accelerated, inference, padded": call(faster, short),
        "native, inference": call(native, batch),
        "native, inference, padded": call(native, short),
        "frozen": call(frozen, batch),
    }


def measure() -> dict[str, float]:
    torch.set_num_threads(1)
    found = {}
    for name, run in calls().items():
        for _ in range(10):
            run()
        seconds = []
        for _ in range(CALLS):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds) * 1e6
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", help="another checkout's python")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.once:
        print(json.dumps(measure()))
        return
    pythons = [sys.executable] + ([args.beside] if args.beside else [])
    runs = {python: [] for python in pythons}
    for _ in range(args.rounds):
        for python in pythons:
            command = [python, __file__, "--once"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[python].append(json.loads(out.splitlines()[-1]))
    for name in runs[sys.executable][0]:
        medians = [statistics.median(r[name] for r in found) for found in runs.values()]
        ratio = f"  {medians[0] / medians[-1]:.2f}x" if args.beside else ""
        print(f"{name:32}" + "".join(f"{m:10.0f}" for m in medians) + ratio)


if __name__ == "__main__":
    main()
