"""`bertfast embed`: its arguments, and the call of `bertfast.embed`."""

import argparse
import json

from .data.vectors import DTYPES
from .progress import Say

_ABOUT = (
    "Vectors of the texts of a table of any size, as sentence-transformers' encode gives them. "
    "What is done is kept in OUTPUT.partial until OUTPUT is whole: after a kill the same command "
    "goes on from there, without loss or repetition."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _ABOUT
    text = "folder or hub name: of sentence-transformers, or of transformers (mean pooling)"
    parser.add_argument("--model", required=True, help=text)
    text = ".jsonl, .csv, .tsv or .parquet, with .gz or not; - for JSON lines on stdin"
    parser.add_argument("--input", required=True, metavar="FILE", help=text)
    text = "FILE.npy, or FILE.parquet with the vectors in the column embedding"
    parser.add_argument("--output", required=True, metavar="FILE", help=text)
    text = "column of the texts (default: text)"
    parser.add_argument("--text-column", default="text", metavar="COLUMN", help=text)
    text = "column of texts or whole numbers that a .parquet output keeps"
    parser.add_argument("--id-column", metavar="COLUMN", help=text)
    for task in ("query", "document"):
        text = f"the texts are of this kind: its prompt, as encode_{task} has it"
        parser.add_argument(f"--{task}", dest="task", action="store_const", const=task, help=text)
    parser.add_argument("--prompt", metavar="TEXT", help="stands before each text")
    text = "the model's prompt of this name (default: the model's default, if any)"
    parser.add_argument("--prompt-name", metavar="NAME", help=text)
    text = "pack the weights for inference; int8 and bf16 round (default: as they are stored)"
    every = ("fp32", "bf16", "int8", "auto")
    parser.add_argument("--precision", choices=every, help=text)
    text = (
        "of the vectors (default: fp32); int8 and uint8 by each dimension's range over all texts, "
        "which goes into FILE.ranges.npy, for queries; binary and ubinary hold 8 dimensions a byte"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help=text)
    text = "keep the first N dimensions (default: the model's own)"
    parser.add_argument("--truncate-dim", type=int, metavar="N", help=text)
    text = "scale vectors to length 1, where the model doesn't do so itself"
    parser.add_argument("--normalize", action="store_true", help=text)
    text = "tokens in a batch, padding not counted (default: 4096, on a GPU 65536)"
    parser.add_argument("--batch-tokens", type=int, metavar="N", help=text)
    text = "default: a GPU where there is one and no --precision"
    parser.add_argument("--device", choices=("cpu", "cuda"), help=text)
    text = "drop what an earlier run did; replace an output that is there"
    parser.add_argument("--restart", action="store_true", help=text)


def run(args: argparse.Namespace, say: Say) -> None:
    from .embedding import embed

    skipped = ("command", "debug")
    found = embed(**{k: v for k, v in vars(args).items() if k not in skipped}, say=say)
    print(json.dumps(found, indent=2))
