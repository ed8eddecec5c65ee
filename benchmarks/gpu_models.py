"""What the GPU scripts of whole models share: sizes, batches, a packed rival, a part's time."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from base_sizes import TINY as TINY_SIZES
from base_sizes import config_of as other_config
from gpu_results import write
from torch import nn

from bertfast.bench.measure import natural_lengths, origin, product, random_batch, take_turns
from bertfast.encoder.graph import recorder

CONFIGS = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                 vocab_size=200),
    "base": {},
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                  intermediate_size=4096),
}  # fmt: skip
# name: batch, length, natural lengths (half padding); what tells most comes first
SHAPES = {
    "32 x 512": (32, 512, False),
    "1 x 32": (1, 32, False),
    "32 natural to 512": (32, 512, True),
    "128 x 128": (128, 128, False),
    "1 x 128": (1, 128, False),
    "32 x 128": (32, 128, False),
}
TINY = {"2 x 24": (2, 24, False), "3 natural to 24": (3, 24, True)}
NATURAL = 4  # batches of natural lengths, in turn: other sizes at every call


FAMILIES = ("BERT", "ModernBERT-base", "DeBERTa-v3-base")


def add_model(parser) -> None:
    """The arguments of `config_of`."""
    parser.add_argument("--config", choices=CONFIGS, default="base", help="BERT's size")
    parser.add_argument("--family", choices=FAMILIES, default="BERT", help="another, or BERT")


def config_of(name, family="BERT", **changes):
    """name: of CONFIGS; another family has its own size, and "tiny"."""
    import transformers

    if family != "BERT":
        return other_config(family, **(TINY_SIZES if name == "tiny" else {}) | changes)
    config = transformers.BertConfig(**CONFIGS[name] | changes)
    config._attn_implementation = "sdpa"
    return config


def title_of(name, family="BERT") -> str:
    return f"BERT-{name}" if family == "BERT" else family


def file_of(name, family="BERT") -> str:
    """What the results are called."""
    if family == "BERT":
        return name
    return family.split("-")[0].lower() + "_tiny" * (name == "tiny")


def stock_of(config) -> str:
    return f"transformers {config._attn_implementation}"


def shapes_of(config_name, wanted):
    return TINY if config_name == "tiny" else {name: SHAPES[name] for name in wanted}


def lengths_of(batch, length, natural, seed=0) -> list[int]:
    if not natural:
        return [length] * batch
    drawn = natural_lengths(batch, seed, median=length / 2.5, longest=length)
    return [length, *(min(n, length) for n in drawn[1:])]


def batches_of(config, shape, device) -> list[dict]:
    """One batch, or several that differ in their lengths where those are natural."""
    found = []
    for seed in range(NATURAL if shape[2] else 1):
        made = random_batch(lengths_of(*shape, seed), shape[1], config.vocab_size, seed)
        found.append({name: t.to(device) for name, t in made.items()})
    return found


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


@contextmanager
def launched():
    """A block in which nothing is replayed."""
    before = os.environ.get("BERTFAST_GRAPHS")
    os.environ["BERTFAST_GRAPHS"] = "0"
    try:
        yield
    finally:
        os.environ.pop("BERTFAST_GRAPHS")
        if before is not None:
            os.environ["BERTFAST_GRAPHS"] = before


def replays(report) -> int:
    """How many of its calls an accelerated model has replayed, by `accelerate`'s report."""
    return 0 if report is None else sum(counts.hits for counts in report.graphs.values())


def recorded(device) -> bool:
    """Whether there are graphs here."""
    return recorder(torch.device(device)) is not None


def reason(error) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


class Budget:
    """The seconds that a script may take, and whether another step still fits."""

    ENOUGH = 20  # the first steps take longer: they compile

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds
        self.last = 0.0

    def left(self) -> float:
        return self.end - time.monotonic()

    @contextmanager
    def step(self):
        start = time.monotonic()
        yield
        self.last = time.monotonic() - start

    def allows(self) -> bool:
        return self.left() > min(self.last, self.ENOUGH)


class Results:
    """A script's rows, written after each: a run that is stopped keeps what it has."""

    def __init__(self, name, out: Path, device):
        multiply, flop = product("bf16", device)
        self.peak = flop / take_turns({"": multiply}, 5, device)[""] / 1e12
        self.about = {"benchmark": name, **origin(device), "matmul_tflops": round(self.peak, 1)}
        self.about["notes"] = {}
        self.path, self.rows = out / f"{name}.json", []
        out.mkdir(parents=True, exist_ok=True)

    def add(self, task, row):
        self.rows.append({"task": task, **row})
        print(line(self.rows[-1]), flush=True)
        write(self.path, self.about, self.rows, is_ours)

    def note(self, key, value):
        """Of the whole run, beside its rows."""
        self.about["notes"][key] = value
        print(f"{key}: {value}", flush=True)
        write(self.path, self.about, self.rows, is_ours)

    def failed(self) -> bool:
        return any("note" in r and is_ours(r["name"]) for r in self.rows)


def line(row) -> str:
    if "note" in row:
        return f"{row['task']:48} {row['name']:28} {row['note']}"
    keys = ("relative_error", "cosine", "gap_to_launch", "replays", "warnings")
    rest = (f"{key} {row[key]}" for key in keys if row.get(key) not in (None, []))
    share = f"{row['share_of_peak']:.0%} of the product" if "share_of_peak" in row else ""
    return (
        f"{row['task']:48} {row['name']:28} {row['milliseconds']:9.3f} ms  {share}  "
        f"{', '.join(rest)}"
    )


def is_ours(name):
    return name.startswith("bertfast")
