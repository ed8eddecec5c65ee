"""examples/ray_embed.py on this machine: two actors, of which one is killed, and a writer as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bertfast

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# The example, told where its processes die: an actor with a batch done but not yet returned, and a
# writer with its file half written, once each.
KILLS = """
import os, pathlib, runpy, signal, sys
import ray.data.dataset
folder = pathlib.Path(sys.argv.pop(1))

def die_once(name):
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

class Sink(ray.data.dataset.ParquetDatasink):
    def _write_parquet_files(self, tables, *args):
        super()._write_parquet_files([table[:-1] for table in tables], *args)
        if min(tables[0]["id"].to_pylist()) >= 128:
            die_once("writer")
        super()._write_parquet_files(tables, *args)

def embedder(plain):
    class Embedder(plain):
        def __call__(self, rows):
            found = super().__call__(rows)
            if 300 in rows["id"].to_pylist():
                die_once("actor")
            return found
    return Embedder

ray.data.dataset.ParquetDatasink = Sink
import ray_embed
ray_embed.Embedder = embedder(ray_embed.Embedder)
ray_embed.main()
"""


@pytest.mark.slow
def test_rows_are_written_once_although_workers_die(tmp_path, monkeypatch, frozen_minilm):
    pytest.importorskip("ray")
    import numpy as np
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from stdlib_text import docstrings

    texts = [t for name in ("os", "math", "re", "socket") for t in docstrings(name).values()]
    texts = [f"{i} {texts[i % len(texts)]}" for i in range(600)]
    (tmp_path / "texts").mkdir()
    for start in range(0, 600, 200):
        ids = list(range(start, start + 200))
        table = pa.table({"id": ids, "text": [texts[i] for i in ids]})
        pa.parquet.write_table(table, tmp_path / "texts" / f"{start}.parquet")
    (tmp_path / "vectors.partial").mkdir()  # left by a run that was killed as a whole
    pa.parquet.write_table(table, tmp_path / "vectors.partial" / "old.parquet")

    command = [sys.executable, "-c", KILLS, str(tmp_path), "--model", str(frozen_minilm)]
    command += ["--input", str(tmp_path / "texts"), "--output", str(tmp_path / "vectors")]
    command += ["--workers", "2", "--batch", "32", "--file-rows", "64", "--store", "80"]
    environment = os.environ | {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "actor").exists() and (tmp_path / "writer").exists()
    assert not (tmp_path / "vectors.partial").exists()

    rows = pa.dataset.dataset(tmp_path / "vectors").to_table().sort_by("id")
    assert rows["id"].to_pylist() == list(range(600)) and rows["text"].to_pylist() == texts
    found = np.stack(rows["embedding"].to_numpy())
    expected = bertfast.load_frozen(frozen_minilm).encode(texts)
    # int8's scales are of a token: what else is in the batch changes rounding alone.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
