"""Translation: a BERT encoder and decoder trained by bertfast beside transformers' own, same CPU.

    python benchmarks/finetune_translate.py [--data FOLDER] [--size mini] [--steps 400] [--seeds 5]

English to French, Debian's package descriptions (en-fr.*.tsv.gz). Both begin with the same random
weights and see the same pairs in the same order, packed on both sides here, padded there, by one
loop and optimizer; transformers' loss is its Trainer's, with its label smoother. First, dropout
off, the losses of some steps must be equal. Then steps take turns and their medians are compared;
each model is trained on as many tokens and scored on the test rows by BLEU, chrF and the loss,
which scatters least; decoding takes turns on the first seed's weights, and its tokens are compared.
--only-decoding measures that again, of a model trained here alone, and keeps the rest of the result
that is there. Each seed draws weights, order and dropout, and is written when it is done: a later
call with the same settings goes on from there.
"""

import argparse
import copy
import random
import statistics
import tempfile
import time
import types
from pathlib import Path

import torch
import transformers
from harness import ROOT, interleave, interval, load, median, origin, save
from transformers.trainer_pt_utils import LabelSmoother

from bertfast import BertEncoderDecoder, data
from bertfast.data.config import PrepareConfig
from bertfast.data.prepare import prepare
from bertfast.model.presets import bert_config
from bertfast.model.tokenizer import load_tokenizer
from bertfast.model.translation_checkpoint import make_config
from bertfast.train.optimizer import learning_rate, make_optimizer
from bertfast.train.packed_pairs import Pairs
from bertfast.train.tasks.translate_inference import Search, encode_sources, scores, translated

TOLERANCE = 1e-4  # of a loss, relative, after some steps of AdamW
OPTIMIZER = {"optimizer": "adamw", "beta2": 0.98, "weight_decay": 0.01, "warmup": 0.1}
OPTIMIZER |= {"schedule": "linear"}


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "debian"
    parser.add_argument("--data", type=Path, default=default, help="folder of en-fr.*.tsv.gz")
    parser.add_argument("--tokenizer", type=Path, help="its folder (default: trained on the rows)")
    parser.add_argument("--vocab-size", type=int, default=16000, help="of the one to be trained")
    parser.add_argument("--size", default="mini", help="tiny, mini, small, base, or a config.json")
    parser.add_argument("--decoder-layers", type=int, help="the encoder's number where not given")
    parser.add_argument("--rows", type=int, help="first training rows (all)")
    parser.add_argument("--test-rows", type=int, default=1000, help="first test rows, for BLEU")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of both sides, in a step")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--loss-steps", type=int, default=10, help="without dropout, compared")
    parser.add_argument("--loss-batch-tokens", type=int, default=512, help="in each of them")
    parser.add_argument("--loss-lr", type=float, default=1e-4, help="larger ones part sooner")
    parser.add_argument("--rounds", type=int, default=5, help="of steps and of decoding, by turns")
    parser.add_argument("--decode-batch", type=int, default=32)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1, help="how many trainings of each")
    parser.add_argument("--only-decoding", action="store_true", help="see above")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(given)
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder; expected en-fr.*.tsv.gz in it")
    return args


def tokenizer_of(args, part, work: Path):
    """WordPiece of both languages, with upper case and accents."""
    if args.tokenizer:
        return load_tokenizer(args.tokenizer)
    corpus = work / "corpus.txt"
    corpus.write_text("\n\n".join([*part.sources, *part.targets]) + "\n", encoding="utf-8")
    options = {"min_words": 1, "similarity": 0.0, "boilerplate": 0.0, "lowercase": False}
    config = PrepareConfig([str(corpus)], str(work / "data"), vocab_size=args.vocab_size, **options)
    prepare(config, say=lambda text: None)
    return load_tokenizer(work / "data" / "tokenizer")


def encoded(tokenizer, part, longest):
    rows, _ = encode_sources(tokenizer, part.sources, longest)
    targets, _ = encode_sources(tokenizer, part.targets, longest + 1)
    for row, target in zip(rows, targets, strict=True):
        row["labels"] = target["input_ids"][1:]
    return rows


