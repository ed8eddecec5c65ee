"""`bertfast audit`: its arguments, and the calls of `bertfast.audit`."""

import argparse

from .audit.lexicons import BUILT_IN, DEFAULT
from .progress import Say

_KINDS = {
    "groups": "a classifier's figures by group: a column's values, or whose terms the text has",
    "swaps": "a classifier's answers when terms of a group become another's: counterfactuals",
    "pairs": "which of two sentences a masked language model prefers: CrowS-Pairs' format",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True)
    own = {"groups": _groups_arguments, "swaps": _swaps_arguments, "pairs": lambda parser: None}
    for kind, text in _KINDS.items():
        one = kinds.add_parser(kind, help=text, description=text)
        one.add_argument("--model", required=True, help="folder or hub name of the model")
        one.add_argument("--data", dest="path", required=True, metavar="FILE", help="a table")
        own[kind](one)
        one.add_argument("--allow-pickle", action="store_true", help="read pickled weights")
        one.add_argument("--device", choices=("cpu", "cuda"))
        text = "write all figures here too; - for stdout, in place of the table"
        one.add_argument("--json", metavar="FILE", help=text)


def _groups_arguments(parser):
    by = parser.add_mutually_exclusive_group(required=True)
    by.add_argument("--group-column", metavar="COLUMN", help="column of a row's group")
    _lexicon(by, "a row's group is the one whose terms its text has")
    text = "classes whose rates count, each against the others (default: of two the second)"
    parser.add_argument("--positive", nargs="+", metavar="CLASS", help=text)
    _classifier(parser, labelled=True)


def _swaps_arguments(parser):
    _lexicon(parser, "the terms to swap", default=DEFAULT)
    text = "examples of the largest shifts, in the JSON (default: 10)"
    parser.add_argument("--worst", type=int, default=10, metavar="N", help=text)
    _classifier(parser, labelled=False)


def _lexicon(parser, text, default=None):
    text += f": {', '.join(BUILT_IN)}, or a file of lines 'female | male', 'she | he', ..."
    text += f" (default: {' '.join(default)})" if default else ""
    parser.add_argument("--lexicon", nargs="+", metavar="NAME", default=default, help=text)


def _classifier(parser, labelled):
    from .train.tasks.classify_inference import inference_arguments

    text = "find the lexicon's terms in any case, as lower-cased texts need it"
    parser.add_argument("--ignore-case", action="store_true", help=text)
    text = "of the bootstrap (default: 1000)"
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    inference_arguments(parser, labelled)
    text = "pack the weights for inference on the CPU; int8 and bf16 round (see quantize)"
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), help=text)


def run(args: argparse.Namespace, say: Say) -> None:
    from . import audit
    from .audit import tables
    from .files import json_text
    from .train import outputs

    skipped = ("command", "debug", "kind", "json")
    read = args.path, args.model, *(getattr(args, "lexicon", None) or ())
    outputs.check_result(args.json, *read)
    settings = {k: v for k, v in vars(args).items() if k not in skipped}
    found = getattr(audit, args.kind)(**settings)
    if args.json != "-":
        print("\n".join(getattr(tables, args.kind)(found)))
    if args.json:
        outputs.write_result(args.json, json_text(found, indent=2) + "\n")
