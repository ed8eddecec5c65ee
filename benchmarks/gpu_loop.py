"""bertfast's own training loop, timed: the tasks of `finetune` and `pretrain` over made-up data."""

import contextlib
import json
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from gpu_models import NATURAL, lengths_of, random_batch

import bertfast
from bertfast.bench.measure import encoder_flop, synchronize
from bertfast.data import masking
from bertfast.data.prepare import PrepareConfig, prepare
from bertfast.data.sequences import Sequences
from bertfast.data.shards import Shards
from bertfast.train import ClassifyConfig, PretrainConfig
from bertfast.train.loop import _Run
from bertfast.train.pretrain import PretrainTask, _tokenizer
from bertfast.train.tasks.classify import ClassificationTask

SETTLE, TIMED = 30, 30  # steps: those in which all buckets are seen, and those that count
WORDS = 300_000  # of the corpus


class EnoughError(RuntimeError):
    """Ends a run, before it would be evaluated and saved."""


class Clock:
    """Of a task: takes the time between two steps' starts, once the device has caught up."""

    def __init__(self, *args, settle, timed):
        super().__init__(*args)
        self.settle, self.timed, self.seen, self.spent, self.loads = settle, timed, 0, 0.0, []

    def weight(self, batch):
        if self.seen in (self.settle, self.settle + self.timed):
            synchronize(torch.device(self.device).type)
            self.spent = time.perf_counter() - self.spent
        if self.seen == self.settle + self.timed:
            raise EnoughError
        if self.seen >= self.settle:
            self.loads.append((self.tokens(batch), self.useful(batch)))
        self.seen += 1
        return super().weight(batch)


class Finetuning(Clock, ClassificationTask):
    def useful(self, batch):
        return 3 * encoder_flop(self.sizes, np.diff(batch.cu_seqlens).tolist())


class Pretraining(Clock, PretrainTask):
    def useful(self, batch):
        return self.flops(batch)


def run(model, task, config):
    """Trains until the clock has what it wants -> (seconds of a step, its tokens, its operations,
    more of its row, the losses so far)."""
    torch.manual_seed(0)
    heard = []
    loop = _Run(model, task, config, Path(config.out), {}, heard.append)
    with contextlib.suppress(EnoughError):
        loop.train()
    if task.seen < task.settle + task.timed:
        raise RuntimeError(f"the loop ended after {task.seen} steps")
    tokens, flop = (sum(column) / task.timed for column in zip(*task.loads, strict=True))
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    more = {"warnings": [text for text in heard if "warning" in text]}
    if loop.work.replay:
        more |= {"replays": loop.work.replay.counts["hits"]}
    return task.spent / task.timed, tokens, flop, more, losses


def steps_of(device):
    return {"settle": SETTLE, "timed": TIMED} if device == "cuda" else {"settle": 2, "timed": 3}


def finetune_loop(config, shape, device):
    steps, rows = steps_of(device), []
    for i in range(steps["settle"] + steps["timed"] + 1):
        lengths = lengths_of(*shape, i % NATURAL if shape[2] else 0)
        ids = random_batch(lengths, shape[1], config.vocab_size, i % NATURAL)["input_ids"]
        rows += [
            {"input_ids": row[:n].tolist(), "labels": j % 2}
            for j, (row, n) in enumerate(zip(ids, lengths, strict=True))
        ]
    torch.manual_seed(0)
    with torch.device(device):
        model = bertfast.BertForSequenceClassification(config)
    tokenizer = SimpleNamespace(pad_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        settings = ClassifyConfig(
            out=folder, batch_size=shape[0], precision="bf16", device=device, epochs=1, lr=1e-5,
            eval_steps=10**9, resume="no",
        )  # fmt: skip
        task = Finetuning(settings, torch.device(device), print, **steps)
        task.model, task.tokenizer, task.sizes = model, tokenizer, config
        task.rows = {"train": rows, "valid": rows[:2]}
        return run(model, task, settings)


def corpus(path: Path) -> str:
    """Made-up words in documents much longer than a sequence, so that those are full."""
    r = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(r.choices(syllables, k=r.randint(1, 3))) for _ in range(3000)]
    sentences = [" ".join(r.choices(words, k=12)).capitalize() + "." for _ in range(WORDS // 12)]
    size = max(1, len(sentences) // 8)
    documents = [" ".join(sentences[i : i + size]) for i in range(0, len(sentences), size)]
    path.write_text("\n\n".join(documents) + "\n")
    return str(path)


def pretrain_loop(config, sequences, length, device):
    """Masked words, sequences of `length` tokens side by side."""
    steps = steps_of(device)
    torch.manual_seed(0)
    with torch.device(device):
        model = bertfast.BertForMaskedLM(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quick = {"similarity": 0, "boilerplate": 0, "shard_mb": 0.1, "vocab_size": 150}
        sources = {"corpus": [corpus(folder / "corpus.txt")], "out": str(folder / "data")}
        sources |= {"valid_fraction": 0}
        prepare(PrepareConfig(**sources, **quick), lambda text: None)
        settings = PretrainConfig(
            data=str(folder / "data"), out=str(folder / "out"), length=length, nsp=False,
            batch_tokens=sequences * length, max_steps=10**6, precision="bf16", device=device,
            eval_steps=10**9, save_steps=10**9, log_steps=10**9, resume="no",
        )  # fmt: skip
        tokenizer = _tokenizer(settings)
        shards = Shards(settings.data, "train")
        source = Sequences(shards, masking.vocabulary(tokenizer), length=length)
        task = Pretraining(settings, config, source, None, tokenizer, **steps)
        seconds, tokens, flop, more, losses = run(model, task, settings)
    more["sequences_per_second"] = round(tokens / length / seconds, 1)
    return seconds, tokens, flop, more, losses