def padded(rows, pad):
    """As transformers' DataCollatorForSeq2Seq makes it."""
    given = data.collate([{"input_ids": r["input_ids"]} for r in rows], pad)
    labels = [torch.tensor(r["labels"]) for r in rows]
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return given["input_ids"], given["attention_mask"], labels


class Ours:
    name = "bertfast"

    def __init__(self, model, args):
        self.model, self.smoothing = model, args.label_smoothing

    def batch(self, rows):
        return Pairs.of_rows(rows, self.model.config.decoder_start_token_id)

    def loss(self, batch):
        total, count = self.model.loss_packed(*batch, self.smoothing)
        return total / count

    def generate(self, ids, mask, **options):
        return self.model.generate(ids, mask, **options)


class Theirs:
    name = "transformers"

    def __init__(self, model, args):
        self.model, self.smoother = model, LabelSmoother(args.label_smoothing)

    def batch(self, rows):
        return padded(rows, self.model.config.pad_token_id)

    def loss(self, batch):
        ids, mask, labels = batch
        inputs = self.model.prepare_decoder_input_ids_from_labels(labels)
        out = self.model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=inputs, use_cache=False
        )
        return self.smoother(out, labels)

    def generate(self, ids, mask, **options):
        options |= {"do_sample": False}
        with torch.inference_mode():
            return self.model.generate(ids, attention_mask=mask, **options)


def both(args, config, seed, **rates):
    """Ours and transformers' with the same random weights."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    for side in (config.encoder, config.decoder):
        for name, rate in rates.items():
            setattr(side, name, rate)
    ours = BertEncoderDecoder(config)
    stock = transformers.EncoderDecoderModel(copy.deepcopy(config))
    stock.load_state_dict(ours.state_dict())
    return Ours(ours, args), Theirs(stock, args)


class Training:
    """Steps of AdamW with clipping and a schedule, the same loop for both."""

    def __init__(self, side, args, steps):
        self.side, self.args, self.steps, self.done = side, args, steps, 0
        self.config = types.SimpleNamespace(lr=args.lr, **OPTIMIZER)
        self.optimizer = make_optimizer(side.model, self.config)
        side.model.train()

    def step(self, rows):
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.steps, self.config)
        loss = self.side.loss(self.side.batch(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.side.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.item()


def batches(rows, args, seed=0):
    """Lists of rows, epoch after epoch, in the order that `finetune` has."""
    lengths, epoch = [len(r["input_ids"]) + len(r["labels"]) for r in rows], 0
    while True:
        for chosen in data.batches(lengths, 1, seed, epoch, args.batch_tokens):
            yield [rows[i] for i in chosen]
        epoch += 1


def equal_losses(args, config, rows):
    """Losses of steps without dropout: SystemExit where they differ."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    few = {"batch_tokens": args.loss_batch_tokens, "lr": args.loss_lr}
    args = argparse.Namespace(**vars(args) | few)
    runs = [Training(side, args, args.loss_steps) for side in both(args, config, 0, **off)]
    found, given = [], batches(rows, args)
    for _ in range(args.loss_steps):
        chosen = next(given)
        found.append([run.step(chosen) for run in runs])
    worst = max(abs(a - b) / b for a, b in found)
    print(f"losses of {len(found)} steps without dropout: apart by {worst:.1e} at most", flush=True)
    if not worst < TOLERANCE:
        raise SystemExit(f"losses differ by {worst:.1e}, expected up to {TOLERANCE:.0e}: {found}")
    return {"losses": found, "largest_relative_difference": worst}


def step_seconds(args, sides, rows):
    """Median seconds of a step, taking turns on the same batches, and tokens in a second."""
    given = batches(rows, args)
    chosen = [next(given) for _ in range(3)]
    runs = {side.name: Training(side, args, 10**9) for side in sides}
    calls = {name: lambda run=run: [run.step(c) for c in chosen] for name, run in runs.items()}
    seconds = interleave(calls, args.rounds, warmup=1)
    tokens = sum(len(r["input_ids"]) + len(r["labels"]) for c in chosen for r in c)
    found = {name: median(values) for name, values in seconds.items()}
    print("steps:", {n: f"{tokens / s:,.0f} tokens/s" for n, s in found.items()}, flush=True)
    each = lambda s: {"step_seconds": s / len(chosen), "tokens_per_second": tokens / s}
    return {name: each(s) for name, s in found.items()}


