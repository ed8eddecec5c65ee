"""Fine-tuning a checkpoint for a task, whichever: check, train, save, evaluate."""

import dataclasses
import math
import os
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from ..files import locked, sha256
from ..model import checkpoint
from ..model.tokenizer import load_tokenizer
from ..verify import entry
from ..verify import read as read_manifest
from . import card, networks, opening, outputs, plots, tasks
from .card import FINETUNED
from .config import LOWER_IS_BETTER, FinetuneConfig
from .cost import together
from .loop import train
from .ranks import Ranks
from .rehearse import rehearse
from .tasks.base import PARTS, choose_device

# What may differ when a run is resumed.
_FREE = {"kind", "out", "resume", "keep", "save_steps", "allow_pickle", "device", "parallel"}
_FREE |= {"seeds", "watts"}
# What of the pretrained checkpoint counts, beside its weights.
_BASE = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_TOKENIZERS = ("vocab.json", "merges.txt", "spm.model", "sentencepiece.bpe.model")
_TOKENIZERS += ("special_tokens_map.json", "added_tokens.json")


def finetune(config: FinetuneConfig, dry_run: bool = False) -> dict | None:
    """Fine-tune a checkpoint on labelled data and evaluate it; the results also go to `out`.

    `config` is a task's kind of settings (`ClassifyConfig`, ...), and so says which it is. The
    model is of any family that transformers has the task's head for, the result a folder that
    transformers loads. Under torchrun the ranks share each step's batches, and rank 0 writes.

    `out` receives the model and tokenizer, README.md, run_config.yaml, metrics.jsonl,
    eval_results.json, training_curve.png, data_report.json, the task's pictures, and last
    manifest.json, the hashes of all that and of what was read. The model comes first: of the rest
    what can't be written is a warning. Progress goes to stderr. With several seeds each has a
    folder of its own in `out`, which gets the files of the best on the validation data, and
    seeds.json.

    Returns {"valid": metrics, "test": metrics, "train": how training went}, of the best seed, and
    of several "seeds": {part: {metric: {"mean", "sd", "values"}}}; None for a dry run, which checks
    everything, tells what it would cost and keeps nothing, and on the other ranks.

    Raises: ConfigError, data.DataError, model.CheckpointError, TrainingError, InterruptedRunError;
    OSError where `out` can't be written or another run has it, or the disk is full.
    """
    import accelerate  # noqa: F401  where one lacks, no run should start
    import sklearn.metrics  # noqa: F401

    config.require("model", "train", "out")
    if config.seeds == 1 or dry_run:
        return _one(config, dry_run)
    return _several(config)


