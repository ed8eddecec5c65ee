"""Raw text to token shards: four stages over blocks of text, each restartable, in processes.

clean -> (per block: words as numbers, hashes, MinHash signatures) -> duplicates -> tokenizer ->
token shards. Nothing holds more than a block at a time but one byte a document, one table of word
counts of bounded size, and hashes sorted some millions at a time.
"""

import functools
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np

from ..files import check_folder, locked, os_errors, write_whole
from . import corpus, dedup, wordpiece
from .config import PrepareConfig
from .errors import DataError
from .pool import Pool
from .shards import (
    FORMAT,
    INDEX,
    PARTS,
    Shard,
    read_index,
    sha256,
    token_dtype,
    write_json,
    write_shard,
)


def prepare(config: PrepareConfig, say=print) -> dict:
    """Make `config.out` from the corpus; goes on where a run before it stopped.

    Returns the statistics that stand in index.json. Raises DataError; OSError where `out` can't be
    written or another run has it, or the disk is full.
    """
    out, wanted = Path(config.out), config.fingerprint()
    if not (out / INDEX).exists():
        check_folder(out)
        with locked(out):
            if not (out / INDEX).exists():
                return _prepare(config, out, wanted, say)
    index = read_index(out)
    if index["settings"] != wanted:
        raise DataError(f"{out} was prepared with other settings; give another --out")
    say(f"{out} is already prepared")
    return index["statistics"]


def _prepare(config, out, wanted, say):
    work = out / "work"
    work.mkdir(exist_ok=True)
    settings = work / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != wanted:
        raise DataError(f"{work} holds an unfinished run with other settings; delete it, or give "
                        "another --out")  # fmt: skip
    write_json(settings, wanted)
    seconds, start = {}, time.perf_counter()

    def timed(name, stage, *arguments):
        before = time.perf_counter()
        result = stage(*arguments)
        seconds[name] = round(time.perf_counter() - before, 3)
        say(f"{name}: {seconds[name]:.1f} s")
        return result

    with Pool(config.processes) as pool:
        batches = timed("clean", _clean_all, config, work, pool)
        timed("duplicates", _find_duplicates, config, work, batches)
        vocab_size = timed("tokenizer", _make_tokenizer, config, out, work, batches)
        shards = timed("shards", _shard_all, config, out, work, batches, vocab_size, pool)
    statistics = _statistics(out, work, batches, shards, vocab_size)
    seconds["total"] = round(time.perf_counter() - start, 3)
    statistics["seconds"] = seconds
    statistics["mb_per_second"] = round(statistics["bytes"] / 1e6 / seconds["total"], 2)
    tokenizer = {p.name: sha256(p) for p in sorted((out / "tokenizer").iterdir())}
    write_json(
        out / INDEX,
        {
            "format": FORMAT,
            "vocab_size": vocab_size,
            "shards": shards,
            "tokenizer_sha256": tokenizer,
            "statistics": statistics,
            "settings": wanted,
        },
    )
    shutil.rmtree(work)
    return statistics


def _batch(work: Path, i: int) -> Path:
    return work / f"clean-{i:06d}.npz"


def _load(work, i, name):
    with np.load(_batch(work, i)) as f:
        return f[name]


def _clean_all(config, work, pool) -> list[str]:
    """Each block cleaned into a file of its own; the part ("train", "valid") of each."""
    listing = work / "batches.json"
    if listing.exists():
        return json.loads(listing.read_text())
    batches = []

    def jobs():
        # Validation first: of equal documents the first stays, so none leaks into training.
        for part, files in (("valid", config.valid_corpus), ("train", config.corpus)):
            for path in files:
                for block in corpus.blocks(path, int(config.shard_mb * 1e6)):
                    i = len(batches)
                    batches.append(part)
                    if not _batch(work, i).exists():
                        yield (
                            block,
                            str(path),
                            config.text_column,
                            config.min_words,
                            _batch(work, i),
                        )

    for _ in pool.run(_clean, jobs()):
        pass
    write_json(listing, batches)
    return batches


