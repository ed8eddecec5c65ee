"""`bertfast embed`: encode's vectors, to a file, whatever happens on the way."""

import csv
import gzip
import io
import json
import os
import sys
import threading

import numpy as np
import pytest
import torch
from embedded import OPTIONS, ROWS, embed, make, texts, write
from helpers import refused
from sentences import TEXTS, WORDS

import bertfast
from bertfast import embedding
from bertfast.cli import main
from bertfast.data import DataError
from bertfast.data.errors import ConfigError
from bertfast.model.checkpoint import CheckpointError
from bertfast.progress import Progress

st = pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="module")
def stock(folder):
    return st.SentenceTransformer(str(folder / "model"), device="cpu")


def vectors(folder, tmp_path, **options):
    embed(folder, tmp_path / "v.npy", restart=True, **options)
    return np.load(tmp_path / "v.npy")


def close(actual, expected, like=1e-5):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=0, atol=like * np.abs(expected).max())


def test_the_vectors_are_encodes(folder, stock, tmp_path):
    exact = torch.cat([stock.encode(t, convert_to_tensor=True, **OPTIONS)[None] for t in texts()])
    close(vectors(folder, tmp_path), exact.numpy())
    given = ({"prompt": "sat on "}, {"prompt_name": "short"}, {"prompt": ""})
    for options in given:
        close(vectors(folder, tmp_path, **options), stock.encode(texts(), **options, **OPTIONS))
    for task in ("query", "document"):
        expected = getattr(stock, f"encode_{task}")(texts(), **OPTIONS)
        close(vectors(folder, tmp_path, task=task), expected)
        own = getattr(stock, f"encode_{task}")(texts(), prompt_name="short", **OPTIONS)
        close(vectors(folder, tmp_path, task=task, prompt_name="short"), own)
    expected = stock.encode(texts(), truncate_dim=5, normalize_embeddings=True, **OPTIONS)
    close(vectors(folder, tmp_path, truncate_dim=5, normalize=True), expected)
    for tokens in (1, 40, 10_000):
        close(vectors(folder, tmp_path, batch_tokens=tokens), exact.numpy())


def test_padding_is_left_out(folder):
    """By embed, and by encode on a frozen model."""
    settings = {"precision": "int8", "device": "cpu", "task": None, "batch_tokens": 4096}
    settings |= {"prompt": None, "prompt_name": None, "normalize": False, "truncate_dim": None}
    encoder = embedding.TextEncoder(folder / "model", settings)
    report = bertfast.accelerate(encoder.model)
    encoder.vectors(encoder.batches(TEXTS), lambda n: None)
    assert [*report.padding.values()] == ["skipped: nobody reads them"]
    encoder.model.encode(TEXTS, **OPTIONS)
    assert [*report.padding.values()] == ["skipped: nobody reads them"]


@pytest.mark.parametrize("precision", ["bf16", "int8", "auto"])
def test_frozen(folder, tmp_path, precision):
    """In the process, and from a folder of save_frozen: to the bit."""
    found = vectors(folder, tmp_path, precision=precision)
    model = st.SentenceTransformer(str(folder / "model"), device="cpu")
    expected = model.encode(texts(), **OPTIONS)
    bertfast.freeze(model, precision)
    bertfast.save_frozen(model, tmp_path / "frozen")
    cosine = torch.cosine_similarity(*map(torch.tensor, (found, expected)))
    assert cosine.min() > 0.98
    given = tmp_path / "frozen", folder / "rows.jsonl", tmp_path / "w.npy"
    bertfast.embed(*given)
    if precision != "auto":  # which goes by times
        assert np.array_equal(np.load(given[2]), found)
    refused(ConfigError, "is frozen: leave it out", bertfast.embed, *given, precision="int8", restart=True)  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "uint8", "binary", "ubinary"])
