"""Pre-training on real text: speed beside transformers' Trainer, and what a short run learns.

    python benchmarks/pretrain.py speed [--steps 30] [--rounds 2]
    python benchmarks/pretrain.py learn [--minutes 15]

`speed`: the same model (4 layers, hidden 256) on the same documents with masked language modelling.
The Trainer uses DataCollatorForLanguageModeling twice: on the same sequences, padded; and on text
joined and cut into full blocks, as run_mlm.py does, which wastes no padding but lets a block's
documents see each other. Before timing, our packed loss is checked against transformers' padded
model with the same weights and masks. A side's figure is real tokens over the time from one
optimizer step's end to the next, taken by the same hook on torch's optimizers; the sides take
turns, and the first steps of each turn don't count.

`learn`: pre-trains for some minutes in bf16, then fine-tunes on the first rows of
sections.*.jsonl.gz from those weights and from random ones of the same size.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from finetune_sections import read, step_times
from harness import ROOT, save

from bertfast.bench.measure import median
from bertfast.data import masking
from bertfast.data.prepare import PrepareConfig, prepare
from bertfast.data.sequences import Sequences
from bertfast.data.shards import Shards
from bertfast.model import BertForMaskedLM
from bertfast.model.presets import bert_config
from bertfast.train import ClassifyConfig, PretrainConfig, finetune, pretrain
from bertfast.train.pretrain import PretrainTask, _model, _tokenizer

SKIP = 5  # steps at a turn's start
TOLERANCE = 1e-5  # of the losses, relative
LENGTH = 128


def prepared(corpus: Path, folder: Path, vocabulary: int) -> tuple[Path, dict]:
    """The folder of shards, and what `prepare` says of them."""
    files = {p: [str(corpus / f"corpus.{p}.txt.gz")] for p in ("train", "val")}
    config = PrepareConfig(
        corpus=files["train"],
        valid_corpus=files["val"],
        out=str(folder),
        vocab_size=vocabulary,
    )
    return folder, prepare(config)


def settings(data: Path, out: Path, **changes) -> PretrainConfig:
    base = {"config": "mini", "nsp": False, "length": LENGTH, "resume": "no", "lr": 1e-3}
    return PretrainConfig(data=str(data), out=str(out), **(base | changes))


def padded(batch, pad: int) -> dict[str, torch.Tensor]:
    """A packed batch as transformers takes it: input_ids, attention_mask, labels."""
    lengths = np.diff(batch.cu_seqlens)
    mask = np.arange(batch.max_seqlen) < lengths[:, None]
    ids, labels = np.full(mask.shape, pad), np.full(mask.shape, -100)
    ids[mask] = batch.input_ids
    flat = np.full(len(batch.input_ids), -100)
    flat[batch.positions] = batch.labels
    labels[mask] = flat
    found = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}
    return {name: torch.from_numpy(values) for name, values in found.items()}


def check_losses(data: Path, out: Path) -> float:
    """The largest relative difference of our loss from transformers' at equal masks."""
    config = settings(data, out, batch_tokens=4096, max_steps=1)
    tokenizer = _tokenizer(config)
    train = Sequences(Shards(data, "train"), masking.vocabulary(tokenizer), length=LENGTH)
    model = _model(config, tokenizer).eval()
    task = PretrainTask(config, model.config, train, None, tokenizer)
    theirs = transformers.BertForMaskedLM(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    worst = 0.0
    for chosen in task.batches(0)[:4]:
        batch = task.load(chosen)
        with torch.no_grad():
            ours = float(task.loss(model, batch)[0]) / len(batch.labels)
            arguments = padded(train.build(task.window, chosen), tokenizer.pad_token_id)
            expected = float(theirs(**arguments).loss)
        worst = max(worst, abs(ours - expected) / expected)
    if not worst < TOLERANCE:
        raise SystemExit(f"losses differ from transformers' by {worst:.1e}")
    return worst


def run_bertfast(data: Path, out: Path, args) -> tuple[list[float], list[int]]:
    """Seconds and tokens of each counted step."""
    config = settings(
        data, out, max_steps=args.steps, batch_tokens=args.batch_tokens, eval_steps=10**6,
        save_steps=None, eval_tokens=1000, device="cpu",
    )  # fmt: skip
    with step_times() as times:
        pretrain(config)
    with open(out / "metrics.jsonl", encoding="utf-8") as f:
        seen = [r["tokens_seen"] for r in map(json.loads, f) if "loss" in r]
    return np.diff(times)[SKIP:].tolist(), np.diff(seen)[SKIP:].tolist()


def rows(data: Path, blocks: bool) -> list[dict]:
    """The corpus as a list of sequences: the documents' runs, or full blocks of joined text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(data / "tokenizer")
    sequences = Sequences(Shards(data, "train"), masking.vocabulary(tokenizer), length=LENGTH)
    window = sequences.window(0)
    cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    runs = [window.tokens[a:b].tolist() for a, b in window.first]
    if blocks:
        text = [t for run in runs for t in run + sep]
        size = LENGTH - 2
        runs = [text[i : i + size] for i in range(0, len(text) - size, size)]
    return [{"input_ids": cls + run + sep} for run in runs]


def run_trainer(data: Path, dataset, out: Path, args) -> tuple[list[float], list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(data / "tokenizer")
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    tokens = []

    def collate(batch):
        tokens.append(sum(len(r["input_ids"]) for r in batch))
        return collator(batch)

    config = bert_config("mini", vocab_size=len(tokenizer))
    network = transformers.BertForMaskedLM._from_config(config, attn_implementation="sdpa")
    mean = np.mean([len(r["input_ids"]) for r in dataset])
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=args.steps,
        per_device_train_batch_size=max(1, round(args.batch_tokens / mean)),
        learning_rate=1e-3,
        warmup_steps=round(0.05 * args.steps),
        weight_decay=0.01,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(network, arguments, train_dataset=dataset, data_collator=collate)
    with step_times() as times:
        trainer.train()
    # The loader is a batch ahead of the steps at most: count those that were trained on.
    return np.diff(times)[SKIP:].tolist(), tokens[1 : len(times)][SKIP:]


def speed(args):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data, statistics = prepared(args.data, work / "data", args.vocabulary)
        error = check_losses(data, work / "check")
        datasets = {"Trainer, padded": rows(data, False), "Trainer, full blocks": rows(data, True)}
        sides = {"bertfast": lambda out: run_bertfast(data, out, args)}
        for name, dataset in datasets.items():
            sides[name] = lambda out, d=dataset: run_trainer(data, d, out, args)
        rates = {name: [] for name in sides}
        for turn in range(args.rounds):
            for name in sorted(sides, reverse=bool(turn % 2)):
                seconds, tokens = sides[name](work / f"{turn}-{name}")
                rates[name].append(sum(tokens) / sum(seconds))
                print(f"round {turn} {name}: {rates[name][-1]:,.0f} tokens/s", flush=True)
    found = {name: median(values) for name, values in rates.items()}
    summary = [
        {
            "task": f"pre-training, BERT mini (4 layers, hidden 256, {args.vocabulary:,} words), "
            f"MLM at {LENGTH}, fp32",
            "unit": "s a million tokens",
            "bertfast": 1e6 / found["bertfast"],
            "rival": 1e6 / rate,
            "rival_name": f"transformers {name}",
            "ratio": round(found["bertfast"] / rate, 2),
        }
        for name, rate in found.items()
        if name != "bertfast"
    ]
    for row in summary:
        print(f"{row['ratio']:.2f}x {row['rival_name']}")
    keys = ("train", "valid", "mb_per_second", "seconds")
    result = {"settings": {"steps": args.steps, "rounds": args.rounds, "length": LENGTH}}
    result["settings"] |= {"batch_tokens": args.batch_tokens, "vocabulary": args.vocabulary}
    result |= {"tokens_per_second": rates, "loss_error": error}
    result |= {"prepare": {k: statistics[k] for k in keys}, "summary": summary}
    save("pretrain_speed", result, args.out)


def macro_f1(model: Path, files: dict, work: Path, seed: int) -> float:
    """On the test rows of the sections, after fine-tuning from the weights in `model`."""
    config = ClassifyConfig(
        model=str(model), out=str(work), epochs=3, lr=5e-4, resume="no", seed=seed,
        train=files["train"], valid=files["val"], test=files["test"], metric="macro_f1",
    )  # fmt: skip
    return finetune(config)["test"]["macro"]["f1"]


def pretrained(args, work: Path, folder: Path) -> dict:
    """Pre-train into `folder` for some minutes, unless that was done before: the facts of it."""
    facts = folder / "benchmark.json"
    asked = {k: vars(args)[k] for k in ("minutes", "steps", "vocabulary", "batch_tokens")}
    if facts.exists():
        found = json.loads(facts.read_text())
        if found["asked"] != asked:
            raise SystemExit(f"--run {folder} was made with {found['asked']}, not {asked}")
        return found
    data, _ = prepared(args.data, work / "data", args.vocabulary)
    # Dropout keeps from overfitting; in a run of a few passes there is little to overfit.
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert_config("mini", **still).to_json_file(work / "mini.json")
    common = {"config": str(work / "mini.json"), "batch_tokens": args.batch_tokens}
    common |= {"save_steps": None, "eval_tokens": 50_000, "beta2": 0.98, "precision": "bf16"}
    with step_times() as times:
        pretrain(settings(data, work / "probe", max_steps=20, eval_steps=10**6, **common))
    seconds = median(np.diff(times))
    steps = args.steps or max(50, int(0.95 * args.minutes * 60 / seconds))
    begin = time.perf_counter()
    options = common | {"max_steps": steps, "eval_steps": max(1, steps // 12)}
    valid = pretrain(settings(data, folder, **options))["valid"]
    minutes = round((time.perf_counter() - begin) / 60, 2)
    found = {"asked": asked, "minutes": minutes, "steps": steps, "valid": valid}
    facts.write_text(json.dumps(found))
    return found


def fine_tuned(args, work: Path, models: dict[str, Path], rows: int) -> dict[str, list[float]]:
    """Test macro F1 of each model, seed by seed, after the first `rows` of the training part."""
    parts = {p: read(args.data / f"sections.{p}.jsonl.gz", None) for p in ("train", "val", "test")}
    parts["train"] = parts["train"][: rows or None]
    known, files = {r["label"] for r in parts["train"]}, {}
    for part, table in parts.items():
        files[part] = str(work / f"{part}.jsonl")
        lines = (json.dumps(r) + "\n" for r in table if r["label"] in known)
        Path(files[part]).write_text("".join(lines))
    scores = {}
    for name, model in models.items():
        scores[name] = [macro_f1(model, files, work / f"{name}-{s}", s) for s in args.seeds]
        print(f"{rows or 'all'} rows, {name}: test macro F1 {scores[name]}", flush=True)
    return scores


def learn(args):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        folder, random = args.run or work / "pretrained", work / "random"
        found = pretrained(args, work, folder)
        valid = found["valid"]
        ratio = valid["mlm_accuracy"] / valid["unigram_accuracy"]
        print(f"{found['minutes']} minutes: {valid}, {ratio:.2f}x a unigram model", flush=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(0)
        BertForMaskedLM(transformers.BertConfig.from_pretrained(folder)).save_pretrained(random)
        tokenizer.save_pretrained(random)
        models = {"pretrained": folder, "random": random}
        scores = {str(rows or "all"): fine_tuned(args, work, models, rows) for rows in args.rows}
    row = {"unit": "", "ratio": None}
    summary = [
        {
            "task": f"masked-token accuracy after {found['minutes']:.0f} minutes of pre-training, "
            "BERT mini",
            "bertfast": valid["mlm_accuracy"],
            "rival": valid["unigram_accuracy"],
            "rival_name": "commonest token",
        }
    ]
    for rows, by_model in scores.items():
        means = {name: float(np.mean(values)) for name, values in by_model.items()}
        summary.append(
            {
                "task": f"test macro F1 on sections after it, {rows} training rows, mean of "
                f"{len(args.seeds)} seeds",
                "bertfast": means["pretrained"],
                "rival": means["random"],
                "rival_name": "same size from random weights",
            }
        )
    result = found | {"macro_f1": scores, "summary": [s | row for s in summary]}
    save("pretrain_learn", result, args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("speed", "learn"):
        command = commands.add_parser(name)
        default = ROOT.parent / "shared" / "data" / "debian"
        command.add_argument("--data", type=Path, default=default, help="folder of corpus.*.txt.gz")
        command.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
        command.add_argument("--steps", type=int, default=30 if name == "speed" else None)
        vocabulary = 30522 if name == "speed" else 8192  # BERT's; and one that 20 MB can fill
        command.add_argument("--vocabulary", type=int, default=vocabulary)
        command.add_argument("--batch-tokens", type=int, default=4096 if name == "speed" else 2048)
        if name == "speed":
            command.add_argument("--rounds", type=int, default=2)
        else:
            command.add_argument("--minutes", type=float, default=15)
            rows = "first training rows of sections to fine-tune on, 0 for all"
            command.add_argument("--rows", type=int, nargs="+", default=[3000], help=rows)
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            run = "folder that keeps the pre-trained model; one that is there is taken"
            command.add_argument("--run", type=Path, help=run)
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder; expected corpus.*.txt.gz in it")
    transformers.logging.set_verbosity_error()
    speed(args) if args.command == "speed" else learn(args)


if __name__ == "__main__":
    main()
