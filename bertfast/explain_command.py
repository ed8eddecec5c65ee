"""`bertfast explain`: its arguments, and the call of `bertfast.explain.explain_table`."""

import argparse
import json

from .progress import Say

_ABOUT = (
    "Words' scores for what a fine-tuned classifier (or regressor) says of each text of a table, "
    "as one page of HTML that needs no network, and as JSON lines. What is short (a text cut off, "
    "a sum that misses the output's change) stands on the page and on stderr."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .explain.occlusion import WAYS
    from .explain.settings import BASELINES, METHODS, Settings
    from .train.tasks.classify_inference import inference_arguments

    parser.description = _ABOUT
    parser.add_argument("--model", required=True, help="folder of a fine-tuned classifier")
    text = "a table of texts, or - for JSON lines on stdin"
    parser.add_argument("--input", required=True, metavar="FILE", help=text)
    parser.add_argument("--out", metavar="FILE.html", help="the page")
    text = "JSON lines of words, offsets and scores; - for stdout, as they come"
    parser.add_argument("--json", metavar="FILE", help=text)
    own = Settings()
    text = f"one or more (default: {' '.join(own.methods)}, which takes bertfast[explain])"
    parser.add_argument("--method", dest="methods", nargs="+", choices=METHODS, help=text)
    text = "explain this class's output (default: of each text the most probable one)"
    parser.add_argument("--target", metavar="CLASS", help=text)
    text = "what stands for every word at integrated gradients' start (default: mask)"
    parser.add_argument("--baseline", choices=BASELINES, default=own.baseline, help=text)
    text = "what occlusion does with a word (default: mask)"
    parser.add_argument("--occlusion", choices=WAYS, default=own.occlusion, help=text)
    text = f"of integrated gradients, doubled until sums are within 1 %% (default: {own.steps})"
    parser.add_argument("--steps", type=int, default=own.steps, metavar="N", help=text)
    text = f"steps at most (default: {own.max_steps})"
    parser.add_argument("--max-steps", type=int, default=own.max_steps, metavar="N", help=text)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows alone")
    text = "compare with a model of random weights: scores that stay alike say nothing of this one"
    parser.add_argument("--sanity", action="store_true", help=text)
    inference_arguments(parser, labelled=False)
    parser.add_argument("--allow-pickle", action="store_true", help="read pickled weights")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    text = "pack the weights on the CPU, for --method occlusion; int8 and bf16 round"
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), help=text)
    text = f"tokens in a batch (default: {own.batch_tokens})"
    parser.add_argument("--batch-tokens", type=int, default=own.batch_tokens, help=text)


def run(args: argparse.Namespace, say: Say) -> None:
    from .explain import Settings, explain_table

    given = {k: v for k, v in vars(args).items() if k not in ("command", "debug", "input")}
    given["methods"] = given["methods"] or Settings.methods
    found = explain_table(given.pop("model"), args.input, **given, say=say)
    print_to = say if args.json == "-" else print
    print_to(json.dumps(found, indent=2))