def trained(args, side, rows, seed=0):
    """Trains on `steps` batches; the training's seconds, tokens and losses."""
    run, given = Training(side, args, args.steps), batches(rows, args, seed)
    losses, tokens = [], 0
    torch.manual_seed(seed)
    start = time.perf_counter()
    for i in range(args.steps):
        chosen = next(given)
        tokens += sum(len(r["input_ids"]) + len(r["labels"]) for r in chosen)
        losses.append(run.step(chosen))
        if i % 50 == 49:
            print(f"{side.name}: step {i + 1}, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    side.model.eval()
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "losses": losses}


def quality(args, tokenizer, side, model, part, rows):
    """BLEU, chrF and the loss (per token, not smoothed) of a side's weights, which `model`, ours,
    takes: transformers decodes the same tokens, and takes longer."""
    model.load_state_dict(side.model.state_dict())
    model.eval()
    found = {"loss": token_loss(model, rows)}
    for name, beams in (("greedy", 1), ("beam", args.beams)):
        search = Search(beams, 1.0, args.max_length)
        texts = [text for text, _ in translated(model, tokenizer, rows, search, scored=False)]
        figures = scores(tokenizer, texts, part.targets)
        found |= {name if k == "bleu" else f"{name}_{k}": figures[k] for k in ("bleu", "chrf")}
    print(f"{side.name}: {found}", flush=True)
    return found | {"examples": texts[:5]}


@torch.inference_mode()
def token_loss(model, rows):
    start = model.config.decoder_start_token_id
    found = [
        [float(v) for v in model.loss_packed(*Pairs.of_rows(rows[i : i + 32], start))]
        for i in range(0, len(rows), 32)
    ]
    return sum(total for total, _ in found) / sum(count for _, count in found)


def one_seed(args, config, tokenizer, parts, rows, seed):
    """Both sides, trained and scored, and their figures."""
    sides, keeper, row = both(args, config, seed), BertEncoderDecoder(config), {"seed": seed}
    for side in sides:
        row[side.name] = trained(args, side, rows["train"], seed)
        row[side.name] |= quality(args, tokenizer, side, keeper, parts["test"], rows["test"])
    return row, sides


def decoding(args, sides, rows, ends):
    """Seconds of greedy and beam search by turns on the same weights, and whether their tokens are
    the same."""
    ours, stock = sides
    stock.model.load_state_dict(ours.model.state_dict())
    for side in sides:
        side.model.eval()
    r = random.Random(0)
    chosen = [r.sample(rows, min(args.decode_batch, len(rows))) for _ in range(3)]
    given = [padded(c, ours.model.config.pad_token_id)[:2] for c in chosen]
    found = {}
    for name, beams in (("greedy", 1), ("beam", args.beams)):
        options = {"num_beams": beams, "max_new_tokens": args.max_length}
        made = {s.name: [s.generate(*g, **options) for g in given] for s in sides}
        own, theirs = ([row for m in made[s.name] for row in cut(m, ends)] for s in sides)
        same = sum(a == b for a, b in zip(own, theirs, strict=True))
        calls = {s.name: lambda s=s: [s.generate(*g, **options) for g in given] for s in sides}
        seconds = {n: median(v) for n, v in interleave(calls, args.rounds, warmup=0).items()}
        ratio = seconds[stock.name] / seconds[ours.name]
        lengths = [len(row) - 1 for row in own]
        found[name] = {"seconds": seconds, "ratio": round(ratio, 2), "same": same, "of": len(own)}
        found[name] |= {"mean_length": sum(lengths) / len(lengths), "longest": max(lengths)}
        print(f"{name}: {ratio:.2f}x, {same} of {len(own)} the same tokens", flush=True)
    return found


