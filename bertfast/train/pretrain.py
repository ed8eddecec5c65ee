"""Pre-training: masked language modelling, with or without next-sentence prediction."""

import math
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..data import DataError, masking
from ..data.errors import EmptyDataError
from ..data.sequences import Sequences
from ..data.shards import INDEX, Shards, read_index
from ..encoder.spec import LayerSpec
from ..files import locked, sha256
from ..model import BertForMaskedLM, BertForPreTraining, checkpoint
from ..model.config import CONFIG
from ..model.presets import bert_config
from ..model.tokenizer import load_tokenizer
from ..verify import entry
from . import card, outputs, plots
from .config import ConfigError, PretrainConfig, RunConfig
from .flops import LayerWork, Products
from .loop import train
from .networks import gathered
from .outputs import say
from .packed import IGNORED, Packed
from .ranks import Ranks
from .rehearse import rehearse
from .task import Task
from .tasks.base import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


# What may differ when a run is resumed; neither ranks nor accumulation change a step.
_FREE = {"out", "resume", "keep", "save_steps", "log_steps", "allow_pickle", "device"}
_FREE |= {"accumulation", "parallel", "data", "model", "config", "lexicon", "watts"}
_EVAL_BATCH = 8192  # tokens in a batch of an evaluation
_LOGIT_ROWS = 1024  # rows of logits that an evaluation holds at a time
_SAMPLES = 3
_RANDOM = (0.3, 0.8)  # share of random pairs that is like the paper's half


