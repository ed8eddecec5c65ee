"""A tiny classifier on rows at random, and runs of the loop with it."""

import json
import math

import numpy as np
import torch
import transformers
from helpers import GPU

import bertfast
from bertfast.train import ClassifyConfig
from bertfast.train.loop import train
from bertfast.train.networks import freeze
from bertfast.train.tasks.classify import ClassificationTask

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 32, "initializer_range": 0.1}


def rows(n=40, kind="single_label", longest=30, seed=0):
    r = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        m = int(r.integers(2, longest))
        ids = r.integers(5, 40, m).tolist()
        label = {"multi_label": [float(ids[0] > 20), float(m > 9), 0.0], "regression": m / 9}
        types = [0] * (m // 2) + [1] * (m - m // 2)
        label = label.get(kind, ids[0] % 3)
        out.append({"input_ids": ids, "token_type_ids": types, "labels": label})
    return out


def classification(data=None, frozen=None, dropout=0.1, **options):
    """(model, task, config)"""
    config = ClassifyConfig(**{"epochs": 2, "batch_size": 8, "lr": 1e-2, "device": GPU} | options)
    torch.manual_seed(0)
    outputs = 1 if config.task == "regression" else 3
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = transformers.BertConfig(**SIZES, **rates, num_labels=outputs)
    model = bertfast.BertForSequenceClassification(sizes)
    model.gradient_checkpointing_enable(config.gradient_checkpointing)
    freeze(model, frozen)
    return model, task_of(config, model, data or rows(kind=config.task)), config


def task_of(config, model, data, device=GPU):
    """On rows, of which the first are those to validate."""
    task = ClassificationTask(config, device, print)
    task.model, task.tokenizer = model, type("Tokenizer", (), {"pad_token_id": 0})
    task.name(type("Labels", (), {"names": ("a", "b", "c")}))
    task.rows = {"train": data, "valid": data[:8]}
    return task


def run(out, model, task, config, said=None):
    """-> losses and norms of the steps, weights, what `train` returns"""
    said = [] if said is None else said
    outcome = train(model, task, config, out, {}, said.append)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, outcome["step"] + 1))
    number = lambda value: math.nan if value is None else value  # JSON has no NaN
    curve = [[r["loss"], number(r["gradient_norm"])] for r in steps]
    curve = torch.tensor(curve, dtype=torch.float64)
    return curve, {k: v.cpu().clone() for k, v in model.state_dict().items()}, outcome
