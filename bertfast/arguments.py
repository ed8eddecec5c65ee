"""Command lines that say what might have been meant."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message that names what is nearest of the known, or nothing."""
    found = difflib.get_close_matches(name, [*known], n=1)
    return f"; did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors name the nearest option or choice."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # here, not in the outermost parser, which doesn't know a command's options
            near = nearest(rest[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{near}")
        return found, rest

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as e:
            near = nearest(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"{e.message}{near}") from None
