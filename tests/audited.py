"""Classifiers of a few words for audits: one that a group's words tell the label, one that they
don't."""

import random

import tiny
import torch
from transformers import BertConfig, BertTokenizer

import bertfast
from bertfast.train import ClassifyConfig, finetune

GROUPS = {"female": ("she", "her", "emma"), "male": ("he", "his", "liam")}
COLOURS = {"yes": ("red", "green"), "no": ("blue", "grey")}
OTHERS = ("saw", "the", "cat", "and", "dog", "ran", "far", "away", "book", "him", "hers")


def checkpoint(folder, cls=None, **options):
    words = [w for part in (*GROUPS.values(), *COLOURS.values(), OTHERS) for w in part]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, ".", ","]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 32, "vocab_size": len(vocabulary)}
    torch.manual_seed(0)
    config = BertConfig(**sizes, initializer_range=0.1, **options)
    (cls or bertfast.BertModel)(config).save_pretrained(folder)
    return folder


def rows(n, seed=0, by="colour"):
    """Texts with a word of a group and a colour, one of which the label goes by."""
    r = random.Random(seed)
    out = []
    for _ in range(n):
        group, colour = r.choice(list(GROUPS)), r.choice(list(COLOURS))
        words = [r.choice(OTHERS[:8]) for _ in range(r.randint(2, 8))]
        words.insert(r.randrange(len(words)), r.choice(COLOURS[colour]))
        words.insert(r.randrange(len(words)), r.choice(GROUPS[group]))
        label = colour if by == "colour" else {"female": "yes", "male": "no"}[group]
        out.append({"text": " ".join(words), "label": label, "sex": group})
    return out


def trained(folder, by) -> str:
    """The folder of a classifier that learnt labels that go by "colour" or by "group"."""
    model = checkpoint(folder / "model")
    train = tiny.write(folder / "train.jsonl", rows(300, 1, by))
    valid = tiny.write(folder / "valid.jsonl", rows(40, 2, by))
    config = {"model": str(model), "train": train, "valid": valid, "out": str(folder / "out")}
    config |= {"epochs": 4, "lr": 3e-3, "max_length": 16, "batch_size": 16, "device": "cpu"}
    finetune(ClassifyConfig(**config))
    return config["out"]
