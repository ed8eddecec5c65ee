"""`bertfast embed` that is stopped on its way: it goes on, or says why not."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from embedded import embed, make, write
from helpers import refused

from bertfast import embedding
from bertfast.data.errors import ConfigError
from bertfast.data.vectors import vectors

pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("embed"))


class StoppedError(Exception):
    pass


def stopped(folder, output, monkeypatch, chunks=2, **options):
    """A run that ends by an error after so many chunks."""
    step, left = embedding._finite, [chunks]

    def finite(*given):
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError
        step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "_finite", finite)
        with pytest.raises(StoppedError):
            embed(folder, output, "long.jsonl", batch_tokens=256, **options)


def test_a_run_goes_on(folder, tmp_path, monkeypatch):
    """Not one text anew, and to the bytes of an unbroken run; twice broken."""
    pytest.importorskip("pyarrow")
    options = {"batch_tokens": 256, "id_column": "id", "dtype": "int8"}
    embed(folder, tmp_path / "a.parquet", "long.jsonl", **options)
    given = []
    batches = embedding.TextEncoder.batches
    monkeypatch.setattr(
        embedding.TextEncoder, "batches", lambda self, t: given.extend(t) or batches(self, t)
    )
    output = tmp_path / "b.parquet"
    rest = {k: v for k, v in options.items() if k != "batch_tokens"}
    for _ in range(2):
        stopped(folder, output, monkeypatch, **rest)
        state = json.loads((tmp_path / "b.parquet.partial" / "state.json").read_text())
    assert state["done"] == 4 * 64 and not output.exists()
    # What was written after the state is dropped: half a row, an id.
    with open(tmp_path / "b.parquet.partial" / "rows", "ab") as f:
        f.write(b"half")
    with open(tmp_path / "b.parquet.partial" / "ids.jsonl", "ab") as f:
        f.write(b"999\n")
    given.clear()
    embed(folder, output, "long.jsonl", **options)
    assert len(given) == 3000 - 4 * 64
    for suffix in (".parquet", ".ranges.npy"):
        assert output.with_suffix(suffix).read_bytes() == (tmp_path / f"a{suffix}").read_bytes()
    assert not (tmp_path / "b.parquet.partial").exists()


def test_what_differs_is_refused(folder, tmp_path, monkeypatch):
    output, same = tmp_path / "v.npy", {"batch_tokens": 256}
    stopped(folder, output, monkeypatch)
    again = lambda **options: embed(folder, output, **{"source": "long.jsonl"} | same | options)
    for options in ({"dtype": "fp16"}, {"normalize": True}, {"batch_tokens": 512}):
        name = next(iter(options))
        refused(ConfigError, rf"{name} was .*, is .*--restart", again, **options)
    rows = [json.loads(line) for line in (folder / "long.jsonl").read_text().splitlines()]
    for change in (rows[1:], rows[:100], [{**rows[0], "text": "x"}, *rows[1:]]):
        write(tmp_path / "t.jsonl", change)
        refused(ConfigError, "is not what the 128 rows .* were made of.*--restart", again,
                source=tmp_path / "t.jsonl")  # fmt: skip
    other = tmp_path / "model"
    subprocess.run(["cp", "-r", str(folder / "model"), str(other)], check=True)
    os.symlink(folder / "long.jsonl", tmp_path / "long.jsonl")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    refused(ConfigError, "model was .*, is ", embed, tmp_path, output, "long.jsonl", **same)
    again()  # all that was no loss
    assert len(np.load(output)) == 3000
    stopped(folder, tmp_path / "w.npy", monkeypatch)
    embed(folder, tmp_path / "w.npy", "long.jsonl", normalize=True, restart=True)
    assert np.load(tmp_path / "w.npy") == pytest.approx(
        (lambda v: v / np.linalg.norm(v, axis=1, keepdims=True))(np.load(output)), abs=1e-5
    )


def test_an_output_in_the_models_folder(folder, tmp_path, monkeypatch):
    """What is written there is no change of the model."""
    output = folder / "model" / "v.npy"
    stopped(folder, output, monkeypatch)
    embed(folder, output, "long.jsonl", batch_tokens=256)
    embed(folder, tmp_path / "v.npy", "long.jsonl", batch_tokens=256)
    assert output.read_bytes() == (tmp_path / "v.npy").read_bytes()


def test_killed_between_the_output_and_the_end(folder, tmp_path, monkeypatch):
    output = tmp_path / "v.npy"
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr("bertfast.data.vectors.put", lambda *_: (_ for _ in ()).throw(StoppedError))
        embed(folder, output)
    os.rename(tmp_path / "v.npy.partial" / "rows", output)
    before = output.read_bytes()
    refused(ConfigError, "is there", embed, folder, output)
    assert output.read_bytes() == before and not (tmp_path / "v.npy.partial").exists()


def test_one_run_at_a_time(folder, tmp_path):
    with pytest.raises(StoppedError), vectors(tmp_path / "v.npy", {"dtype": "fp32"}):
        refused(
            BlockingIOError, "in use by another run.*--output", embed, folder, tmp_path / "v.npy"
        )
        raise StoppedError
    embed(folder, tmp_path / "v.npy")


def command(folder, output, pause=0.0):
    """pause: seconds before each chunk is written."""
    arguments = ["embed", "--model", folder / "model", "--input", folder / "long.jsonl"]
    arguments += ["--output", output, "--batch-tokens", "256", "--device", "cpu"]
    code = "import sys, time, bertfast.embedding as e; e.SYNC = 0.0; step = e._finite; "
    code += f"e._finite = lambda *a: time.sleep({pause}) or step(*a); "
    code += "from bertfast.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows_done(partial) -> int:
    state = partial / "state.json"
    return json.loads(state.read_text())["done"] if state.exists() else 0


@pytest.mark.seconds
def test_killed(folder, tmp_path):
    """Twice, at random moments, and interrupted once: each time the next run goes on."""
    whole, output = tmp_path / "a.npy", tmp_path / "b.npy"
    embed(folder, whole, "long.jsonl", batch_tokens=256)
    partial, r = tmp_path / "b.npy.partial", random.Random(0)
    for how in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
        # Slow enough not to end before this process gets its turn again.
        before, process = rows_done(partial), command(folder, output, pause=0.1)
        while process.poll() is None and rows_done(partial) == before:
            time.sleep(0.01)
        time.sleep(r.uniform(0, 0.2))
        process.send_signal(how)
        err = process.communicate()[1]
        assert before < rows_done(partial) < 3000 and not output.exists()
        if how == signal.SIGINT:
            assert process.returncode == 130 and "the same command goes on" in err
    process = command(folder, output)
    assert process.communicate() and process.returncode == 0
    assert output.read_bytes() == whole.read_bytes()
