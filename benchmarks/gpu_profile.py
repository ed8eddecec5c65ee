"""A training step of 32 x 512 tokens and an inference of 1 x 128 by kernel, and the host's time in
them by function, of accelerated and stock BERT-base.

    python benchmarks/gpu_profile.py --out FOLDER        (profile.txt)
"""

import argparse
import cProfile
import pstats
import sys
from pathlib import Path

import torch
from gpu_models import SHAPES, TINY, config_of, stock_of
from gpu_training import FAST, SIGHTS, Side, labelled, reference_of
from torch.profiler import ProfilerActivity, profile


def table(run, device, file):
    for _ in range(SIGHTS):
        run()
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    print(
        found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=90),
        file=file,
    )
    host = cProfile.Profile()
    host.enable()
    for _ in range(10):
        run()
    host.disable()
    pstats.Stats(host, stream=file).sort_stats("tottime").print_stats(35)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="base")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    config = config_of(args.config)
    reference = reference_of(config, args.device)
    tiny = args.config == "tiny"
    shapes = TINY if tiny else SHAPES
    long, short = ("2 x 24", "2 x 24") if tiny else ("32 x 512", "1 x 128")
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "profile.txt", "w") as file:
        for name in (FAST, stock_of(config)):
            side = Side(name, reference)
            step, [batch] = side.stepper(), labelled(config, shapes[long], args.device)
            print(f"=== {name}, training {long}", file=file)
            table(lambda step=step, batch=batch: step(batch), args.device, file)
            side.model.to(torch.bfloat16).eval()
            [batch] = labelled(config, shapes[short], args.device)
            print(f"=== {name}, inference {short}", file=file)
            with torch.no_grad():
                table(lambda m=side.model, batch=batch: m(**batch), args.device, file)


if __name__ == "__main__":
    sys.exit(main())
