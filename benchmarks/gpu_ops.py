"""The operators on a GPU beside PyTorch's, in bf16: BERT-base's sizes, 16,384 positions.

    python benchmarks/gpu_ops.py --out FOLDER [--only attention ...]

Each call is captured in a CUDA graph, so that kernels are timed and not their launches, and reads
other inputs than the one before, together more than the L2 holds. "training" is forward and
backward, dropout 0.1 where the operator has it; the backward is the difference to a forward with
the same dropout. Before it is timed, every output and gradient is held against fp32: at most twice
the error of PyTorch's own kernels in bf16.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_results import write
from torch.nn.attention import SDPBackend, sdpa_kernel

from bertfast import ops
from bertfast.bench.measure import median, natural_lengths, origin, turns

HIDDEN, HEADS, INNER, VOCABULARY = 768, 12, 3072, 30522
BATCHES = {
    "128 x 128": [128] * 128,
    "32 x 512": [512] * 32,
    "natural to 256": natural_lengths(128, median=100, sigma=0.6, longest=256),
    "natural to 512": natural_lengths(64, median=220, sigma=0.7, longest=512),
}
ROUNDS, CALLS, SETS, DROPOUT = 9, 8, 4, 0.1
BF16 = torch.bfloat16


def draw(*shape, scale=1.0):
    return torch.randn(*shape, device="cuda") * scale


def seed():
    return torch.tensor([7, 9], device="cuda")


class Graph:
    """CALLS calls of run(*inputs), in a CUDA graph, over `sets` of inputs in turn."""

    def __init__(self, run, sets):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for inputs in sets[:2]:
                run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(CALLS):
                run(*sets[i % len(sets)])

    def seconds(self):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / CALLS


def step(name, call, training):
    """call, or call and its gradients of all inputs, by the backend `name` where that is one of
    ours; `grad` comes last in a set."""

    def run(*inputs):
        *leaves, grad = inputs
        with ops.backend(name) if name in ops.registry.BACKENDS else nullcontext():
            if not training:
                with torch.no_grad():
                    return [call(*leaves)]
            leaves = [t.detach().requires_grad_() for t in leaves]
            y = call(*leaves)
            return [y, *torch.autograd.grad(y, leaves, grad)]

    return run


def errors(found, truth):
    return [((f.float() - t).norm() / t.norm()).item() for f, t in zip(found, truth, strict=True)]


def ours(call):
    return {name: call for name in ("triton", "cuda")}


def attention(lengths, p):
    """(inputs but the gradient, {name: call}, what PyTorch computes, FLOP, bytes)"""
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    tokens, longest, dim = sum(lengths), max(lengths), HIDDEN // HEADS
    full = min(lengths) == longest
    mask = torch.arange(longest, device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    key_mask = None if full else mask[:, None, None]
    where = mask.flatten().nonzero().squeeze(1)

    def dense(qkv, p=0.0):
        if full:
            padded = qkv.unflatten(0, mask.shape)
        else:
            padded = qkv.new_zeros(mask.numel(), *qkv.shape[1:]).index_copy(0, where, qkv)
            padded = padded.unflatten(0, mask.shape)
        q, k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, dropout_p=p)
        y = y.transpose(1, 2).flatten(0, 1)
        return y if full else y.index_select(0, where)

    def by(kernel):
        def run(qkv):
            with sdpa_kernel(kernel):
                return dense(qkv, p)

        return run

    keys = seed() if p else None

    def own(qkv):
        return ops.attention(qkv, starts, longest, dropout_p=p, seed=keys)

    calls = ours(own)
    if not p:
        from torch.nn.attention.varlen import varlen_attn

        calls["torch varlen"] = lambda qkv: varlen_attn(
            *qkv.unbind(1), starts, starts, longest, longest
        )
    if full:
        calls["torch flash"] = by(SDPBackend.FLASH_ATTENTION)
    calls["cuDNN"] = by(SDPBackend.CUDNN_ATTENTION)
    calls["torch efficient"] = by(SDPBackend.EFFICIENT_ATTENTION)
    flop = 4 * HIDDEN * sum(n * n for n in lengths)
    return [draw(tokens, 3, HEADS, dim)], calls, dense, flop, 2 * 4 * tokens * HIDDEN


def add_layer_norm(lengths, p):
    tokens = sum(lengths)
    inputs = [draw(tokens, HIDDEN), draw(tokens, HIDDEN), 1 + draw(HIDDEN, scale=0.1)]
    inputs += [draw(HIDDEN), draw(HIDDEN)]

    def plain(x, residual, weight, bias, x_bias, p=0.0):
        s = residual + F.dropout(x + x_bias, p)
        return F.layer_norm(s, (HIDDEN,), weight, bias, 1e-12)

    keys = seed() if p else None

    def own(x, residual, weight, bias, x_bias):
        return ops.add_layer_norm(
            x, residual, weight, bias, 1e-12, x_bias=x_bias, dropout_p=p, seed=keys
        )

    calls = ours(own) | {"torch": lambda *leaves: plain(*leaves, p)}
    calls["torch.compile"] = torch.compile(lambda *leaves: plain(*leaves, p))
    return inputs, calls, plain, 0, 2 * 3 * tokens * HIDDEN


def linear_act(lengths, p):
    tokens = sum(lengths)
    inputs = [draw(tokens, HIDDEN), draw(INNER, HIDDEN, scale=HIDDEN**-0.5), draw(INNER)]

    def plain(x, w, b):
        return F.gelu(F.linear(x, w, b))

    calls = ours(lambda x, w, b: ops.linear_act(x, w, b, "gelu")) | {"torch": plain}
    calls["torch.compile"] = torch.compile(plain)
    return inputs, calls, plain, 2 * tokens * HIDDEN * INNER, 2 * tokens * (HIDDEN + INNER)


def linear(lengths, p):
    tokens = sum(lengths)
    inputs = [draw(tokens, HIDDEN), draw(INNER, HIDDEN, scale=HIDDEN**-0.5)]
    calls = ours(ops.linear_act) | {"torch": F.linear}
    return inputs, calls, F.linear, 2 * tokens * HIDDEN * INNER, 2 * tokens * (HIDDEN + INNER)


def masked_cross_entropy(lengths, p):
    rows = int(0.15 * sum(lengths))  # those with a label
    labels = torch.randint(VOCABULARY, (rows,), device="cuda")
    inputs = [draw(rows, HIDDEN), draw(VOCABULARY, HIDDEN, scale=HIDDEN**-0.5)]
    inputs += [draw(VOCABULARY)]

    def plain(x, w, b):
        return F.cross_entropy(F.linear(x, w, b).float(), labels)

    def own(x, w, b):
        return ops.masked_cross_entropy(x, w, b, labels, labelled_only=True)

    calls = ours(own) | {"torch": plain}
    return inputs, calls, plain, 2 * rows * HIDDEN * VOCABULARY, 0


OPERATORS = {
    f.__name__: f for f in (attention, add_layer_norm, linear_act, linear, masked_cross_entropy)
}
BATCH = {name: list(BATCHES) if name == "attention" else ["32 x 512"] for name in OPERATORS}
DROPS = ("attention", "add_layer_norm")
STEPS = [("forward", 0.0), ("training", 0.0), ("forward", DROPOUT), ("training", DROPOUT)]
OURS = {"triton": "bertfast, Triton", "cuda": "bertfast, CUDA C++"}
OURS_NAMES = set(OURS.values())


def measure(operator, batch, training, p):
    """{name: (seconds or why not, largest relative error)}, FLOP, bytes"""
    torch.manual_seed(0)
    make = OPERATORS[operator]
    inputs, calls, plain, flop, size = make(BATCHES[batch], p)
    sets = []
    for _ in range(SETS):
        fresh = [torch.randn_like(t) * t.std() if t.numel() > 1e6 else t for t in inputs]
        low = [t.to(BF16) for t in fresh]
        with torch.no_grad():
            sets.append([*low, torch.randn_like(plain(*low))])
    # Dropped values differ between kernels: those are checked without, and by the tests.
    check = make(BATCHES[batch], 0.0)[1] if p else calls
    exact = step(None, plain, training)(*[t.float() for t in sets[0]])
    low = errors(step(None, plain, training)(*sets[0]), exact)
    graphs, results = {}, {}
    for name, call in calls.items():
        try:
            found = errors(step(name, check[name], training)(*sets[0]), exact)
            if not all(e <= 2 * limit + 2e-3 for e, limit in zip(found, low, strict=True)):
                results[name] = f"wrong: errors {found}, PyTorch's {low}"
                continue
            graphs[name] = Graph(step(name, call, training), sets)
            results[name] = max(found)
        except Exception as e:  # a rival that can't is a row that says so
            results[name] = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
    times = {name: [] for name in graphs}
    for _, name in turns(list(graphs), ROUNDS):
        times[name].append(graphs[name].seconds())
    return {n: (median(times[n]) if n in times else r, r) for n, r in results.items()}, flop, size


def ceilings():
    """TFLOP/s of a square bf16 product, GB/s of a copy: bytes read and written."""
    a, b = draw(8192, 8192).to(BF16), draw(2**29)  # 2 GiB
    c = torch.empty_like(b)
    found = {}
    for name, run, work in (
        ("matmul_tflops", lambda: a @ a, 2 * 8192**3 / 1e12),
        # By a kernel: in a graph `copy_` takes the copy engine, which is slower.
        ("copy_gbs", lambda: torch.mul(b, 1.5, out=c), 2 * b.nbytes / 1e9),
    ):
        graph = Graph(run, [()])
        found[name] = work / median([graph.seconds() for _ in range(ROUNDS)])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    limits, rows, wrong = ceilings(), [], False
    print(limits, flush=True)
    about = {"benchmark": "gpu_operators", **origin("cuda"), **limits}
    args.out.mkdir(parents=True, exist_ok=True)
    for operator in args.only:
        for batch in BATCH[operator]:
            alone = {}  # the forward's seconds
            for kind, p in STEPS[: 4 if operator in DROPS else 2]:
                found, flop, size = measure(operator, batch, kind == "training", p)
                step = "forward" if kind == "forward" else "backward"
                task = f"{operator}, {batch}, {step}" + (f", dropout {p}" if p else "") + ", bf16"
                for name, (seconds, note) in found.items():
                    row = {"task": task, "name": OURS.get(name, name)}
                    if isinstance(seconds, str):
                        wrong |= name in OURS and "can't serve" not in seconds
                        rows.append(row | {"note": seconds})
                    else:
                        took = seconds - alone[p, name] if step == "backward" else seconds
                        alone.setdefault((p, name), seconds)
                        rows.append(row | figures(operator, step, p, took, flop, size, note))
                    print(*rows[-1].values(), flush=True)
                write(args.out / "gpu_operators.json", about, rows, OURS_NAMES.__contains__)
    return int(wrong)


def figures(operator, step, p, seconds, flop, size, error):
    """A row's figures. A backward's products are two for each of forward's, attention's five for
    two; layer norm's reads the gradient too and, with dropout, writes two."""
    back, row = step == "backward", {"milliseconds": round(1e3 * seconds, 5)}
    if flop:
        factor = (2.5 if operator == "attention" else 2) if back else 1
        row["useful_gflops"] = round(factor * flop / seconds / 1e9, 1)
    if operator == "add_layer_norm":
        factor = (5 / 3 if p else 4 / 3) if back else 1
        row["gb_per_second"] = round(factor * size / seconds / 1e9)
    return row | {"relative_error": error}


if __name__ == "__main__":
    sys.exit(main())