def _clean(block, name, column, min_words, target):
    texts = corpus.documents(block, corpus.is_jsonl(name), column, name)
    words = corpus.split_words(texts, min_words)
    hashes = dedup.word_hashes(words.table)[words.ids]
    ends = words.sentences[words.documents]  # of documents, in words
    signatures = dedup.signatures(hashes, ends)
    counts = words.counts | {"bytes": len(block)}
    arrays = {
        "table": np.frombuffer("\n".join(words.table).encode("utf-8", "replace"), np.uint8),
        "ids": words.ids,
        "sentences": words.sentences,
        "documents": words.documents,
        "document_hashes": dedup.sequence_hashes(hashes, ends),
        "sentence_hashes": dedup.sequence_hashes(hashes, words.sentences),
        "signatures": signatures,
        "counts": np.frombuffer(json.dumps(counts).encode(), np.uint8),
    }
    arrays |= {f"band{b}": values for b, values in enumerate(dedup.bands(signatures))}
    _save(target, arrays)


def _save(target, values):
    """One array, or a dict of them, in a file."""

    def write(temporary):
        with open(temporary, "wb") as f:
            np.savez(f, **values) if isinstance(values, dict) else np.save(f, values)

    write_whole(target, write)


def _read_words(work, i) -> corpus.Words:
    with np.load(_batch(work, i)) as f:
        table = f["table"].tobytes().decode().split("\n")
        return corpus.Words(table, f["ids"], f["sentences"], f["documents"], {})


def _find_duplicates(config, work, batches):
    """dropped.npy: bool [documents]; duplicates.npz: where in it each batch starts, and the hashes
    of sentences to leave out."""
    target = work / "duplicates.npz"
    if target.exists():
        return
    n = range(len(batches))
    starts = np.cumsum([0] + [len(_load(work, i, "documents")) - 1 for i in n])
    column = lambda name: [lambda i=i: _load(work, i, name) for i in n]
    dropped = np.zeros(starts[-1], bool)
    for _, later in dedup.repeats(column("document_hashes")):
        dropped[later] = True
    equal = int(dropped.sum())
    if config.similarity:
        for b in range(dedup.BANDS):
            for pairs in dedup.repeats(column(f"band{b}"), ~dropped):
                if len(pairs[0]):
                    load = lambda i: _load(work, i, "signatures")
                    same = dedup.similarity(pairs, starts, load) >= config.similarity
                    dropped[pairs[1][same]] = True
    boilerplate = np.zeros(0, np.uint64)
    if config.boilerplate:
        limit = max(20, int(config.boilerplate * (~dropped).sum()))

        def sentences(i):
            kept = ~dropped[starts[i] : starts[i + 1]]
            return _load(work, i, "sentence_hashes")[
                np.repeat(kept, np.diff(_load(work, i, "documents")))
            ]

        boilerplate = dedup.frequent([lambda i=i: sentences(i) for i in n], limit)
    _save(work / "dropped.npy", dropped)  # on its own, to be mapped rather than read
    _save(target, {"starts": starts, "boilerplate": boilerplate, "equal": equal})


def _kept(work, i):
    """(words of batch i without what is dropped, their documents' hashes, counts)."""
    with np.load(work / "duplicates.npz") as f:
        starts = f["starts"]
        boilerplate = f["boilerplate"]
    gone = np.load(work / "dropped.npy", mmap_mode="r")[starts[i] : starts[i + 1]]
    words = _read_words(work, i)
    good = np.repeat(~gone, np.diff(words.documents))
    common = np.isin(_load(work, i, "sentence_hashes"), boilerplate)
    hashes = np.repeat(_load(work, i, "document_hashes"), np.diff(words.documents))
    left = good & ~common
    return words, left, hashes, {"sentences_boilerplate": int((good & common).sum())}


