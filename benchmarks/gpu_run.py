"""All that a GPU machine without a network should show, in parts that each fit in minutes.

    python benchmarks/gpu_run.py --out FOLDER [--parts build tests ...] [--again]

Each part writes FOLDER/<part>.log or .json and, once it succeeded, FOLDER/<part>.done, so that a
second call goes on where the first stopped. A short table comes last on stdout. A speed is written
only after the same run compared the outputs with PyTorch's in fp32.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import ROOT

from bertfast.bench.measure import encoder_flop, interleave, median, natural_lengths, origin

LIMIT = 480  # seconds that a part may take
OPERATORS = "add_layer_norm attention cross_attention dropout embedding_layer_norm linear_act"
OPERATORS += " masked_cross_entropy pack graphs"
CUDA = "attention_cuda cuda_linear frozen_cuda"
CONFIGS = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                 vocab_size=200),
    "base": {},
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                  intermediate_size=4096),
}  # fmt: skip


def tests(names):
    return [f"tests/test_{name}.py" for name in names.split()]


def commands(out: Path) -> dict[str, list[str]]:
    """The parts that are commands of their own."""
    python = [sys.executable]
    pytest = [*python, "-P", "-m", "pytest", "-q"]  # -P: no `import kernels` from the root
    names = tests(OPERATORS)
    checked = [*pytest, "-x", "-k", "(triton or cuda) and forward_backward"]
    return {
        "build": [*python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."],
        "triton": [*pytest, "-k", "not cpu and not cuda", *names],
        "cuda": [*pytest, "-k", "cuda", *names, *tests(CUDA)],
        "memcheck": ["compute-sanitizer", "--error-exitcode", "9", *checked, *names[:2]],
        "racecheck": [
            *("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"),
            *(*checked, *tests("attention_cuda cuda_linear")),
        ],
        "linear_act": [*python, "benchmarks/linear_act_table.py"],
        "operators": [
            *(*pytest, "benchmarks/test_ops.py", f"--benchmark-json={out / 'operators.json'}"),
        ],
    }


def run(part: str, command: list[str], out: Path) -> bool:
    environment = os.environ | {"BERTFAST_CUDA": "on", "CUDAARCHS": "90a-real"}
    environment |= {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with open(out / f"{part}.log", "w") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=LIMIT
            )
            return done.returncode == 0
        except (OSError, subprocess.TimeoutExpired) as e:
            print(e, file=log)
            return False


def batch(config, rows: int, length: int, natural: bool, device):
    """Random ids, full rows or lengths like sentences', half padding or so."""
    lengths = [length] * rows
    if natural:
        lengths = [min(n, length) for n in natural_lengths(rows, 0, median=length / 2.5)]
        lengths[0] = length
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, mask.shape, generator=g)
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def encoder(out: Path, name: str, device: str, rounds: int) -> bool:
    """Inference and a training step in bf16 beside transformers' SDPA and torch.compile."""
    import transformers

    import bertfast

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    config = transformers.BertConfig(**CONFIGS[name])
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    exact = transformers.BertModel(config, add_pooling_layer=False).eval().to(device)
    ours = bertfast.BertModel(config, add_pooling_layer=False).eval()
    ours.load_state_dict(exact.state_dict())
    ours = ours.to(device, torch.bfloat16)
    stock = transformers.BertModel(config, add_pooling_layer=False).eval()
    stock.load_state_dict(exact.state_dict())
    stock = stock.to(device, torch.bfloat16)
    models = {"bertfast": ours, "transformers sdpa": stock}
    if device == "cuda":
        models["transformers compiled"] = torch.compile(stock)
    shapes = [(1, 128, False), (128, 128, False), (32, 512, False), (32, 512, True)]
    if device == "cpu":
        shapes = [(2, 24, False), (3, 24, True)]
    rows = []
    for count, length, natural in shapes:
        b = batch(config, count, length, natural, device)
        real = b["attention_mask"].bool()
        with torch.no_grad():
            truth = exact(**b).last_hidden_state[real]
            errors = {}
            for who, model in models.items():
                found = model(**b).last_hidden_state[real].float()
                errors[who] = ((found - truth).norm() / truth.norm()).item()
        worst = 2 * errors["transformers sdpa"] + 1e-3
        if not errors["bertfast"] <= worst:
            print(f"wrong: relative error {errors['bertfast']:.1e} above {worst:.1e}, {b}")
            return False

        def forward(model, b=b):
            with torch.no_grad():
                model(**b)
            wait()

        def step(model, b=b, real=real):
            model.zero_grad(set_to_none=True)
            model(**b).last_hidden_state[real].float().square().mean().backward()
            wait()

        for kind, work, factor in (("inference", forward, 1), ("forward and backward", step, 3)):
            rivals = {who: (lambda m=m, work=work: work(m)) for who, m in models.items()}
            seconds = {w: median(s) for w, s in interleave(rivals, rounds).items()}
            useful = factor * encoder_flop(config, b["attention_mask"].sum(1).tolist())
            for who, s in seconds.items():
                rows.append(
                    {
                        "config": name,
                        "what": kind,
                        "batch": count,
                        "length": length,
                        "natural": natural,
                        "model": who,
                        "milliseconds": 1e3 * s,
                        "useful_tflops": useful / s / 1e12,
                        "relative_error": errors[who],
                        "bertfast_speedup": s / seconds["bertfast"],
                    }
                )
    result = {"benchmark": f"gpu_encoder_{name}", **origin(), "rows": rows}
    if device == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        peak = median(interleave({"mm": lambda: (a @ a, wait())}, rounds)["mm"])
        result["matmul_tflops"] = 2 * 8192**3 / peak / 1e12
        result["device"] = {"name": torch.cuda.get_device_name(), "threads": 1}
    (out / f"encoder_{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return True


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", help="only these, in this order")
    parser.add_argument("--again", action="store_true", help="parts that are done as well")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    made = commands(args.out.resolve())
    known = [*made, *(f"encoder_{name}" for name in CONFIGS)]
    parts = args.parts or [p for p in known if p != "encoder_tiny"]
    for part in parts:
        if part not in known:
            parser.error(f"--parts names {part!r}, expected some of {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu runs the encoder parts on the CPU")
    failed = []
    for part in parts:
        mark, start = args.out / f"{part}.done", time.perf_counter()
        if mark.exists() and not args.again:
            state = "done before"
        elif part in made:
            state = "ok" if run(part, made[part], args.out) else "FAILED"
        else:
            name = part.removeprefix("encoder_")
            state = "ok" if encoder(args.out, name, args.device, args.rounds) else "FAILED"
        if state == "ok":
            mark.touch()
        failed += [part] * (state == "FAILED")
        print(f"{part:16} {state:12} {time.perf_counter() - start:6.0f} s", flush=True)
    for path in sorted(args.out.glob("encoder_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            print(
                "{config:6} {what:21} {batch:4} x {length:4} {model:22} {milliseconds:9.3f} ms "
                "{useful_tflops:7.1f} TFLOP/s  bertfast {bertfast_speedup:5.2f}x".format(**row)
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
