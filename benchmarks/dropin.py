"""The drop-in: the same MiniLM objects before and after `bertfast.accelerate`, fp32, same CPU.

    python benchmarks/dropin.py [--rounds 5] [--steps 12]

SentenceTransformer.encode of 256 sentences, CrossEncoder.predict of 128 pairs, and a step of
transformers' Trainer (batches of 32 texts of natural lengths, padded by its collator; dropout as
in the checkpoint), of all weights and of peft's LoRA alone (r 8, query and value). A step of
question answering on such a batch, whose softmax reads the padding: as the stock model computes it,
and with padding="zeros", which is another loss. The text is the standard library's docstrings. The
rival is the untouched model with SDPA. Outputs, and the gradients of every parameter, are compared
first.
"""

import argparse
import copy
import re
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import peft
import torch
import transformers
from harness import minilm, real_batch, real_text, save
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch.optim.optimizer import register_optimizer_step_post_hook

import bertfast
from bertfast.bench.measure import interleave, median, natural_lengths

TOLERANCE = 2e-5
BATCH = 32
LORA_DROPOUT = 0.0, 0.05


def sentences(count: int) -> list[str]:
    """Of the standard library's documentation, 20 to 500 characters each."""
    found = re.split(r"(?<=[.!?])\s+", real_text())
    found = [s for s in dict.fromkeys(found) if 20 <= len(s) <= 500]
    if len(found) < count:
        raise SystemExit(f"this Python's docstrings have {len(found)} sentences, needed {count}")
    return found[:count]


def accelerated(model):
    """A copy of `model`, accelerated; all of it, or nothing is measured."""
    ours = copy.deepcopy(model)
    bertfast.accelerate(ours, strict=True)
    return ours


def close(name, ours, theirs, tolerance=TOLERANCE) -> float:
    error = (torch.as_tensor(ours) - torch.as_tensor(theirs)).abs().max().item()
    if not error <= tolerance:
        raise SystemExit(f"{name} differ by {error:.1e}, at most {tolerance:.0e} expected")
    return error


def race(name, run, stock, rounds) -> dict:
    """Seconds and error of run(model), the stock model beside its accelerated copy."""
    ours = accelerated(stock)
    error = close(name, run(ours), run(stock))
    timed = interleave({"bertfast": lambda: run(ours), "rival": lambda: run(stock)}, rounds, 0)
    return {key: median(seconds) for key, seconds in timed.items()} | {"max_error": error}


def trainer(model, rows, tokenizer, steps, folder):
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-5,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return transformers.Trainer(model, arguments, data_collator=collate, train_dataset=rows)


def step_seconds(*setup) -> list[float]:
    """From one optimizer step's end to the next, the first two left out."""
    times = []
    run = trainer(*setup)
    hook = register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    run.train()
    hook.remove()
    return [b - a for a, b in pairwise(times[1:])]


