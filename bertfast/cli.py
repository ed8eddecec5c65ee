"""The `bertfast` command: parses arguments and calls the library.

Data goes to stdout, progress and errors to stderr; exit 2 for wrong usage, 1 for a failure.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .arguments import Parser

_RESUME = "--resume auto goes on from the last checkpoint"
_OWN = {  # commands in a module of their own, which has add_arguments(parser) and run(args, say)
    "embed": (
        ".embedding_command",
        "vectors of a table's texts, as sentence-transformers' encode gives them",
    ),
    "convert": (
        ".convert_command",
        "a checkpoint of TensorFlow, Flax or Keras as one that transformers and bertfast load",
    ),
    "explain": (
        ".explain_command",
        "the words that a fine-tuned classifier's decisions rest on, as a page and as JSON",
    ),
    "audit": (
        ".audit_command",
        "what a model does differently for groups of people: figures, swaps, pairs",
    ),
    "verify": (".verify_command", "whether a run's files are as it left them"),
    "bench": (".bench.command", "times beside rivals, each after its outputs were checked"),
}


def _parser():
    parser = Parser(prog="bertfast", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"bertfast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what this installation is made of, and can do")
    info.add_argument("--json", action="store_true", help="as JSON")
    text = "a script for a shell that completes this command; evaluate it in the shell's profile"
    shell = commands.add_parser("completion", help=text, description=text)
    shell.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    text = "raw text to a tokenizer and token shards, for pretrain"
    _prepare_arguments(commands.add_parser("prepare", help=text, description=text))
    text = "a BERT from a prepared folder, from random weights or a checkpoint's"
    _pretrain_arguments(commands.add_parser("pretrain", help=text, description=text))
    text = "precisions of inference on a CPU: their accuracy and speed on a text, a folder of one"
    _quantize_arguments(commands.add_parser("quantize", help=text, description=text))
    for name, (module, text) in _OWN.items():
        own = commands.add_parser(name, help=text, description=text)
        import_module(module, __package__).add_arguments(own)
    for name, text, add in (
        ("finetune", "fine-tune a checkpoint on labelled text", _finetune_arguments),
        ("evaluate", "metrics of a fine-tuned model on labelled text", _evaluate_arguments),
        ("predict", "what a fine-tuned model says of texts", _predict_arguments),
    ):
        kinds = commands.add_parser(name, help=text).add_subparsers(dest="kind", required=True)
        for kind, task in _tasks().items():
            add(kinds.add_parser(kind, help=task.HELP, description=f"{text}: {task.HELP}"), task)
    return parser


def _tasks() -> dict:
    from .train import tasks

    return {kind: tasks.module(kind) for kind in tasks.KINDS}


def _prepare_arguments(parser):
    from .data.prepare import PrepareConfig

    _settings(parser, PrepareConfig)


def _pretrain_arguments(parser):
    from .train.config import PretrainConfig

    _run_arguments(parser, PretrainConfig, "--settings")  # --config is the model's


def _finetune_arguments(parser, task):
    _run_arguments(parser, task.Task.Config, "--config")


def _run_arguments(parser, settings, yaml_option):
    text = "YAML with any of these settings"
    parser.add_argument(yaml_option, dest="yaml", metavar="FILE", help=text)
    parser.add_argument("--print-config", action="store_true", help="print the settings and stop")
    text = "check everything, tell what the run would cost, keep nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    _settings(parser, settings)


def _settings(parser, settings):
    """An option for each field of a dataclass."""
    from .train.config import CHOICES

    for f in dataclasses.fields(settings):
        if "help" not in f.metadata:
            continue
        option = "--" + f.name.replace("_", "-")
        default = "" if f.default in (dataclasses.MISSING, None, "") else f.default
        text = f.metadata["help"] + (f" (default: {default})" if default != "" else "")
        # Unset options must not hide what --config says.
        common = {"default": argparse.SUPPRESS, "help": text}
        kinds = str(f.type if isinstance(f.type, str) else getattr(f.type, "__name__", f.type))
        if "bool" in kinds:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **common)
        elif "list" in kinds:
            parser.add_argument(option, nargs="+", metavar="FILE", **common)
        elif "dict" in kinds:
            common |= {"action": _Weights, "type": _weight, "metavar": "LABEL=WEIGHT"}
            parser.add_argument(option, nargs="+", **common)
        else:
            kind = float if "float" in kinds else int if "int" in kinds else str
            parser.add_argument(option, type=kind, choices=CHOICES.get(f.name), **common)


def _weight(text):
    label, _, weight = text.rpartition("=")
    try:
        return label, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected LABEL=WEIGHT") from None


class _Weights(argparse.Action):
    """Pairs of a label and its weight, as a dict."""

    def __call__(self, parser, namespace, values, option_string=None):
        weights = dict(values)
        if len(weights) < len(values):
            parser.error(f"argument {option_string}: a label stands twice; give each one weight")
        setattr(namespace, self.dest, weights)


def _model_arguments(parser, task, labelled):
    parser.add_argument("--model", required=True, help="folder of the model")
    task.inference_arguments(parser, labelled)
    parser.add_argument("--allow-pickle", action="store_true", help="read pickled weights")


def _inference_arguments(parser, task, labelled):
    _model_arguments(parser, task, labelled)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    text = "pack the weights for inference on the CPU; int8 and bf16 round (see quantize)"
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), help=text)


def _quantize_arguments(parser):
    _model_arguments(parser, _tasks()["classify"], labelled=False)
    text = "compare the precisions on a table of texts"
    parser.add_argument("--check", metavar="FILE", help=text)
    text = "freeze to one precision and write that, for bertfast.load_frozen"
    parser.add_argument("--out", metavar="FOLDER", help=text)
    text = "a classifier's labels (default: as evaluate's where the table has it; '' for none)"
    parser.add_argument("--label-column", help=text)
    every = ("fp32", "bf16", "int8", "auto")
    text = "those to compare (default: all), or that of --out (default: auto, the fastest that "
    text += "keeps the states of --check's texts, or of a sample)"
    parser.add_argument("--precision", nargs="+", choices=every, help=text)
    parser.add_argument("--batch-size", type=int, default=32, help="texts in a batch (default: 32)")
    text = "read N rows, evenly spread over the table (default: all)"
    parser.add_argument("--limit", type=int, metavar="N", help=text)
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")


def _evaluate_arguments(parser, task):
    _inference_arguments(parser, task, labelled=True)
    parser.add_argument("--data", required=True, help="labelled data")
    parser.add_argument("--json", metavar="FILE", help="write the metrics here, not to stdout")


def _predict_arguments(parser, task):
    _inference_arguments(parser, task, labelled=False)
    parser.add_argument("--input", required=True, help="a table, or - for JSON lines on stdin")
    text = "JSON lines here, by way of FILE.partial (default: - for stdout, as they come)"
    parser.add_argument("--output", default="-", metavar="FILE", help=text)
    from .train.networks import EVAL_TOKENS

    text = f"tokens in a batch (default: {EVAL_TOKENS})"
    parser.add_argument("--batch-tokens", type=int, default=EVAL_TOKENS, help=text)


def _given(args, settings) -> dict:
    """The fields of a dataclass that the command line sets."""
    names = [f.name for f in dataclasses.fields(settings)]
    return {n: getattr(args, n) for n in names if hasattr(args, n)}


def _prepare(args):
    from .data.prepare import PrepareConfig, prepare

    print(json.dumps(prepare(PrepareConfig(**_given(args, PrepareConfig)), _say), indent=2))


def _run_config(args, settings):
    """The settings of YAML and command line; None where they were only to be printed."""
    from .train.config import read_yaml

    values = read_yaml(args.yaml, settings) if args.yaml else {}
    values |= _given(args, settings)
    config = settings(**values)
    if args.print_config:
        import yaml

        print(yaml.safe_dump(config.as_dict(), sort_keys=False), end="")
        return None
    return config


def _pretrain(args):
    from .train.config import PretrainConfig

    config = _run_config(args, PretrainConfig)
    if config is None:
        return
    config.require("data", "out")
    from .files import json_text
    from .train import pretrain

    results = pretrain(config, dry_run=args.dry_run)
    if results and os.environ.get("RANK", "0") == "0":
        print(json_text(results["valid"] or results["train"]))


def _finetune(args):
    config = _run_config(args, _tasks()[args.kind].Task.Config)
    if config is None:
        return
    config.require("model", "train", "out")
    from .files import json_text
    from .train import finetune

    results = finetune(config, dry_run=args.dry_run)
    if results:
        part = results.get("test") or results["valid"]
        print(json_text({k: v for k, v in part.items() if not isinstance(v, dict)}))


_NOT_SETTINGS = {"debug", "command", "kind", "model", "data", "json", "input", "output"}


def _inference_settings(args) -> dict:
    return {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}


def _evaluate(args):
    from .files import json_text
    from .train import outputs

    outputs.check_result(args.json, args.data, args.model)
    evaluate = _tasks()[args.kind].evaluate
    result = evaluate(args.model, args.data, **_inference_settings(args))
    outputs.write_result(args.json, json_text(result, indent=2) + "\n")


def _predict(args):
    from .files import json_text
    from .train import outputs

    outputs.check_result(args.output, args.input, args.model)
    settings = _inference_settings(args)
    rows = _tasks()[args.kind].predict_table(args.model, args.input, **settings, say=_say)
    outputs.write_lines(args.output, map(json_text, rows))


def _quantize(args):
    from . import quantize
    from .files import json_text
    from .train import outputs
    from .train.config import ConfigError

    if not args.check and not args.out:
        raise ConfigError("give --check FILE, to compare precisions, or --out FOLDER, to write one")
    names = ("text_column", "text_pair_column", "label_column", "max_length", "allow_pickle")
    settings, chosen = {name: getattr(args, name) for name in names}, args.precision
    if args.out:
        _quantize_to(args.out, chosen or ["auto"], args)
        return
    if chosen and "auto" in chosen:
        raise ConfigError("--precision auto is for --out; --check compares the others")
    outputs.check_result(args.json, args.check, args.model)
    result = quantize.report(
        args.model,
        args.check,
        precisions=chosen or quantize.PRECISIONS,
        **settings,
        batch_size=args.batch_size,
        limit=args.limit,
        say=_say,
    )
    print(quantize.table(result))
    if args.json:
        outputs.write_result(args.json, json_text(result, indent=2) + "\n")


def _quantize_to(out, precisions, args):
    from . import data, quantize
    from .train.config import ConfigError

    if len(precisions) > 1:
        raise ConfigError(f"--out takes one precision, not {', '.join(precisions)}")
    texts = None
    if args.check:
        column = args.text_column or "text"
        texts = [t for t in data.read_table(args.check, [column])[column] if t]
    layers = quantize.save(args.model, out, *precisions, texts, args.allow_pickle)
    _say(f"{out}: {layers}")


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _info(args):
    from . import build_info
    from .encoder.run import served
    from .ops import registry

    found = build_info() | {"backends": registry.served(), "executors": served()}
    if args.json:
        print(json.dumps(found, indent=2))
        return
    backends, executors = found.pop("backends"), found.pop("executors")
    rows = {name.replace("_", " "): value for name, value in found.items()}
    if found.get("cuda_built") is False:
        rows["cuda built"] = "no: a GPU runs the Triton kernels (BERTFAST_CUDA=on builds CUDA's)"
    for name, why in executors.items():
        rows[f"executor {name}"] = f"not here: {why}" if why else "ready"
    rows |= {f"backends of {name}": own for name, own in backends.items()}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {', '.join(value) if isinstance(value, list | tuple) else value}")


def _completion(args):
    import shtab

    print(shtab.complete(_parser(), args.shell))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    args = _parser().parse_args(argv)
    from .train.config import ConfigError
    from .train.ranks import leave, require_one_process

    commands = {"finetune": _finetune, "evaluate": _evaluate, "predict": _predict, "info": _info}
    commands |= {"completion": _completion, "prepare": _prepare, "pretrain": _pretrain}
    commands["quantize"] = _quantize
    try:
        if args.command not in ("info", "completion", "pretrain", "finetune"):
            require_one_process(args.command)
        if args.command in _OWN:
            import_module(_OWN[args.command][0], __package__).run(args, _say)
        else:
            commands[args.command](args)
        leave()
    except ConfigError as e:
        print(f"bertfast: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = {"embed": "the same command goes on where it stopped"}
        how |= dict.fromkeys(("finetune", "pretrain"), _RESUME)
        print(
            "; ".join(["bertfast: interrupted", *filter(None, [how.get(args.command)])]),
            file=sys.stderr,
        )
        return 130
    except ImportError as e:
        print(f"bertfast: {e}; install it with: pip install 'bertfast[train]'", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError, LookupError) as e:
        if args.debug:
            raise
        print(f"bertfast: {e}", file=sys.stderr)
        return 1
    return 0