class PretrainTask(Task):
    """Packed, masked batches and their two losses."""

    def __init__(
        self,
        config: PretrainConfig,
        model_config: "PreTrainedConfig",
        train: Sequences,
        valid: Sequences | None,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        self.config, self.model_config, self.tokenizer = config, model_config, tokenizer
        self.train, self.valid = train, valid
        self.names = ("mlm_loss", "nsp_loss") if config.nsp else ("mlm_loss",)
        self.device = choose_device(config.device)
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.common = read_index(config.data)["statistics"]["most_frequent_token"]
        self.samples = []
        self.alike, self.exact = train.windows > 1, config.masking == "token"
        c = model_config
        heads = c.num_attention_heads
        sizes = c.hidden_size, heads, c.hidden_size // heads, c.intermediate_size
        layer = LayerWork.of(LayerSpec(*sizes, c.hidden_act, c.layer_norm_eps))
        self.products = Products([layer] * c.num_hidden_layers)

    def batches(self, part: int) -> list:
        self.window = self.train.window(part)
        parts = self.config.accumulation * self.world
        return self.train.steps(self.window, self.config.batch_tokens, parts)

    def steps(self, config: RunConfig, group: int) -> int:
        if config.max_steps is not None:
            return config.max_steps
        first = len(self.batches(0)) // group  # the other windows are alike
        return config.epochs * self.train.windows * first

    def load(self, chosen: Any) -> Packed:
        return self._packed(self.train.build(self.window, chosen))

    def _packed(self, batch):
        return Packed(*(torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in batch))

    def weight(self, batch: Packed) -> list[float]:
        sequences = len(batch.cu_seqlens) - 1
        targets = len(batch.labels)
        return [targets, sequences] if self.config.nsp else [targets]

    def tokens(self, batch: Packed) -> int:
        return len(batch.input_ids)

    def flops(self, batch: Packed) -> float:
        """Counted as computed: the head at the masked tokens only, the last layer's projections and
        feed-forward at those and at [CLS]."""
        return self._flops(np.diff(batch.cu_seqlens), len(batch.labels))

    def _flops(self, lengths, masked: int) -> float:
        h, vocabulary = self.model_config.hidden_size, self.model_config.vocab_size
        pairs = len(lengths) * self.config.nsp
        heads = masked * (h * h + h * vocabulary) + pairs * (h * h + 2 * h)
        return self.products.flops(lengths, 0, masked + pairs) + 6.0 * heads

    def work(self, batches: list) -> tuple[int, float]:
        lengths = self.window.lengths()[np.concatenate(batches)]
        words = lengths - (3 if self.config.nsp else 2)  # the rest is never hidden
        share = np.round(words * self.config.mask_share).astype(np.int64)  # as `masking.mask` does
        masked = int(np.maximum(share, np.minimum(words, 1)).sum())
        return int(lengths.sum()), self._flops(lengths, masked)

    def _hidden(self, model, batch):
        """(first tokens, where they are wanted; masked tokens) after the encoder: [n, hidden]."""
        sequences = len(batch.cu_seqlens) - 1 if self.config.nsp else 0
        rows = batch.positions
        if sequences:
            rows = torch.cat([batch.first, rows])
        hidden = model.bert.encode_packed(
            *(batch.input_ids, batch.cu_seqlens, batch.max_seqlen),
            *(batch.position_ids, batch.token_type_ids, rows),
        )
        return hidden[:sequences], hidden[sequences:]

    def loss(self, model: nn.Module, batch: Packed) -> torch.Tensor:
        """fp32 [1 or 2]: summed losses of the masked tokens and of the pairs."""
        first, masked = self._hidden(model, batch)
        mean = model.cls.predictions.loss(masked, batch.labels)
        losses = [mean.float() * (batch.labels != IGNORED).sum()]
        if self.config.nsp:
            relation = model.cls.seq_relationship(model.bert.pooler(first)).float()
            losses.append(F.cross_entropy(relation, batch.targets, reduction="sum"))
        return torch.stack(losses)

    def score(self, model: nn.Module, batch: Packed) -> torch.Tensor:
        """fp64 [7]: of masked tokens the loss, the right ones, those that the commonest token
        would get right, and their number; of pairs the loss, the right ones, their number."""
        first, masked = self._hidden(model, batch)
        found, loss, right = [], 0.0, 0
        for hidden, labels in zip(
            masked.split(_LOGIT_ROWS), batch.labels.split(_LOGIT_ROWS), strict=True
        ):
            logits = model.cls.predictions(hidden).float()
            loss += F.cross_entropy(logits, labels, reduction="sum").double()
            found.append(logits.argmax(1))
            right += (found[-1] == labels).sum()
        common = (batch.labels == self.common).sum()
        sums = [loss, right, common, len(batch.labels)]
        if self.config.nsp:
            relation = model.cls.seq_relationship(model.bert.pooler(first)).float()
            loss = F.cross_entropy(relation, batch.targets, reduction="sum")
            right = (relation.argmax(1) == batch.targets).sum()
            sums += [loss, right, len(relation)]
        if not self.samples:
            self.samples = self._samples(batch, torch.cat(found))
        return torch.tensor([float(s) for s in sums], dtype=torch.float64)

    def _samples(self, batch, found):
        """The first sequences as text, with [true word -> prediction] where a token is hidden."""
        out, ids = [], batch.input_ids.tolist()
        piece = self.tokenizer.convert_ids_to_tokens
        for start, end in zip(batch.cu_seqlens[:_SAMPLES], batch.cu_seqlens[1:], strict=False):
            words = piece(ids[start:end])
            inside = (batch.positions >= start) & (batch.positions < end)
            for p, true, guess in zip(
                batch.positions[inside], batch.labels[inside], found[inside], strict=True
            ):
                words[p - start] = f"[{piece(int(true))} -> {piece(int(guess))}]"
            out.append(" ".join(words).replace(" ##", ""))
        return out

    def evaluate(self, model: nn.Module, score: Callable) -> dict:
        """Losses, perplexity and accuracies of up to eval_tokens validation tokens, masked the
        same each time; what always saying the commonest token would score."""
        if self.valid is None:
            return {}
        ranks, window = Ranks(), self.valid.window(0)
        total = np.cumsum(window.lengths())
        last = max(1, int(np.searchsorted(total, self.config.eval_tokens)))
        cuts = np.unique(np.searchsorted(total[:last], np.arange(0, total[last - 1], _EVAL_BATCH)))
        batches = np.split(np.arange(last), cuts[cuts > 0])
        sums, self.samples = 0.0, []
        for chosen, factor in ranks.share(batches):
            batch = self._packed(self.valid.build(window, chosen)).to(self.device)
            sums = sums + factor * score(batch)
        ranks.sum(sums)
        sums = sums.tolist()
        loss = sums[0] / sums[3]
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 80.0)),
            "mlm_accuracy": sums[1] / sums[3],
            "unigram_accuracy": sums[2] / sums[3],
        }
        if self.config.nsp:
            metrics |= {"nsp_loss": sums[4] / sums[6], "nsp_accuracy": sums[5] / sums[6]}
        if ranks.rank == 0:
            for text in self.samples:
                say(f"  {text}")
        return metrics | {"samples": self.samples}