def gradients(model, rows, tokenizer) -> list[torch.Tensor]:
    """Every parameter's, of one batch, dropout off."""
    batch = transformers.DataCollatorWithPadding(tokenizer)(rows[:BATCH])
    model.zero_grad()
    model.eval()(**batch).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def fine_tuning(rounds, steps, lora: peft.LoraConfig | None = None) -> dict:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    batch = real_batch(tokenizer, natural_lengths(BATCH * steps))
    rows = [
        {"input_ids": ids[: sum(mask)], "labels": i % 4}
        for i, (ids, mask) in enumerate(
            zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        )
    ]
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=4, attn_implementation="sdpa"
    )
    if lora is not None:
        torch.manual_seed(0)
        stock = peft.get_peft_model(stock, lora)
    ours = accelerated(stock)
    theirs_found, ours_found = (gradients(m, rows, tokenizer) for m in (stock, ours))
    whole = torch.stack([g.norm() for g in theirs_found]).norm()
    error = max(
        ((a - e).norm() / (e.norm() + 1e-2 * whole)).item()  # a key's bias has rounding alone
        for a, e in zip(ours_found, theirs_found, strict=True)
    )
    close("gradients", error, 0.0, 1e-4)
    seconds = {"bertfast": [], "rival": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            sides = [("bertfast", ours), ("rival", stock)]
            for name, model in reversed(sides) if i % 2 else sides:
                setup = (copy.deepcopy(model), rows, tokenizer, steps, folder)
                seconds[name] += step_seconds(*setup)
    return {name: median(s) for name, s in seconds.items()} | {"max_error": error}


def question_answering(rounds) -> dict:
    """Forward and backward of one padded batch: {padding: its seconds beside the stock model's}."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    batch = dict(real_batch(tokenizer, natural_lengths(BATCH)))
    batch |= {
        "start_positions": torch.zeros(BATCH).long(),
        "end_positions": torch.ones(BATCH).long(),
    }
    stock = transformers.AutoModelForQuestionAnswering.from_pretrained(
        minilm(), attn_implementation="sdpa"
    ).eval()
    models = {"rival": stock}
    for padding in ("auto", "zeros"):
        models[padding] = copy.deepcopy(stock)
        bertfast.accelerate(models[padding], strict=True, padding=padding)

    def step(model):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    error = close("losses", step(models["auto"]), step(stock))
    runs = {name: lambda model=model: step(model) for name, model in models.items()}
    seconds = {name: median(s) for name, s in interleave(runs, rounds, 0).items()}
    return {
        padding: {"bertfast": seconds[padding], "rival": seconds["rival"], "max_error": e}
        for padding, e in (("auto", error), ("zeros", None))
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="Trainer steps a round, 3 or more")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.steps < 3:
        parser.error(f"--steps is {args.steps}, expected 3 or more")
    texts = sentences(256)
    pairs = [(texts[i], texts[-1 - i]) for i in range(128)]
    sdpa = {"attn_implementation": "sdpa"}
    finder = SentenceTransformer(minilm(), device="cpu", model_kwargs=sdpa)
    reranker = CrossEncoder(minilm(), num_labels=1, device="cpu", model_kwargs=sdpa)
    rows = {
        "SentenceTransformer.encode, 256 sentences": race(
            "embeddings", lambda m: m.encode(texts, show_progress_bar=False), finder, args.rounds
        ),
        "CrossEncoder.predict, 128 pairs": race(
            "scores", lambda m: m.predict(pairs, show_progress_bar=False), reranker, args.rounds
        ),
        f"transformers Trainer, a step of {BATCH} texts": fine_tuning(args.rounds, args.steps),
    }
    for p in LORA_DROPOUT:
        lora = peft.LoraConfig(
            task_type="SEQ_CLS",
            r=8,
            lora_dropout=p,
            target_modules=["query", "value"],
            init_lora_weights=False,  # or half of its gradients would be zeros
        )
        task = f"transformers Trainer, a LoRA step of {BATCH} texts, lora_dropout={p}"
        rows[task] = fine_tuning(args.rounds, args.steps, lora)
    for padding, row in question_answering(args.rounds).items():
        rows[f"question answering, a step of {BATCH} texts, padding={padding!r}"] = row
    summary = []
    for task, row in rows.items():
        ours, theirs = (1e3 * row[name] for name in ("bertfast", "rival"))
        print(f"{task}: {ours:.0f} ms, stock {theirs:.0f} ms: {theirs / ours:.2f}x", flush=True)
        if row["max_error"] is None:
            continue  # not the stock model's result: a cost to know, no race
        summary.append(
            {
                "task": f"drop-in MiniLM, fp32: {task}",
                "unit": "ms",
                "bertfast": round(ours, 2),
                "rival": round(theirs, 2),
                "rival_name": "the model before accelerate (SDPA)",
                "ratio": round(theirs / ours, 2),
            }
        )
    settings = {"model": "MiniLM", "rounds": args.rounds, "steps": args.steps, "batch": BATCH}
    save("dropin", {"settings": settings, "rows": rows, "summary": summary}, args.out)


if __name__ == "__main__":
    main()
