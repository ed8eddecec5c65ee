"""Every product that can serve a linear layer, timed on this GPU; rows for
kernels/linear_act_table.py.

    python benchmarks/linear_act_table.py [--size base] [--rows 16384 ...] > rows.txt

Shapes: the projections of MiniLM, BERT-base and BERT-large at several token counts, with the
weights of a bf16 or fp16 model. Each candidate's output is first held against fp64; one that errs
more than twice as much as PyTorch's own kernels fails the run. A row's comment gives each
candidate's median and the bare cuBLAS product's, in microseconds.
"""

import argparse
import sys
from statistics import median

import torch
from bertfast.kernels import linear_act as kernel
from bertfast.kernels import linear_act_table as table
from torch.nn import functional as F

from bertfast import ops

SIZES = {"minilm": (384, 1536), "base": (768, 3072), "large": (1024, 4096)}  # hidden, inner
ROWS = (128, 512, 2048, 8192, 16384)
ROUNDS, CALLS = 15, 10
PLAIN = {0: lambda z: z, 1: F.gelu, 2: lambda z: F.gelu(z, approximate="tanh"), 3: F.relu}


def layers(hidden, inner):
    """(n, k, activation, save, parts) of an encoder layer: in training z is stored; query, key and
    value scattered as in a plain model, or adjacent."""
    for parts in (1, 3):
        yield 3 * hidden, hidden, 0, False, parts
    for save in (False, True):
        yield inner, hidden, 1, save, 1
    yield hidden, hidden, 0, False, 1
    yield hidden, inner, 0, False, 1


def gpu_seconds(call) -> float:
    """Of one call, the mean of CALLS between two events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000 / CALLS


def measure(m, n, k, activation, save, parts, dtype, device, seconds=gpu_seconds, rounds=ROUNDS):
    """{candidate: median seconds}, the bare product under "product"."""
    g = torch.Generator(device).manual_seed(0)
    x, *w = (
        torch.randn(*s, generator=g, device=device, dtype=torch.float32).mul(k**-0.5).to(dtype)
        for s in ((m, k), *[(n // parts, k)] * parts)
    )
    w[0] = w[0] * k**0.5  # so that the activation sees values on both sides
    b = [torch.randn(n // parts, generator=g, device=device).to(dtype) for _ in w]
    arch, whole, bias = kernel._arch(x.device), torch.cat(w), torch.cat(b)

    def call():
        if parts == 1:
            return torch.ops.bertfast.linear_act(x, w[0], b[0], activation, save)[0]
        return torch.ops.bertfast.qkv_linear(x, w[0], b[0], w[1], b[1], w[2], b[2])

    exact = PLAIN[activation](F.linear(x.double(), whole.double(), bias.double()))
    allowed = 2 * (PLAIN[activation](F.linear(x, whole, bias)) - exact).norm() + 1e-3 * exact.norm()
    key = (arch, dtype, table.bucket(m), n, k, activation, save, parts)
    names = table.candidates(dtype, arch, k, kernel._vectors(x, w), parts)
    times = {name: [] for name in (*names, "product")}
    before = table.MEASURED.get(key)
    try:
        for i in range(rounds + 1):  # the first warms up, and is checked
            for name in names:
                table.MEASURED[key] = name
                if i == 0 and (call() - exact).norm() > allowed:
                    raise SystemExit(f"{name} is wrong at {key}")
                times[name].append(seconds(call))
            times["product"].append(seconds(lambda: torch.mm(x, whole.T)))
    finally:
        table.MEASURED.pop(key)
        if before is not None:
            table.MEASURED[key] = before
    return key, {name: median(values[1:]) for name, values in times.items()}


def row(key, times) -> str:
    best = min((t, name) for name, t in times.items() if name != "product")[1]
    arch, dtype, *rest = key
    listed = ", ".join(f"{name} {1e6 * t:.1f}" for name, t in times.items())
    return f'    ({arch}, {dtype}, {", ".join(map(str, rest))}): "{best}",  # us: {listed}'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--size", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU")
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for size in options.size:
        for layer in layers(*SIZES[size]):
            for m in options.rows:
                print(f"{size} {m} {layer}", file=sys.stderr)
                dtype = getattr(torch, options.dtype)
                with torch.inference_mode(), ops.backend("triton"):
                    print(row(*measure(m, *layer, dtype, "cuda")), flush=True)


if __name__ == "__main__":
    main()