def _parts(config, words, lexicon, say) -> tuple[Sequences, Sequences | None]:
    """What is trained on and what is validated on, None where there is nothing."""
    options = {"length": config.length, "pairs": config.nsp, "kind": config.masking}
    options |= {"share": config.mask_share, "lexicon": lexicon}
    train_part = Sequences(Shards(config.data, "train"), words, seed=config.seed, **options)
    if config.nsp:
        _check_pairs(train_part, say)
    try:
        # The same validation whatever the run's seed, so that runs compare.
        valid_part = Sequences(Shards(config.data, "valid"), words, seed=0, **options)
        if config.nsp:
            _check_pairs(valid_part, say)
    except EmptyDataError as e:
        say(f"warning: nothing will be evaluated: {e}")
        return train_part, None
    return train_part, valid_part


def _check_pairs(part: Sequences, say) -> None:
    """DataError where all pairs to train on are random, or none is: they teach nothing. `say`
    hears of shares that are far from half, and of validation pairs."""
    share = float(part.window(0).random_next.mean())
    if _RANDOM[0] <= share <= _RANDOM[1]:
        return
    why = "documents are few or one: put blank lines between them"
    if share > _RANDOM[1]:
        why = (
            "too few documents have two sentences that fit into --length: do blank lines end each?"
        )
    found = f"{share:.0%} of the next-sentence pairs in {part.shards.folder} ({part.shards.part})"
    if share in (0.0, 1.0) and part.shards.part == "train":
        raise DataError(f"{found} are random, which teaches nothing: {why}; or give --no-nsp")
    say(f"warning: {found} are random, not half: {why}")


def _tokenizer(config):
    """The prepared folder's tokenizer; a checkpoint to go on from must have the same."""
    folder = Path(config.data) / "tokenizer"
    for name, expected in read_index(config.data)["tokenizer_sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise ConfigError(f"{folder / name} does not match its checksum; prepare the data anew")
    tokenizer = load_tokenizer(folder)
    if config.model and (Path(config.model) / "tokenizer_config.json").is_file():
        other = load_tokenizer(config.model)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"{config.data} was prepared with another vocabulary than {config.model} has: "
                f"prepare it with --tokenizer {config.model}"
            )
    return tokenizer


def _model(config, tokenizer):
    cls = BertForPreTraining if config.nsp else BertForMaskedLM
    torch.manual_seed(config.seed)
    if config.model:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = cls.from_pretrained(config.model, allow_pickle=config.allow_pickle)
        for w in caught:
            say(str(w.message))
        if model.config.vocab_size < len(tokenizer):
            raise ConfigError(
                f"{config.model} has a vocabulary of {model.config.vocab_size}, {config.data} one "
                f"of {len(tokenizer)}: prepare it with --tokenizer {config.model}"
            )
    else:
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        try:
            model_config = bert_config(config.config, **sizes)
        except ValueError as e:
            raise ConfigError(str(e)) from None
        model = cls(model_config)
    limit = model.config.max_position_embeddings
    if config.length > limit:
        raise ConfigError(f"length is {config.length}, the model takes up to {limit}")
    model.gradient_checkpointing_enable(config.gradient_checkpointing)
    return model