def _make_tokenizer(config, out, work, batches) -> int:
    """tokenizer/ in `out`; the size of its vocabulary."""
    from tokenizers import Tokenizer

    folder = out / "tokenizer"
    if not folder.exists():
        temporary = work / "tokenizer"
        shutil.rmtree(temporary, ignore_errors=True)
        if config.tokenizer:
            from ..model.checkpoint import resolve
            from ..model.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(resolve(config.tokenizer, weights=False))
            wordpiece.check_tokenizer(tokenizer, config.tokenizer)
            with os_errors(temporary):
                tokenizer.save_pretrained(temporary)
        else:
            counts = wordpiece.WordCounts()
            for i, part in enumerate(batches):
                if part == "train":
                    words, left, _, _ = _kept(work, i)
                    ids = corpus.select(words, left).ids
                    counts.add(words.table, np.bincount(ids, minlength=len(words.table)))
            trained = wordpiece.train_tokenizer(counts.counts, config.vocab_size, config.lowercase)
            wordpiece.save_tokenizer(trained, temporary, config.lowercase)
        os.replace(temporary, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def _shard_all(config, out, work, batches, vocab_size, pool) -> dict[str, list]:
    """The shards' entries for the index."""
    fraction = 0.0 if config.valid_corpus else config.valid_fraction
    jobs = (
        (fraction, config.min_words, out, work, i, part, vocab_size)
        for i, part in enumerate(batches)
        if not (work / f"shard-{i:06d}.json").exists()
    )  # fmt: skip
    for _ in pool.run(_shard, jobs):
        pass
    entries = [json.loads((work / f"shard-{i:06d}.json").read_text()) for i in range(len(batches))]
    shards = {p: [e[p] for e in entries if p in e] for p in PARTS}
    if not shards["train"]:
        raise DataError(
            "nothing is left of the corpus: no document passed --min-words and cleaning"
        )
    return shards


_word_table = functools.lru_cache(1)(wordpiece.WordTable)


def _shard(valid_fraction, min_words, out, work, i, part, vocab_size):
    words, left, hashes, counts = _kept(work, i)
    tokens, offsets = _word_table(out / "tokenizer" / "tokenizer.json")(words.table)
    # In 2**53 because a float holds no more.
    chosen = (hashes >> np.uint64(11)) < np.uint64(valid_fraction * 2**53)
    entries = {"counts": counts}
    for name in PARTS:
        mine = (
            chosen == (name == "valid") if part == "train" else np.full(len(left), name == "valid")
        )
        found = corpus.select(words, left & mine, min_words)
        if not len(found.ids):
            continue
        ids, lengths = wordpiece.gather(tokens, offsets, found.ids)
        per_sentence = corpus.sums(lengths, found.sentences)
        sentences = np.concatenate([[0], np.cumsum(per_sentence)])
        shard = Shard(ids.astype(token_dtype(vocab_size)), sentences, found.documents)
        entries[name] = write_shard(out, f"{name}-{i:06d}", shard)
    write_json(work / f"shard-{i:06d}.json", entries)


def _statistics(out, work, batches, shards, vocab_size) -> dict:
    """What was read, dropped and kept."""
    from tokenizers import Tokenizer

    read = Counter()
    for i in range(len(batches)):
        read.update(json.loads(_load(work, i, "counts").tobytes()))
        read.update(json.loads((work / f"shard-{i:06d}.json").read_text())["counts"])
    with np.load(work / "duplicates.npz") as f:
        read["documents_equal"] = int(f["equal"])
    dropped = np.load(work / "dropped.npy", mmap_mode="r")
    read["documents_similar"] = int(dropped.sum()) - read["documents_equal"]
    found = dict(read)
    for name in PARTS:
        total = lambda key, name=name: sum(e[key] for e in shards[name])
        found[name] = {k: total(k) for k in ("documents", "sentences", "tokens")}
    frequency = np.zeros(vocab_size, np.int64)
    for e in shards["train"]:
        tokens = np.load(out / f"{e['name']}.tokens.npy", mmap_mode="r")
        frequency += np.bincount(tokens, minlength=vocab_size)
    tokens = frequency.sum()
    unknown = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")).token_to_id("[UNK]")
    found["unknown_share"] = float(frequency[unknown] / tokens)
    found["most_frequent_token"] = int(frequency.argmax())
    found["most_frequent_share"] = float(frequency.max() / tokens)
    return found
