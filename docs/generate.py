"""What no page of the site says: the command line, out of its parsers; and docstrings whose
sections of one line stand out."""

import argparse
import re

import griffe

from bertfast.cli import _parser

_SECTION = re.compile(r"^(Returns|Raises): (?=\S)", re.MULTILINE)


def on_page_markdown(markdown, page, **_):
    if page.file.src_uri != "reference/command_line.md":
        return markdown
    return "\n".join([markdown, *_commands(_parser())])


def _commands(parser: argparse.ArgumentParser):
    """Lines of Markdown, of a command and those in it."""
    formatter, inner = parser._get_formatter(), {}
    if " " in parser.prog:
        yield from ("", f"## {parser.prog}", "", _plain(parser.description or ""), "")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            inner = action.choices
            helps = {one.dest: one.help or "" for one in action._choices_actions}
            for name, one in inner.items():
                anchor = one.prog.replace(" ", "-")
                yield f"- [`{name}`](#{anchor}): {_plain(helps.get(name, ''))}"
        elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            text = formatter._expand_help(action) if action.help else ""
            invocation = formatter._format_action_invocation(action)
            required = " (required)" if action.required and action.option_strings else ""
            yield f"- `{invocation}`{required}: {_plain(text)}".rstrip(": ")
    for command in inner.values():
        yield from _commands(command)


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>{}#|])", r"\\\1", text)


class Docstrings(griffe.Extension):
    """`Returns: it.` on one line is no section to griffe."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = _SECTION.sub(r"**\1:** ", obj.docstring.value)