def test_dtypes_are_those_of_quantize_embeddings(folder, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("bertfast.data.vectors._BLOCK", 200)  # several blocks
    fp32 = vectors(folder, tmp_path)
    found = vectors(folder, tmp_path, dtype=dtype)
    if dtype == "fp16":
        expected = fp32.astype(np.float16)
    else:
        expected = st.util.quantize_embeddings(fp32, "float32" if dtype == "fp32" else dtype)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    sink = io.BytesIO()
    np.save(sink, expected)
    assert (tmp_path / "v.npy").read_bytes() == sink.getvalue()
    ranges = tmp_path / "v.ranges.npy"
    assert ranges.exists() == (dtype in ("int8", "uint8"))
    if ranges.exists():
        own = st.util.quantize_embeddings(fp32[:3], dtype, ranges=np.load(ranges))
        assert np.array_equal(own, found[:3])
    pq = pytest.importorskip("pyarrow.parquet")
    embed(folder, tmp_path / "v.parquet", dtype=dtype, id_column="id")
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["id", "embedding"]
    assert table["id"].to_pylist() == [row["id"] for row in ROWS]
    assert np.array_equal(np.array(table["embedding"].to_pylist(), found.dtype), found)
    assert pq.ParquetFile(tmp_path / "v.parquet").num_row_groups > 1


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_every_format(folder, tmp_path, kind, suffix):
    expected, path = vectors(folder, tmp_path), tmp_path / f"t.{kind}{suffix}"
    if kind == "jsonl":
        content = (folder / "rows.jsonl").read_bytes()
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(ROWS), sink)
        content = sink.getvalue()
    else:
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter="\t" if kind == "tsv" else ",")
        writer.writerows([["text", "id"], *([row["text"], row["id"]] for row in ROWS)])
        content = out.getvalue().encode()
    path.write_bytes(gzip.compress(content) if suffix else content)
    embed(folder, tmp_path / "w.npy", path)
    assert np.array_equal(np.load(tmp_path / "w.npy"), expected)


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Progress, "EVERY", 0)
    expected = vectors(folder, tmp_path)
    raw = io.BytesIO((folder / "rows.jsonl").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
    output = str(tmp_path / "w.npy")
    arguments = ["embed", "--model", str(folder / "model"), "--output", output, "--device", "cpu"]
    assert main([*arguments, "--input", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["shape"] == [*expected.shape] and "texts/s" in err
    assert np.array_equal(np.load(output), expected)
    arguments += ["--input", str(folder / "rows.jsonl")]
    assert main(arguments) == 2
    assert f"{output} is there: give another --output, or --restart" in capsys.readouterr().err
    assert main([*arguments, "--restart", "--query", "--normalize"]) == 0
    assert np.load(output) == pytest.approx(vectors(folder, tmp_path, task="query", normalize=True))
    assert not (tmp_path / "w.npy.partial").exists()


def test_a_chunk_ahead_is_all_that_is_read(folder, tmp_path, monkeypatch):
    """Of texts on a pipe: what was read, and not yet written, never is more than two chunks."""
    os.mkfifo(tmp_path / "t.jsonl")
    lines = (folder / "long.jsonl").read_text().splitlines()

    def feed():
        with open(tmp_path / "t.jsonl", "w", buffering=1) as f:
            f.writelines(line + "\n" for line in lines)

    writer = threading.Thread(target=feed)
    writer.start()
    seen, done = [], []
    batches, finite = embedding.TextEncoder.batches, embedding._finite
    monkeypatch.setattr(
        embedding.TextEncoder,
        "batches",
        lambda self, t: seen.append(len(t)) or batches(self, t),
    )
    held = []
    monkeypatch.setattr(
        embedding,
        "_finite",
        lambda *a: held.append(sum(seen) - sum(done)) or done.append(len(a[0])) or finite(*a),
    )
    embed(folder, tmp_path / "v.npy", tmp_path / "t.jsonl", batch_tokens=256)
    writer.join()
    assert sum(seen) == 3000 and max(seen) == 64 and max(held) <= 2 * 64


def test_bad_input(folder, tmp_path, capsys):
    output, path = tmp_path / "v.npy", tmp_path / "t.jsonl"
    for bad, message in (
        ([{"text": "a"}, {"text": None}], r"t.jsonl: row 2 \(line 2\): column 'text' is missing"),
        ([{"text": 3}], r"row 1 \(line 1\): column 'text' is 3, a int; expected a string"),
        ([{"txt": "a"}], "no column 'text'; it has: 'txt'"),
        ([], "is empty"),
    ):
        write(path, bad)
        refused(DataError, message, embed, folder, output, path)
        assert not output.exists() and not (tmp_path / "v.npy.partial").exists()
    write(path, [{"text": "a", "id": 1}, {"text": "b", "id": "2"}])
    pq = {"output": tmp_path / "v.parquet", "id_column": "id"}
    refused(
        DataError, r"row 2 .*column 'id' is '2', the first row's", embed, folder, source=path, **pq
    )
    write(path, [{"text": "a", "id": 1.5}])
    refused(
        DataError, r"column 'id' is 1.5; expected text or a whole", embed, folder, source=path, **pq
    )
    write(path, [{"text": "a"}])
    refused(DataError, "2 texts or more", embed, folder, output, path, dtype="int8")
    assert embed(folder, tmp_path / "w.npy", path)["shape"] == [1, 48]
    # Half a file is kept: the row is mended, and the rest comes.
    rows = [{"text": "the cat"}] * 200
    write(path, [*rows, {"text": None}])
    refused(DataError, "row 201", embed, folder, tmp_path / "x.npy", path, batch_tokens=256)
    assert json.loads((tmp_path / "x.npy.partial" / "state.json").read_text())["done"] == 192
    write(path, [*rows, {"text": "mended"}])
    assert embed(folder, tmp_path / "x.npy", path, batch_tokens=256)["shape"] == [201, 48]


def test_wrong_settings(folder, tmp_path, capsys):
    for options, message in (
        ({"output": tmp_path / "v.txt"}, r"v.txt', expected a name in .npy or .parquet"),
        ({"dtype": "int4"}, "dtype is 'int4', expected one of fp32, fp16"),
        ({"precision": "int4"}, "precision is 'int4', expected one of fp32"),
        ({"task": "rank"}, "task is 'rank', expected one of query, document"),
        ({"prompt": "a", "prompt_name": "b"}, "drop one"),
        ({"prompt_name": "long"}, "prompt_name is 'long', the model has .*'query'"),
        ({"id_column": "id"}, "needs an output in .parquet"),
        ({"id_column": "embedding", "output": tmp_path / "v.parquet"}, "rename it in the input"),
        ({"batch_tokens": 0}, "batch_tokens is 0, expected 1 or more"),
        ({"truncate_dim": 0}, "truncate_dim is 0, expected 1 or more"),
    ):
        refused(ConfigError, message, embed, folder, **{"output": tmp_path / "v.npy"} | options)
    (tmp_path / "in.npy").write_text("x")
    refused(ConfigError, "is read from", embed, folder, tmp_path / "in.npy", tmp_path / "in.npy")
    refused(OSError, "its folder is not there", embed, folder, tmp_path / "no" / "v.npy")
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    (sparse / "config_sentence_transformers.json").write_text('{"model_type": "SparseEncoder"}')
    given = sparse, folder / "rows.jsonl", tmp_path / "v.npy"
    refused(CheckpointError, "is a SparseEncoder, expected", bertfast.embed, *given)
    assert not [p for p in tmp_path.glob("*.partial")]


def test_a_plain_checkpoint_is_mean_pooled(folder, tmp_path):
    bertfast.embed(folder / "body", folder / "rows.jsonl", tmp_path / "v.npy", device="cpu")
    expected = st.SentenceTransformer(str(folder / "body"), device="cpu").encode(texts(), **OPTIONS)
    close(np.load(tmp_path / "v.npy"), expected)


def test_numbers_that_are_not_finite(folder, tmp_path):
    model = st.SentenceTransformer(str(folder / "model"), device="cpu")
    with torch.no_grad():
        model[0].model.embeddings.word_embeddings.weight[5 + WORDS.index("sun")] = torch.nan
    model.save(str(tmp_path / "model"), create_model_card=False)
    write(tmp_path / "rows.jsonl", [{"text": "cat"}, {"text": "the sun"}])
    refused(DataError, r"row 2 \(line 2\): its embedding has numbers that are not finite", embed,
            tmp_path, tmp_path / "v.npy")  # fmt: skip