def _one(config, dry_run=False):
    main = int(os.environ.get("RANK", 0)) == 0
    say = outputs.say if main else lambda text: None
    out = Path(config.out)
    outputs.check(out, config.model, (config.train, config.valid, config.test))
    folder = checkpoint.resolve(config.model)
    if not config.fresh_weights:
        opening.verify(folder, config.allow_pickle)
    task = tasks.of(config)(config, choose_device(config.device), say)
    task.read()
    task.tokenizer = load_tokenizer(folder)
    torch.manual_seed(config.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task.model = model = task.build(folder)
    for w in caught:
        say(str(w.message))
    task.check(folder)
    for line in networks.unfused(model):
        say(f"note: {line}")
    networks.freeze(model, config.freeze_layers)
    if config.gradient_checkpointing:
        names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # the old one
        getattr(model, next(name for name in names if hasattr(model, name)))()
    task.count(model)
    report = task.report()
    say(str(report))
    task.rows = {name: task.encode(part) for name, part in task.parts.items()}
    if dry_run:
        steps = len(task.batches(0))
        rehearse(model, task, config, say)
        each = " of each seed" * (config.seeds > 1)
        say(f"dry run: {steps} batches an epoch{each} on {task.device}; nothing is kept")
        return None

    with locked(out) if main else nullcontext():
        if main:
            settings = out / outputs.RUN_CONFIG
            if not settings.exists():  # an older run's are its model's until there is another
                outputs.write_yaml(settings, config)
            outputs.write_json(out / "data_report.json", report.as_dict())
        fingerprint = _fingerprint(config, folder)
        inputs = _inputs(config, folder, fingerprint) if main else []
        outcome = train(model, task, config, out, fingerprint, say)
        task.model = networks.gathered(model, Ranks(config.parallel))
        if not main:
            return None
        saved = outputs.save(task.model, task.tokenizer, out)
        outputs.write_yaml(settings, config)
        results = _results(task, outcome, out, inputs)
        outputs.finish(out, saved, inputs)
        return results


def _fingerprint(config, folder) -> dict:
    """What must be the same when a run is resumed."""
    base = [p for name in _BASE if (p := folder / name).is_file()]
    base += [] if config.fresh_weights else checkpoint.files(folder, config.allow_pickle)
    given = {k: v for k, v in config.as_dict().items() if k not in _FREE}
    if given["split_seed"] is None:
        del given["split_seed"]
    for f in dataclasses.fields(config):  # checkpoints of before there was a setting go on
        if f.name in config.NEW and given[f.name] == f.default:
            del given[f.name]
    given |= {
        f"{k}_sha256": sha256(getattr(config, k)) for k in ("train", "valid") if getattr(config, k)
    }
    world = int(os.environ.get("WORLD_SIZE", 1))
    given |= {"ranks": world} if world > 1 else {}
    return given | {"model_sha256": {p.name: sha256(p) for p in base}}


def _inputs(config, folder, fingerprint) -> list[dict]:
    """The files that the run reads."""
    parts = [(name, path) for name in PARTS if (path := getattr(config, name))]
    found = [entry(name, path, fingerprint.get(f"{name}_sha256")) for name, path in parts]
    sums = fingerprint["model_sha256"]
    names = [*sums, *(name for name in _TOKENIZERS if (folder / name).is_file())]
    return found + [entry("model", folder / name, sums.get(name)) for name in names]


def _results(task, outcome, out: Path, inputs) -> dict:
    """Evaluates the trained model, and writes the figures of the run."""
    found = {"valid": task.outputs("valid", task.model)}
    task.decision = task.tune(found["valid"])
    if task.decision:  # without which the model answers otherwise
        outputs.write_json(out / outputs.DECISION, task.decision)
    if "test" in task.parts:
        found["test"] = task.outputs("test", task.model)
    results = {"train": outcome} | {name: task.figures(name, own) for name, own in found.items()}
    results |= task.results(outcome)
    with outputs.optional(out / "eval_results.json") as path:
        outputs.write_json(path, results)
    with outputs.optional(out / "README.md") as path:
        _write_card(path, task, results, inputs)
    with outputs.optional(out / "training_curve.png") as path:
        plots.training_curve(out / "metrics.jsonl", task.config.metric or "loss", path)
    task.draw(out, found, results)
    return results


def _step_size(config) -> str:
    if config.batch_tokens is None:
        return f"{config.batch_size * config.accumulation}"
    return f"up to {config.batch_tokens * config.accumulation:,} tokens"


def _write_card(path, task, results, inputs):
    config, score = task.config, results.get("test") or results["valid"]
    figures = "\n".join(f"| {k} | {v:.4f} |" for k, v in score.items() if isinstance(v, float))
    text = f"""---
library_name: transformers
pipeline_tag: {task.pipeline_tag}
---
# {path.resolve().parent.name}

`{Path(config.model).name}` {FINETUNED} on {len(task.rows["train"]):,} examples ({config.kind}),
{results["train"]["step"]} steps of {_step_size(config)}, learning rate
{config.lr:g}, seed {config.seed}. Settings: `run_config.yaml`; data: `data_report.json`.

{task.card()}

| {"test" if "test" in results else "validation"} | |
| --- | --- |
{figures}
"""
    card.put(path, text + card.ending(results["train"]["cost"], inputs))


def _several(config):
    """A run for each seed; of the best one the files are linked in `out`."""
    out, found = Path(config.out), {}
    outputs.check(out, config.model, (config.train, config.valid, config.test))
    one = partial(dataclasses.replace, config, seeds=1, split_seed=config.seed)
    for seed in range(config.seed, config.seed + config.seeds):
        folder = out / f"seed-{seed}"
        results = _one(one(seed=seed, out=str(folder)))
        if results is not None:
            found[folder] = results
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # the next one's checkpoints are read when rank 0 is done
    if not found:
        return None
    sign = -1 if config.metric in LOWER_IS_BETTER else 1
    scores = {f: sign * r["valid"][config.metric] for f, r in found.items()}
    best = max(scores, key=lambda f: scores[f] if math.isfinite(scores[f]) else -math.inf)
    summary = {
        part: _spread([r[part] for r in found.values()])
        for part in ("valid", "test")
        if part in found[best]
    }
    outputs.bring(best, out)
    with outputs.optional(out / "README.md") as path:
        text = (best / path.name).read_text(encoding="utf-8")
        card.put(path, text.replace(f"# {best.name}", f"# {out.resolve().name}", 1))
    spent = together([r["train"]["cost"] for r in found.values() if "train" in r])
    outputs.write_json(out / "seeds.json", {"best": best.name, "cost": spent} | summary)
    made = read_manifest(best) or {"files": {}, "inputs": []}
    outputs.finish(out, made["files"], made["inputs"])
    return found[best] | {"seeds": summary}


def _spread(figures: list[dict]) -> dict:
    """Mean and standard deviation over runs of each metric that all have."""
    names = [
        k for k, v in figures[0].items() if isinstance(v, float) and all(k in f for f in figures)
    ]
    columns = {name: [f[name] for f in figures] for name in names}
    return {
        name: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)), "values": v}
        for name, v in columns.items()
    }
