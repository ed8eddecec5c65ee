"""BERT on a GPU in bf16: inference and training steps beside transformers and a packed rival.

    python benchmarks/gpu_encoder.py --config base --out FOLDER [--compiled] [--profile]

Every output is held against transformers' in fp32 in the same run, every gradient too. The packed
rival is what anyone can write on torch alone: sequences without padding, `varlen_attn`, Q, K and V
as one product. Training is under autocast with fused AdamW, dropout 0.1. The gap to the peak,
`matmul_tflops`, counts real tokens' products alone, three times the forward's in a step.
"""

import argparse
import cProfile
import functools
import pstats
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from gpu_results import write
from torch import nn
from torch.profiler import ProfilerActivity, profile

import bertfast
from bertfast import ops
from bertfast.bench import train
from bertfast.bench.measure import (
    encoder_flop,
    natural_lengths,
    origin,
    product,
    random_batch,
    take_turns,
)

CONFIGS = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                 vocab_size=200),
    "base": {},
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                  intermediate_size=4096),
}  # fmt: skip
# name: batch, length, natural lengths (half padding)
SHAPES = {
    "1 x 128": (1, 128, False),
    "128 x 128": (128, 128, False),
    "32 x 512": (32, 512, False),
    "32 natural to 512": (32, 512, True),
}
TINY = {"2 x 24": (2, 24, False), "3 natural to 24": (3, 24, True)}


def batch_of(config, batch, length, natural, device):
    lengths = [length] * batch
    if natural:
        lengths = [
            min(n, length) for n in natural_lengths(batch, 0, median=length / 2.5, longest=length)
        ]
        lengths[0] = length
    made = random_batch(lengths, length, config.vocab_size)
    return {name: t.to(device) for name, t in made.items()}


class Packed(nn.Module):
    """A transformers BertModel's weights on torch's own packed attention."""

    def __init__(self, model):
        super().__init__()
        from torch.nn.attention.varlen import varlen_attn

        self.attend, self.model, self.heads = varlen_attn, model, model.config.num_attention_heads
        self.joined = []
        for layer in model.encoder.layer:
            own = layer.attention.self
            three = own.query, own.key, own.value
            weight, bias = (torch.cat([getattr(m, p) for m in three]) for p in ("weight", "bias"))
            self.joined.append((weight.detach(), bias.detach()))

    def forward(self, input_ids, attention_mask):
        where = attention_mask.flatten().nonzero().squeeze(1)
        lengths = attention_mask.sum(1)
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        longest = input_ids.shape[1]
        positions = torch.arange(longest, device=input_ids.device).expand_as(input_ids)
        ids, positions = (t.flatten()[where][None] for t in (input_ids, positions))
        x = self.model.embeddings(ids, position_ids=positions)[0]
        for layer, (weight, bias) in zip(self.model.encoder.layer, self.joined, strict=True):
            qkv = F.linear(x, weight, bias).view(len(x), 3, self.heads, -1)
            context = self.attend(*qkv.unbind(1), starts, starts, longest, longest)
            out = layer.attention.output
            x = out.LayerNorm(x + out.dense(context.flatten(1)))
            inner = F.gelu(layer.intermediate.dense(x))
            x = layer.output.LayerNorm(x + layer.output.dense(inner))
        y = x.new_zeros(attention_mask.numel(), x.shape[1])
        return y.index_copy(0, where, x).unflatten(0, attention_mask.shape)


def call_of(model, backend=None):
    def call(batch):
        with torch.inference_mode(), ops.backend(backend) if backend else nullcontext():
            found = model(**batch)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state

    return call


def models_of(config, device, compiled):
    """transformers' BertModel in fp32, and {name: call(batch) -> states} in bf16."""
    import transformers

    torch.manual_seed(0)
    exact = transformers.BertModel(config, add_pooling_layer=False).eval().to(device)

    def fresh(cls):
        model = cls(config, add_pooling_layer=False).eval()
        model.load_state_dict(exact.state_dict())
        return model.to(device, torch.bfloat16)

    ours, stock = fresh(bertfast.BertModel), fresh(transformers.BertModel)
    calls = {"bertfast": call_of(ours), "transformers sdpa": call_of(stock)}
    if device == "cuda":
        calls["bertfast, CUDA C++"] = call_of(ours, "cuda")
        calls["bertfast graphs"] = call_of(bertfast.cuda_graphs(ours))
        frozen = fresh(bertfast.BertModel)
        bertfast.freeze(frozen, "bf16")
        calls["bertfast frozen"] = call_of(frozen)
        calls["bertfast frozen graphs"] = call_of(bertfast.cuda_graphs(frozen))
        calls["torch packed"] = call_of(Packed(stock))
    if compiled:
        calls["transformers compiled"] = call_of(torch.compile(stock))
    return exact, calls


