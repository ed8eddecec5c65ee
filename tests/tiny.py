"""A tiny checkpoint and data for training tests, and a run of them as a process."""

import json
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertTokenizer

import bertfast

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "stone",
    "river",
    "cloud",
    "run",
    "walk",
    "jump",
]


def checkpoint(folder: Path, **options):
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 32, "vocab_size": len(vocabulary)}
    sizes |= {"initializer_range": 0.1}  # so small a model learns slowly from 0.02
    torch.manual_seed(0)
    bertfast.BertModel(BertConfig(**(sizes | options))).save_pretrained(folder)
    return folder


def rows(n, seed=0):
    """Texts whose label is the colour in them."""
    r = random.Random(seed)
    out = []
    for i in range(n):
        colour = WORDS[i % 3]
        words = [r.choice(WORDS[3:]) for _ in range(r.randint(2, 12))]
        words.insert(r.randrange(len(words)), colour)
        out.append({"text": " ".join(words), "label": colour})
    return out


def write(path: Path, table):
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(path)


def settings(folder: Path, **options) -> dict:
    """ClassifyConfig's arguments for a short run in `folder`."""
    if not (folder / "model").exists():
        checkpoint(folder / "model")
        write(folder / "train.jsonl", rows(60))
        write(folder / "valid.jsonl", rows(21, 1))
    base = {"model": str(folder / "model"), "train": str(folder / "train.jsonl")}
    base |= {"valid": str(folder / "valid.jsonl"), "out": str(folder / "out"), "epochs": 3}
    base |= {"lr": 3e-3, "max_length": 16, "device": "cpu"}
    return base | ({} if "batch_tokens" in options else {"batch_size": 8}) | options
