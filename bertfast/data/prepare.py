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
from pathlib import Path

import numpy as np

from ..files import check_folder, locked, os_errors
from ..progress import Say
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
from .statistics import remarks, statistics, total_counts
from .work import batch_file, read_batch, save_arrays


def prepare(config: PrepareConfig, say: Say = print) -> dict:
    """Make `config.out` from the corpus; goes on where a run before it stopped.

    Returns the statistics that stand in index.json. Raises DataError; OSError where `out` can't be
    written or another run has it, or the disk is full.
    """
    out, wanted = Path(config.out), config.fingerprint()
    if not (out / INDEX).exists():
        check_folder(out)
        with locked(out):
            if not (out / INDEX).exists():
                _prepare(config, out, wanted, say)
    else:
        say(f"{out} is already prepared")
    index = read_index(out)
    if index["settings"] != wanted:
        raise DataError(f"{out} was prepared with other settings; give another --out")
    for remark in remarks(index["statistics"], config):
        say(f"warning: {remark}")
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
    found = statistics(out, work, batches, shards, vocab_size)
    seconds["total"] = round(time.perf_counter() - start, 3)
    found["seconds"] = seconds
    found["mb_per_second"] = round(found["bytes"] / 1e6 / seconds["total"], 2)
    tokenizer = {p.name: sha256(p) for p in sorted((out / "tokenizer").iterdir())}
    write_json(
        out / INDEX,
        {
            "format": FORMAT,
            "vocab_size": vocab_size,
            "shards": shards,
            "tokenizer_sha256": tokenizer,
            "statistics": found,
            "settings": wanted,
        },
    )
    shutil.rmtree(work)


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
                    if not batch_file(work, i).exists():
                        yield block, str(path), config, batch_file(work, i)

    for _ in pool.run(_clean, jobs()):
        pass
    write_json(listing, batches)
    return batches


def _clean(block, name, config, target):
    jsonl = corpus.is_jsonl(name)
    texts = corpus.documents(block, jsonl, config.text_column, name, config.encoding)
    words = corpus.split_words(texts, config.min_words)
    hashes = dedup.word_hashes(words.table)[words.ids]
    ends = words.sentences[words.documents]  # of documents, in words
    signatures = dedup.signatures(hashes, ends)
    counts = words.counts | {"bytes": len(block), "file": name}
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
    save_arrays(target, arrays)


def _read_words(work, i) -> corpus.Words:
    with np.load(batch_file(work, i)) as f:
        table = f["table"].tobytes().decode().split("\n")
        return corpus.Words(table, f["ids"], f["sentences"], f["documents"], {})


def _find_duplicates(config, work, batches):
    """dropped.npy: bool [documents]; duplicates.npz: where in it each batch starts, the hashes of
    sentences to leave out, and the place that documents below it have in validation."""
    target = work / "duplicates.npz"
    if target.exists():
        return
    n = range(len(batches))
    starts = np.cumsum([0] + [len(read_batch(work, i, "documents")) - 1 for i in n])
    column = lambda name: [lambda i=i: read_batch(work, i, name) for i in n]
    if not starts[-1]:
        read = total_counts(work, len(batches))
        raise DataError(
            f"nothing is left of the corpus: of {read['documents']:,} documents none has "
            f"--min-words {config.min_words} words, and {read['sentences_without_text']:,} of "
            f"{read['sentences']:,} sentences hold fewer letters than other characters"
        )
    dropped = np.zeros(starts[-1], bool)
    for _, later in dedup.repeats(column("document_hashes")):
        dropped[later] = True
    equal = int(dropped.sum())
    if config.similarity:
        for b in range(dedup.BANDS):
            for pairs in dedup.repeats(column(f"band{b}"), ~dropped):
                if len(pairs[0]):
                    load = lambda i: read_batch(work, i, "signatures")
                    same = dedup.similarity(pairs, starts, load) >= config.similarity
                    dropped[pairs[1][same]] = True
    boilerplate = np.zeros(0, np.uint64)
    if config.boilerplate:
        limit = max(20, int(config.boilerplate * (~dropped).sum()))

        def sentences(i):
            kept = ~dropped[starts[i] : starts[i + 1]]
            return read_batch(work, i, "sentence_hashes")[
                np.repeat(kept, np.diff(read_batch(work, i, "documents")))
            ]

        boilerplate = dedup.frequent([lambda i=i: sentences(i) for i in n], limit)
    save_arrays(work / "dropped.npy", dropped)  # on its own, to be mapped rather than read
    below = _valid_below(config, column("document_hashes"), starts, dropped)
    arrays = {"starts": starts, "boilerplate": boilerplate, "equal": equal, "valid_below": below}
    save_arrays(target, arrays)


def _valid_below(config, hashes, starts, dropped) -> float:
    """Documents whose place, by their hash in [0, 1), is below this are for validation: one at
    least, but not all."""
    if config.valid_corpus or not config.valid_fraction:
        return 0.0
    ends = np.zeros(0)  # the first and the last place
    for read, start, stop in zip(hashes, starts[:-1], starts[1:], strict=True):
        ends = np.concatenate([ends, _places(read())[~dropped[start:stop]]])
        ends = np.sort(ends)[[0, -1]] if len(ends) else ends
    first, last = ends
    return min(max(config.valid_fraction, np.nextafter(first, 1)), last)


def _places(hashes) -> np.ndarray:
    return (hashes >> np.uint64(11)) * 2.0**-53


def _kept(work, i):
    """(words of batch i without what is dropped, their documents' hashes, counts)."""
    with np.load(work / "duplicates.npz") as f:
        starts = f["starts"]
        boilerplate = f["boilerplate"]
    gone = np.load(work / "dropped.npy", mmap_mode="r")[starts[i] : starts[i + 1]]
    words = _read_words(work, i)
    good = np.repeat(~gone, np.diff(words.documents))
    common = np.isin(read_batch(work, i, "sentence_hashes"), boilerplate)
    hashes = np.repeat(read_batch(work, i, "document_hashes"), np.diff(words.documents))
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
            wordpiece.save_tokenizer(trained, temporary)
        os.replace(temporary, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def _shard_all(config, out, work, batches, vocab_size, pool) -> dict[str, list]:
    """The shards' entries for the index."""
    jobs = (
        (config.min_words, out, work, i, part, vocab_size)
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


def _shard(min_words, out, work, i, part, vocab_size):
    words, left, hashes, counts = _kept(work, i)
    tokens, offsets = _word_table(out / "tokenizer" / "tokenizer.json")(words.table)
    with np.load(work / "duplicates.npz") as f:
        chosen = _places(hashes) < f["valid_below"]
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
