"""Settings of a run, from Python, a YAML file or the command line."""

import dataclasses
import math
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..arguments import nearest
from ..data.errors import ConfigError
from ..data.masking import KINDS
from ..files import StrPath

METRICS = {  # of classification, the first by default
    "single_label": ("macro_f1", "accuracy", "micro_f1", "loss"),
    "multi_label": ("micro_f1", "macro_f1", "accuracy", "loss"),
    "regression": ("mse", "mae", "pearson", "r2", "loss"),
}
LOWER_IS_BETTER = {"loss", "mse", "mae"}
MAX_WEIGHT = 1e30  # of a class: float32 holds sums of it
CHOICES = {
    "task": tuple(METRICS),
    "head": ("auto", "fresh", "keep"),
    "schedule": ("linear", "cosine", "constant"),
    "goal": ("similarity", "ranking"),
    "precision": ("fp32", "bf16"),
    "optimizer": ("adamw", "lamb"),
    "parallel": ("ddp", "fsdp"),
    "masking": KINDS,
}


def setting(default: Any, text: str) -> Any:
    """A field that is an option too."""
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return field(**kind, metadata={"help": text})


@dataclass
class RunConfig:
    """What the training loop itself needs to know."""

    epochs: int = setting(3, "passes over the training data")
    max_steps: int | None = setting(None, "stop after so many optimizer steps")
    optimizer: str = setting("adamw", "lamb is for batches of thousands of sequences")
    lr: float = setting(5e-5, "peak learning rate")
    beta2: float = setting(0.999, "decay of the squared gradient's mean; lower suits short runs")
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises")
    schedule: str = setting("linear", "decay of the learning rate after the warm-up")
    weight_decay: float = setting(0.01, "decay of the weights, not on biases and LayerNorm")
    clip: float = setting(1.0, "gradient norm to clip to, 0 for none")
    accumulation: int = setting(1, "micro-batches in an optimizer step")
    precision: str = setting("fp32", "arithmetic; the weights stay in fp32")
    seed: int = setting(0, "seed of weights, dropout, order and split")
    patience: int | None = setting(None, "stop after so many evaluations without a better metric")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower")
    eval_steps: int | None = setting(None, "evaluate every N steps (default: every epoch)")
    save_steps: int | None = setting(None, "checkpoint every N steps too, not only on evaluation")
    keep: int = setting(2, "checkpoints to keep, besides that of the best evaluation")
    resume: str = setting("auto", "auto, no, or the folder of a checkpoint")
    parallel: str = setting("ddp", "under torchrun: ddp, or fsdp to share out the weights too")
    device: str | None = setting(None, "cpu or cuda (default: cuda where there is one)")
    watts: float | None = setting(
        None, "what the machines draw together, for the energy where no counter can be read"
    )
    metric: str | None = None  # what picks the weights kept at the end; None: the last

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.type is float:
                self._check(f.name, math.isfinite(getattr(self, f.name)), "a finite number")
        for name in ("epochs", "accumulation", "keep"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("max_steps", "patience", "save_steps", "eval_steps"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "1 or more")
        for name in ("weight_decay", "clip"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("lr", self.lr > 0, "above 0")
        good = self.watts is None or 0 < self.watts < math.inf
        self._check("watts", good, "a finite number above 0")
        self._check("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        self._check("beta2", 0 < self.beta2 < 1, "between 0 and 1")
        self._check("warmup", 0 <= self.warmup <= 1, "between 0 and 1")
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), CHOICES.get(f.name)
            if choices and value != f.default:
                self._check(f.name, value in choices, f"one of {', '.join(choices)}")

    def _check(self, name, good, expected):
        if not good:
            raise ConfigError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def as_dict(self) -> dict:
        kind = getattr(self, "kind", None)
        return ({"kind": kind} if kind else {}) | dataclasses.asdict(self)

    def require(self, *names: str) -> None:
        """ConfigError where one of these is not set, or what to resume is not there."""
        for name in names:
            if not getattr(self, name):
                raise ConfigError(f"{name} is not set: give --{name.replace('_', '-')}")
        folder = self.resume not in ("auto", "no") and Path(self.resume)
        self._check("resume", not folder or folder.is_dir(), "auto, no or a checkpoint's folder")


@dataclass
class FinetuneConfig(RunConfig):
    """What `finetune` does for any task; every field of a task's own kind of settings is also a
    command-line option and a YAML key."""

    kind: ClassVar[str] = ""  # the task's name
    metrics: ClassVar[tuple[str, ...]] = ("loss",)  # that may pick the best evaluation

    model: str = setting("", "folder or hub name of the pretrained checkpoint")
    train: str = setting("", "training data: .jsonl .csv .tsv .parquet, gzip'd or not")
    out: str = setting("", "folder for the model, metrics and checkpoints")
    valid: str | None = setting(None, "validation data (default: split off the training data)")
    test: str | None = setting(None, "test data (default: split off, where valid is too)")
    batch_size: int = setting(32, "examples in a micro-batch (of each process)")
    batch_tokens: int | None = setting(None, "tokens in a micro-batch, in place of batch_size")
    max_length: int = setting(128, "tokens a text is cut to")
    metric: str | None = setting(None, "what picks the best evaluation (default: by task)")
    head: str = setting(
        "auto", "fresh: a new one; keep: the checkpoint's; auto: that where its outputs fit"
    )
    freeze_layers: int | None = setting(None, "freeze the embeddings and the first N layers")
    seeds: int = setting(1, "runs, with seeds from `seed` on: figures are means, the best is kept")
    allow_pickle: bool = setting(False, "read pickled weights (weights_only)")
    split_seed: int | None = None  # of the parts that are split off; None: `seed`

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "max_length", "seeds"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("train", "valid", "test"):
            self._check(name, getattr(self, name) != "-", "a file, which a resumed run reads again")
        tokens = self.batch_tokens
        self._check("batch_tokens", tokens is None or tokens >= 1, "1 or more")
        by_size = tokens is not None and self.batch_size != type(self).batch_size
        self._check("batch_tokens", not by_size, f"none beside batch_size {self.batch_size}")
        one = self.seeds == 1 or self.resume in ("auto", "no")
        self._check("resume", one, "auto or no for several seeds, whose checkpoints are their own")
        known = self.known_metrics()
        self.metric = self.metric or known[0]
        self._check("metric", self.metric in known, f"one of {', '.join(known)}")

    def known_metrics(self) -> tuple[str, ...]:
        return self.metrics

    @property
    def fresh_weights(self) -> bool:
        """Whether `model` gives a tokenizer alone."""
        return False

    def check_weights(self, name: str) -> None:
        """Of classes or tags, as the loss takes them."""
        for label, weight in getattr(self, name).items():
            if not (isinstance(weight, int | float) and 0 <= weight <= MAX_WEIGHT):
                raise ConfigError(
                    f"{name}: {label} is {weight!r}, expected a number, 0 to {MAX_WEIGHT:g}"
                )


@dataclass
class PretrainConfig(RunConfig):
    """What `pretrain` does; every field is also a command-line option and a YAML key."""

    data: str = setting("", "folder that `bertfast prepare` made")
    config: str = setting("base", "size: tiny, mini, small, base, large, or a config.json")
    out: str = setting("", "folder for the model, metrics and checkpoints")
    model: str | None = setting(None, "checkpoint to go on from; its size and weights")
    allow_pickle: bool = setting(False, "read pickled weights (weights_only)")
    length: int = setting(128, "longest sequence in tokens")
    nsp: bool = setting(True, "sentence pairs and next-sentence prediction; else MLM only")
    masking: str = setting("token", "what is masked as one")
    mask_share: float = setting(0.15, "share of the tokens to predict")
    lexicon: str | None = setting(None, "phrases, one a line, for --masking entity")
    batch_tokens: int = setting(32768, "tokens in an optimizer step, over all ranks")
    epochs: int = setting(1, "passes over the corpus, where max_steps is not given")
    lr: float = setting(1e-4, "peak learning rate")
    warmup: float = setting(0.05, "share of the steps in which the learning rate rises")
    accumulation: int = setting(1, "parts a rank's share of a step is cut into")
    eval_steps: int | None = setting(500, "evaluate every N steps, and at the end")
    save_steps: int | None = setting(500, "checkpoint every N steps")
    log_steps: int = setting(50, "print a line every N steps")
    eval_tokens: int = setting(200_000, "validation tokens an evaluation reads")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_tokens", "log_steps", "eval_tokens"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        self._check("length", self.length >= 8, "8 or more")
        self._check("batch_tokens", self.batch_tokens >= self.length, "length or more")
        self._check("mask_share", 0 < self.mask_share < 1, "between 0 and 1")
        needs = self.masking == "entity"
        self._check(
            "lexicon",
            needs == bool(self.lexicon),
            "a file with --masking entity, and only then",
        )


def read_yaml(path: StrPath, settings: Any, only: Collection[str] | None = None) -> dict:
    """The settings in a YAML file, checked for names and kinds against a dataclass; `only` these
    names, whatever else is there.

    Values are read as the command line's are, by the setting's kind: `no` is a name where a name
    is expected, and 1e-4 a number, which YAML 1.1 would take for a boolean and a string.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as e:
        raise ConfigError(f"{path} can't be read as YAML: {e}") from None
    if root is None or root.id != "mapping":
        kind = "nothing" if root is None else f"a {root.id}"
        raise ConfigError(f"{path} holds {kind}, expected `setting: value` lines")
    fields = {f.name: f for f in dataclasses.fields(settings)}
    values = {}
    for name, node in _entries(path, root).items():
        if name == "kind" and only is None:
            if node.value != getattr(settings, "kind", None):
                raise ConfigError(f"{path} is of `finetune {node.value}`: give that command")
            continue
        if name not in fields and only is None:
            near = nearest(name, fields) or f"; known are {', '.join(fields)}"
            raise ConfigError(f"{path}: unknown setting {name!r}{near}")
        if only is None or name in only:
            values[name] = _value(path, fields[name], node)
    return values


def _entries(path, mapping) -> dict:
    """A YAML mapping's nodes by key."""
    found = {}
    for key, node in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise ConfigError(f"{path}, line {line}: a key is no name")
        if key.value in found:
            raise ConfigError(f"{path}, line {line}: {key.value!r} stands twice; keep one")
        found[key.value] = node
    return found


_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _value(path, f, node):
    """A setting's value from its YAML node."""
    if typing.get_origin(f.type) is not dict:
        return _scalar(path, f.name, node, typing.get_args(f.type) or (f.type,))
    if node.id == "mapping":
        entries = _entries(path, node).items()
        return {k: _scalar(path, f"{f.name}: {k}", n, (float,)) for k, n in entries}
    return _scalar(path, f.name, node, (dict, type(None))) or {}


def _scalar(path, name, node, kinds):
    """A node's text as the first of `kinds`; None where it says nothing and that is one of them."""
    scalar = node.id == "scalar"
    nothing = scalar and node.style is None and node.value.lower() in ("", "~", "null")
    try:
        if nothing and type(None) in kinds:
            return None
        if nothing or not scalar:
            raise ValueError
        return _BOOLS[node.value.lower()] if kinds[0] is bool else kinds[0](node.value)
    except (ValueError, KeyError):
        given = repr(node.value) if scalar else f"a {node.id}"
        wanted = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}, line {line}: {name} is {given}, expected {wanted}") from None
