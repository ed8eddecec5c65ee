"""`bertfast convert`: its arguments, and the call of `bertfast.convert.convert`."""

import argparse
import json

from .progress import Say

_ABOUT = (
    "A checkpoint of TensorFlow (google-research's BERT), or of transformers' former Flax and "
    "Keras classes, as a folder that transformers and bertfast load, with its tokenizer. None of "
    "these frameworks is needed; tf_model.h5 takes h5py."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _ABOUT
    text = (
        "its folder, or in it bert_model.ckpt (what stands before .index), flax_model.msgpack or "
    )
    text += "tf_model.h5"
    parser.add_argument("src", metavar="SRC", help=text)
    text = "folder to make; it appears whole or not at all"
    parser.add_argument("--out", required=True, metavar="DIR", help=text)
    text = "its configuration (default: bert_config.json or config.json beside it)"
    parser.add_argument("--config", metavar="FILE", help=text)
    text = "WordPiece vocabulary (default: the tokenizer's files beside it)"
    parser.add_argument("--vocab", metavar="FILE", help=text)
    case = parser.add_mutually_exclusive_group()
    text = "the tokenizer {} (default: as the files say, or the vocabulary shows)"
    for option, value, does in (
        ("--cased", False, "keeps upper case and accents"),
        ("--uncased", True, "lower-cases"),
    ):
        about = {"dest": "lowercase", "const": value, "help": text.format(does)}
        case.add_argument(option, action="store_const", **about)
    text = "transformers' class (default: the one that has a place for every head that is there)"
    parser.add_argument("--architecture", metavar="CLASS", help=text)
    text = "tensors to leave out, by name; * stands for any letters"
    parser.add_argument("--ignore", nargs="+", default=(), metavar="NAME", help=text)


def run(args: argparse.Namespace, say: Say) -> None:
    from .convert import convert

    skipped = ("command", "debug")
    found = convert(**{k: v for k, v in vars(args).items() if k not in skipped}, say=say)
    print(json.dumps(found, indent=2))
