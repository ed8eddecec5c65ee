"""What `prepare` read, dropped and kept, and what of it a user should know before training."""

import json
from collections import Counter
from collections.abc import Mapping, Sized
from pathlib import Path

import numpy as np

from .config import PrepareConfig
from .shards import PARTS
from .work import read_batch

_MANY = 0.1  # share of sentences or documents left out
_UNKNOWN = 0.01  # share of [UNK]


def total_counts(work: Path, n: int) -> dict:
    """What was read and dropped in cleaning; `undecoded`: such documents of each file."""
    total, files = Counter(), Counter()
    for i in range(n):
        found = json.loads(read_batch(work, i, "counts").tobytes())
        files[found.pop("file")] += found["documents_undecoded"]
        total.update(found)
    return dict(total) | {"undecoded": {name: n for name, n in files.items() if n}}


def statistics(
    out: Path, work: Path, batches: Sized, shards: Mapping[str, list], vocab_size: int
) -> dict:
    """What was read, dropped and kept."""
    from tokenizers import Tokenizer

    read = total_counts(work, len(batches))
    entries = [json.loads((work / f"shard-{i:06d}.json").read_text()) for i in range(len(batches))]
    read["sentences_boilerplate"] = sum(e["counts"]["sentences_boilerplate"] for e in entries)
    with np.load(work / "duplicates.npz") as f:
        read["documents_equal"] = int(f["equal"])
    dropped = np.load(work / "dropped.npy", mmap_mode="r")
    read["documents_similar"] = int(dropped.sum()) - read["documents_equal"]
    for name in PARTS:
        total = lambda key, name=name: sum(e[key] for e in shards[name])
        read[name] = {k: total(k) for k in ("documents", "sentences", "tokens")}
    frequency = np.zeros(vocab_size, np.int64)
    for e in shards["train"]:
        tokens = np.load(out / f"{e['name']}.tokens.npy", mmap_mode="r")
        frequency += np.bincount(tokens, minlength=vocab_size)
    tokens = frequency.sum()
    unknown = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")).token_to_id("[UNK]")
    read["unknown_share"] = float(frequency[unknown] / tokens)
    read["most_frequent_token"] = int(frequency.argmax())
    read["most_frequent_share"] = float(frequency.max() / tokens)
    return read


def remarks(statistics: dict, config: PrepareConfig) -> list[str]:
    """Sentences of what `prepare` left out, and of what the shards lack; `statistics` are its."""
    found = statistics
    return [*_left_out(found, config), *_unknown(found, config), *_lacking(found, config)]


def _left_out(found, config):
    total = found["documents"]
    if files := found["undecoded"]:
        first, *others = files
        yield (
            f"{found['documents_undecoded']:,} of {total:,} documents are not {config.encoding}: "
            f"{found['characters_undecoded']:,} characters that can't be read are left out ({first}"
            f"{f' and {len(others)} more files' if others else ''}). Say what the files are by "
            "--encoding (cp1252, latin-1, gb18030, ...), or convert them"
        )
    if (n := found["sentences_without_text"]) > _MANY * found["sentences"]:
        yield (
            f"{n:,} of {found['sentences']:,} sentences are left out: they hold fewer letters than "
            "other characters"
        )
    if (n := found["documents_too_short"]) > _MANY * total:
        yield (
            f"{n:,} of {total:,} documents are left out: they have fewer than --min-words "
            f"{config.min_words} words"
        )


def _unknown(found, config):
    if found["unknown_share"] > _UNKNOWN:
        remedy = "raise --vocab-size"
        if config.tokenizer:
            remedy = f"{config.tokenizer} lacks this text's letters: leave --tokenizer out"
        yield f"{found['unknown_share']:.1%} of the training tokens are [UNK]; {remedy}"


def _lacking(found, config):
    train, valid = found["train"], found["valid"]
    if not valid["documents"] and (config.valid_fraction or config.valid_corpus):
        why = "the corpus is one document (put blank lines between documents)"
        if config.valid_corpus:
            why = "nothing of --valid-corpus is left"
        yield f"there is no validation part: {why}"
    why = None
    if train["documents"] == 1:
        why = "is one document (put blank lines between documents)"
    elif train["documents"] == train["sentences"]:
        why = "has one sentence in each document (blank lines end documents, not sentences)"
    if why:
        yield f"the training part {why}: it makes no next-sentence pairs, pretrain with --no-nsp"