def cut(sequences, ends):
    for row in sequences.tolist():
        end = next((i + 1 for i, token in enumerate(row[1:], 1) if token in ends), len(row))
        yield row[:end]


def main(given=None):
    args = arguments(given)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as work:
        paths = {p: args.data / f"en-fr.{p}.tsv.gz" for p in ("train", "test")}
        parts = {p: data.load_translations(path) for p, path in paths.items()}
        limits = {"train": args.rows, "test": args.test_rows}
        parts = {n: p.select(range(min(limits[n] or len(p), len(p)))) for n, p in parts.items()}
        tokenizer = tokenizer_of(args, parts["train"], Path(work))
    rows = {n: encoded(tokenizer, p, args.max_length) for n, p in parts.items()}
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), args.dropout)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = make_config(
        bert_config(args.size, **sizes, **rates),
        decoder_start_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_layers=args.decoder_layers,
        tie_embeddings=False,  # as transformers trains it
    )
    if args.only_decoding:
        decoding_again(args, config, rows, {tokenizer.sep_token_id})
        return
    once = ("seeds", "only_decoding", "out")
    settings = {k: v for k, v in vars(args).items() if k not in once}
    settings |= {k: v and Path(v).name for k, v in settings.items() if k in ("data", "tokenizer")}
    result = load("finetune_translate", args.out) or {}
    if result.get("settings") != settings:
        result = {"settings": settings, "decoding": {}, "runs": []}
        result["equal_losses"] = equal_losses(args, config, rows["train"])
        result["steps"] = step_seconds(args, both(args, config, 0), rows["train"])
    for seed in range(len(result["runs"]), args.seeds):
        row, sides = one_seed(args, config, tokenizer, parts, rows, seed)
        result["runs"].append(row)
        if not result["decoding"]:
            result["decoding"] = decoding(args, sides, rows["test"], {tokenizer.sep_token_id})
        write(args, result)


def write(args, result):
    runs, figures = result["runs"], ("loss", "greedy", "beam", "beam_chrf")
    if len(runs) > 1:  # one has no spread
        result["quality"] = {key: interval(runs, key) for key in figures}
        print(result["quality"], flush=True)
    save("finetune_translate", result | {"summary": summary(args, result)}, args.out)


def decoding_again(args, config, rows, ends):
    """Into the result that is there, with a commit of its own."""
    result = load("finetune_translate", args.out)
    if "runs" not in (result or {}):
        raise SystemExit("--only-decoding: no finetune_translate.json is there; run it whole first")
    sides = both(args, config, 0)
    trained(args, sides[0], rows["train"])
    result["decoding"] = decoding(args, sides, rows["test"], ends)
    result["decoding_again"] = {"steps": args.steps} | {k: origin()[k] for k in ("commit", "date")}
    write(args, result)


def summary(args, result):
    of = f"encoder and decoder, BERT {args.size}, en-fr, fp32"
    step = {n: 1e3 * s["step_seconds"] for n, s in result["steps"].items()}
    rows = [(f"training step, {args.batch_tokens} tokens, {of}", "ms", step)]
    for name, found in result["decoding"].items():
        beams = "greedy" if name == "greedy" else f"{args.beams} beams"
        task = f"translating 3 x {args.decode_batch} texts, {beams}, {of}"
        rows.append((task, "ms", {n: 1e3 * s for n, s in found["seconds"].items()}))
    of_seeds = f"mean of {len(result['runs'])} seeds, {of}"
    for name, key in (("bleu", "beam"), ("chrf", "beam_chrf")):
        sides = ("bertfast", "transformers")
        values = {side: statistics.fmean(r[side][key] for r in result["runs"]) for side in sides}
        task = f"test {name} after {args.steps} steps, {args.beams} beams, {of_seeds}"
        rows.append((task, "", values))
    return [
        {
            "task": task,
            "unit": unit,
            "bertfast": round(values["bertfast"], 3),
            "rival": round(values["transformers"], 3),
            "rival_name": "transformers EncoderDecoderModel",
            "ratio": round(values["transformers"] / values["bertfast"], 2) if unit else None,
        }
        for task, unit, values in rows
    ]


if __name__ == "__main__":
    main()