def pretrain(config: PretrainConfig, dry_run: bool = False) -> dict | None:
    """Pre-train a BERT on a prepared folder; `config.out` then holds a checkpoint as transformers
    reads it, with its tokenizer, README.md, run_config.yaml, metrics.jsonl, tensorboard/,
    training_curve.png, eval_results.json, checkpoints/ and last manifest.json, the hashes of all
    files but those of tensorboard/ and checkpoints/. The model comes first: a picture or figures
    that can't be written are a warning. Progress goes to stderr.

    Under torchrun the ranks share each step's sequences, and rank 0 writes.

    Returns {"valid": metrics, "train": how training went}; None for a dry run, which checks
    everything, tells what it would cost and keeps nothing.

    Raises: ConfigError, data.DataError, model.CheckpointError, TrainingError, InterruptedRunError;
    OSError where `out` can't be written or another run has it, or the disk is full.
    """
    config.require("data", "out")
    main = int(os.environ.get("RANK", 0)) == 0
    tell = say if main else lambda text: None
    out = Path(config.out)
    outputs.check(out, config.model)
    tokenizer = _tokenizer(config)
    words = masking.vocabulary(tokenizer)
    lexicon = None
    if config.lexicon:
        lexicon = masking.Lexicon(config.lexicon, tokenizer, words.inner)
    train_part, valid_part = _parts(config, words, lexicon, tell)
    model = _model(config, tokenizer)
    task = PretrainTask(config, model.config, train_part, valid_part, tokenizer)
    parts = config.accumulation * task.world
    steps = task.steps(config, parts)
    size = sum(p.numel() for p in model.parameters())
    tell(
        f"{size:,} parameters, {train_part.shards.tokens:,} training tokens, {steps} steps of up "
        f"to {config.batch_tokens:,} tokens on {task.world} x {task.device.type}"
    )
    if dry_run:
        rehearse(model, task, config, tell)
        tell("dry run: nothing is kept")
        return None

    fingerprint = {k: v for k, v in config.as_dict().items() if k not in _FREE}
    fingerprint |= {
        "index_sha256": sha256(Path(config.data) / "index.json"),
        "lexicon_sha256": sha256(config.lexicon) if config.lexicon else None,
        "model": model.config.to_diff_dict(),
        "start": _start(config),
    }
    with locked(out) if main else nullcontext():
        if main:
            outputs.write_yaml(out / "run_config.yaml", config)
            inputs = _inputs(config)
        outcome = train(model, task, config, out, fingerprint, tell)
        results = {"train": outcome, "valid": outcome.pop("last") or {}}
        results["valid"].pop("samples", None)
        plain = gathered(model, Ranks(config.parallel))
        if main:
            saved = outputs.save(plain, tokenizer, out)
            with outputs.optional(out / "eval_results.json") as path:
                outputs.write_json(path, results)
            with outputs.optional(out / "training_curve.png") as path:
                plots.training_curve(out / "metrics.jsonl", "mlm_accuracy", path)
            with outputs.optional(out / "README.md") as path:
                card.pretrained(path, config, results, inputs)
            outputs.finish(out, saved, inputs)
    return results


def _inputs(config) -> list[dict]:
    """The files of the run; the hashes of shards and tokenizer are those that the index has, which
    they were held against when they were read."""
    index, data = read_index(config.data), Path(config.data)
    found = [entry("data", data / INDEX)]
    sums = index["tokenizer_sha256"].items()
    found += [entry("tokenizer", data / "tokenizer" / name, one) for name, one in sums]
    for part, shards in index["shards"].items():
        found += [entry(part, data / n, one) for e in shards for n, one in e["sha256"].items()]
    if config.lexicon:
        found.append(entry("lexicon", config.lexicon))
    if config.model:
        folder = checkpoint.resolve(config.model)
        files = [folder / CONFIG, *checkpoint.files(folder, config.allow_pickle)]
        found += [entry("model", path) for path in files]
    return found


def _start(config):
    """What the first weights were: the checksums of a checkpoint gone on from."""
    if not config.model:
        return config.seed
    folder = checkpoint.resolve(config.model)
    return [sha256(p) for p in checkpoint.files(folder, config.allow_pickle)]