def inference(config, shapes, device, rounds, compiled):
    exact, calls = models_of(config, device, compiled)
    for name, shape in shapes.items():
        batch = batch_of(config, *shape, device)
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            truth = exact(**batch).last_hidden_state[real]
        errors, notes = {}, {}
        for who, call in calls.items():
            try:
                found = call(batch)[real].float()
                errors[who] = ((found - truth).norm() / truth.norm()).item()
            except Exception as e:
                notes[who] = f"{type(e).__name__}: {str(e).splitlines()[0][:300]}"
        limit = 2 * errors["transformers sdpa"] + 1e-3
        for who, error in list(errors.items()):
            if not error <= limit:
                notes[who] = f"wrong: relative error {error:.1e} above {limit:.1e}"
                del errors[who]
        runs = {who: (lambda call=calls[who], batch=batch: call(batch)) for who in errors}
        seconds = take_turns(runs, rounds, device, warm=True)
        flop = encoder_flop(config, batch["attention_mask"].sum(1).tolist())
        for who in calls:
            row = {"what": "inference", "batch": name, "name": who}
            if who in notes:
                yield row | {"note": notes[who]}
                continue
            yield row | {
                "milliseconds": round(1e3 * seconds[who], 4),
                "tokens_per_second": round(int(real.sum()) / seconds[who]),
                "useful_gflops": round(flop / seconds[who] / 1e9, 1),
                "relative_error": errors[who],
            }


class Pretraining(nn.Module):
    """What `bertfast pretrain` runs: packed sequences, the head for masked tokens alone. Positions
    come from the data loader, as there."""

    def __init__(self, model, batch):
        super().__init__()
        self.model = model
        mask, labels = batch["attention_mask"].cpu().bool(), batch["labels"].cpu()
        lengths, device = mask.sum(1), batch["labels"].device
        rows = (labels[mask] != -100).nonzero().squeeze(1)
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        positions = torch.arange(mask.shape[1]).expand_as(mask)[mask]
        self.longest = int(lengths.max())
        self.made = [t.to(device) for t in (starts, positions, rows, labels[mask][rows])]

    def named_parameters(self, *args, **kwargs):
        return self.model.named_parameters(*args, **kwargs)

    def forward(self, input_ids, attention_mask, labels):
        starts, positions, rows, wanted = self.made
        ids = input_ids[attention_mask.bool()] if self.padded(attention_mask) else input_ids
        hidden = self.model.bert.encode_packed(
            ids.flatten(), starts, self.longest, positions, rows=rows
        )
        head = self.model.cls.predictions
        loss = ops.masked_cross_entropy(
            *(head.transform(hidden), head.decoder.weight, head.decoder.bias, wanted),
            labelled_only=True,
        )
        return SimpleNamespace(loss=loss)

    def padded(self, mask):
        return mask.numel() != len(self.made[1])


def pretraining(reference, batch, rounds):
    """The row of `train.cell` for our own pre-training's step."""
    expected = train.gradients(reference, batch, "fp32")
    model = Pretraining(train.model_of("bertfast", "mlm", reference), batch)
    found = train.agreement(train.gradients(model, batch, "bf16"), expected)
    if not found["cosine"] >= train.COSINE["bf16"]:
        raise RuntimeError(f"gradients' cosine {found['cosine']}")
    step = train.step_of(model, batch, "bf16")
    seconds = take_turns({"": step}, rounds, batch["labels"].device.type)[""]
    flop = train.useful_flop(reference.config, batch)
    return {
        "name": "bertfast pre-training",
        "milliseconds": round(1e3 * seconds, 4),
        "tokens_per_second": round(int(batch["attention_mask"].sum()) / seconds),
        "useful_gflops": round(flop / seconds / 1e9, 1),
        **found,
    }


