"""A small sentence-transformers model, tables for it, and `bertfast.embed` of these."""

import json
import random

import pytest
from sentences import TEXTS, WORDS, checkpoint

import bertfast

PROMPTS = {"query": "the cat : ", "passage": "dog ran ", "short": "a "}
ROWS = [{"text": text, "id": 7 * i} for i, text in enumerate([*TEXTS, "", "the", *TEXTS[::-1]])]
OPTIONS = {"show_progress_bar": False}


def texts(rows=None):
    return [row["text"] for row in rows or ROWS]


def make(folder):
    """model/: prompts, which the pooling leaves out; body/: its transformer; rows.jsonl, ROWS;
    long.jsonl, 3,000."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    body = Transformer(checkpoint(folder / "body"))
    pooling = Pooling(body.get_embedding_dimension(), "mean", include_prompt=False)
    model = st.SentenceTransformer(modules=[body, pooling], prompts=PROMPTS, device="cpu")
    model.max_seq_length = 12  # some texts are cut
    model.save(str(folder / "model"), create_model_card=False)
    write(folder / "rows.jsonl", ROWS)
    r = random.Random(0)
    words = lambda: " ".join(r.choices(WORDS, k=r.randrange(12)))
    write(folder / "long.jsonl", [{"text": words(), "id": i} for i in range(3000)])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def embed(folder, output, source="rows.jsonl", **options):
    return bertfast.embed(str(folder / "model"), folder / source, output, device="cpu", **options)
