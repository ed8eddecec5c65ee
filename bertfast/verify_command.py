"""`bertfast verify`: its arguments, and the call of `bertfast.verify.verify`."""

import argparse

from .progress import Say

_ABOUT = (
    "Compares the files of a run of finetune or pretrain, or of a frozen model, with the SHA-256 "
    "sums that were recorded when it was written. Each file that changed, is gone, or was added "
    "where it might be loaded is a line on stdout; the exit code is then 1."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _ABOUT
    parser.add_argument("run", metavar="RUN", help="the folder")
    text = "compare the run's input files too, those that are still where they were"
    parser.add_argument("--inputs", action="store_true", help=text)


def run(args: argparse.Namespace, say: Say) -> None:
    from .verify import verify

    found = verify(args.run, args.inputs)
    for one in found.bad:
        print(one)
    if found.unknown:
        say(f"not compared: {', '.join(found.unknown)}")
    for name, digest in found.manifests.items():
        say(f"{name}: {digest}")
    if found.bad:
        raise ValueError(f"{args.run}: {len(found.bad)} files are not as they were recorded")
    print(f"{len(found.checked)} files are as they were recorded")