def training(config, shapes, device, rounds, compiled):
    """Steps of fine-tuning a classifier and of masked language modelling."""
    import transformers

    rivals = ("bertfast", "sdpa", *["compile"] * compiled)
    classes = {
        "mlm": transformers.BertForMaskedLM,
        "classify": transformers.BertForSequenceClassification,
    }
    for task, cls in classes.items():
        torch.manual_seed(0)
        reference = cls(config).to(device)
        for name, shape in shapes.items():
            if shape[0] == 1:
                continue
            batch = batch_of(config, *shape, device)
            batch["labels"] = train.labels_of(task, batch, config.vocab_size)
            try:
                made = train.cell(reference, task, rivals, batch, "bf16", rounds)["rows"]
                if task == "mlm":
                    made.append(pretraining(reference, batch, rounds))
                elif device == "cuda":
                    with ops.backend("cuda"):
                        cell = train.cell(reference, task, ("bertfast",), batch, "bf16", rounds)
                    made += [row | {"name": "bertfast, CUDA C++"} for row in cell["rows"]]
            except Exception as e:
                made = [{"name": "bertfast", "note": f"{type(e).__name__}: {str(e)[:300]}"}]
            for row in made:
                yield {"what": f"training ({task})", "batch": name, **row}


@functools.cache
def graphed(model):
    return bertfast.cuda_graphs(model)


def profiled(config, device, folder: Path):
    """profile.txt: a training step of 32 x 512 tokens and an inference of 1 x 128 by kernel, and
    the host's time in them by function."""
    import transformers

    reference = transformers.BertForMaskedLM(config).to(device)
    long, short = (batch_of(config, *SHAPES[name], device) for name in ("32 x 512", "1 x 128"))
    long["labels"] = train.labels_of("mlm", long, config.vocab_size)
    with open(folder / "profile.txt", "w") as file:
        for key in ("bertfast", "sdpa"):
            model = train.model_of(key, "mlm", reference)
            step = train.step_of(model, long, "bf16")
            runs = {"training 32 x 512": step, "inference 1 x 128": lambda m=model: m(**short)}
            if key == "bertfast":
                runs["graphs 1 x 128"] = lambda m=model: graphed(m)(**short)
            for what, run in runs.items():
                with torch.set_grad_enabled(what.startswith("training")):
                    for _ in range(3):
                        run()
                    with profile(activities=[ProfilerActivity.CUDA]) as found:
                        run()
                        torch.cuda.synchronize()
                    table = found.key_averages().table(
                        sort_by="self_device_time_total", row_limit=30, max_name_column_width=90
                    )
                    print(key, what, table, sep="\n", file=file)
                    host = cProfile.Profile()
                    host.enable()
                    for _ in range(10):
                        run()
                    host.disable()
                    torch.cuda.synchronize()
                    pstats.Stats(host, stream=file).sort_stats("tottime").print_stats(35)
                model.to(torch.bfloat16).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=CONFIGS, default="base")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile, minutes")
    parser.add_argument("--profile", action="store_true", help="profile.txt as well")
    kinds = {"inference": inference, "training": training}
    parser.add_argument("--what", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    import transformers

    config = transformers.BertConfig(**CONFIGS[args.config])
    config._attn_implementation = "sdpa"
    shapes = TINY if args.config == "tiny" else {name: SHAPES[name] for name in args.shapes}
    options = shapes, args.device, args.rounds, args.compiled
    multiply, flop = product("bf16", args.device)
    peak = flop / take_turns({"": multiply}, 5, args.device)[""] / 1e12
    rows, start = [], time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.profile:
        profiled(config, args.device, args.out)
    about = {"benchmark": f"gpu_encoder_{args.config}", **origin(args.device)}
    about["matmul_tflops"] = round(peak, 1)
    path = args.out / f"gpu_encoder_{args.config}.json"
    for what in args.what:
        for row in kinds[what](config, *options):
            task = f"BERT-{args.config} {row.pop('what')}, {row.pop('batch')}, bf16"
            rows.append({"task": task, **row})
            print(*rows[-1].values(), flush=True)
            write(path, about, rows, is_ours)
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return int(any("note" in r and is_ours(r["name"]) for r in rows))


def is_ours(name):
    return name.startswith("bertfast")


if __name__ == "__main__":
    sys.exit(main())
