"""A tiny prepared corpus and settings for pre-training tests."""

import json
import random
from pathlib import Path

from bertfast.data import masking
from bertfast.data.prepare import PrepareConfig, prepare
from bertfast.data.sequences import Sequences
from bertfast.data.shards import Shards
from bertfast.train import PretrainConfig
from bertfast.train.pretrain import PretrainTask, _model, _tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def sentences(r, topic, n):
    """A topic has two words, which take turns: one seen tells nearly all of the rest."""
    for _ in range(n):
        start = r.randrange(2)
        words = [topic + "ab"[(start + i) % 2] for i in range(r.randint(5, 9))]
        yield " ".join(words).capitalize() + "."


def folder(path: Path, documents=240, seed=0) -> Path:
    """A prepared folder `path`/data, a config.json beside it with and one without dropout."""
    r = random.Random(seed)
    topics = ["ka", "mo", "si", "tu", "re", "ni", "fo", "la"]
    text = "\n\n".join(
        " ".join(sentences(r, r.choice(topics), r.randint(2, 6))) for _ in range(documents)
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / "corpus.txt").write_text(text + "\n")
    settings = {"vocab_size": 120, "processes": 1, "similarity": 0, "boilerplate": 0}
    settings |= {"shard_mb": 0.005, "valid_fraction": 0.15}
    corpus = [str(path / "corpus.txt")]
    prepare(PrepareConfig(corpus=corpus, out=str(path / "data"), **settings), lambda text: None)
    (path / "config.json").write_text(json.dumps(SIZES))
    (path / "still.json").write_text(json.dumps(SIZES | NO_DROPOUT))
    return path


def settings(path: Path, **options) -> dict:
    """PretrainConfig's arguments for a short run."""
    if not (path / "data").exists():
        folder(path)
    base = {"data": str(path / "data"), "config": str(path / "config.json")}
    base |= {"out": str(path / "out"), "length": 32, "batch_tokens": 512, "lr": 5e-3}
    base |= {"max_steps": 30, "eval_steps": 10, "save_steps": 4, "log_steps": 10, "device": "cpu"}
    return base | options


def task(path: Path, **options):
    """(task, model), without dropout unless `config` is given."""
    still = {"config": str(path / "still.json")} | options
    config = PretrainConfig(**settings(path, **still))
    tokenizer = _tokenizer(config)
    words = masking.vocabulary(tokenizer)
    train = Sequences(
        Shards(config.data, "train"), words, length=32, pairs=config.nsp, kind=config.masking
    )
    model = _model(config, tokenizer)
    return PretrainTask(config, model.config, train, None, tokenizer), model.train()
