"""Embed Parquet on many machines: Ray Data's actors map one frozen model each.

    bertfast quantize --model MODEL --precision int8 --out small
    python examples/ray_embed.py --model small --input texts/ --output vectors/ --workers 2
    python examples/ray_embed.py ... --address auto   # a cluster that runs; else this machine

The output has the input's columns and `embedding`. Every row is written once, also where workers
die: Ray Data restarts an actor and gives it its batches again, and a file's name follows from its
write task, so that a task that runs again replaces what its first attempt left. The rows lie in
OUTPUT.partial until they have been counted; a run that was killed as a whole starts anew. Model,
input and output must be what every machine sees under the same name.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine

import pyarrow as pa
import pyarrow.dataset
import ray


class Embedder:
    """One actor: a frozen model, whose pages it shares with the machine's others, and threads."""

    def __init__(self, model: str, threads: int, column: str):
        import torch

        import bertfast

        torch.set_num_threads(threads)
        self.model, self.column = bertfast.load_frozen(model), column

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows with `embedding` float32 [dim]."""
        vectors = self.model.encode(rows[self.column].to_pylist(), show_progress_bar=False)
        column = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), vectors.shape[1])
        return rows.append_column("embedding", column)


def embed(args) -> int:
    """Writes args.output; returns how many rows. Raises RuntimeError where some are missing."""
    source, partial = pa.dataset.dataset(args.input), f"{args.output}.partial"
    # Blocks of a batch each, or a small file would be one actor's alone.
    rows = ray.data.read_parquet(args.input).repartition(target_num_rows_per_block=args.batch)
    rows = rows.map_batches(
        Embedder,
        fn_constructor_args=(args.model, args.threads, args.column),
        batch_size=args.batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.threads,
    )
    # A writer waits for bytes, not for a core: no core has to stay free of actors for it.
    rows.write_parquet(
        partial,
        mode="overwrite",
        min_rows_per_file=args.file_rows,
        ray_remote_args={"num_cpus": 0},
    )
    written, expected = pa.dataset.dataset(partial).count_rows(), source.count_rows()
    if written != expected:
        raise RuntimeError(f"{partial} has {written} rows, expected {expected}: run it again")
    os.rename(partial, args.output)
    return written


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a frozen SentenceTransformer's folder")
    parser.add_argument("--input", required=True, help="a Parquet file or a folder of them")
    parser.add_argument("--output", required=True, type=Path, help="a folder to be")
    parser.add_argument("--column", default="text")
    parser.add_argument("--workers", type=int, default=2, help="actors, on all machines together")
    parser.add_argument("--threads", type=int, default=1, help="of each actor")
    parser.add_argument("--batch", type=int, default=1024, help="rows an actor is given at a time")
    parser.add_argument("--file-rows", type=int, default=16_384, help="of an output file, or more")
    parser.add_argument("--address", help="of a Ray cluster; without it one is started here")
    parser.add_argument("--store", type=int, default=256, help="MiB of shared memory, without it")
    args = parser.parse_args(argv)
    args.model, args.input = os.path.abspath(args.model), os.path.abspath(args.input)
    args.output = args.output.absolute()
    return args


def main():
    args = arguments()
    if args.output.exists():
        raise SystemExit(f"{args.output} exists: remove it, or give another --output")
    if args.address:
        ray.init(args.address)
    else:
        ray.init(
            num_cpus=args.workers * args.threads + 1,  # one reads
            object_store_memory=args.store << 20,
            include_dashboard=False,
        )
    print(f"{embed(args)} rows in {args.output}")


if __name__ == "__main__":
    main()
