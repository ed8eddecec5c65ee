"""The fenced blocks of a page of Markdown, and a run of them:

    python pages.py PAGE

runs the `python` blocks of a page in one session and each `bash` block by a shell of its own, in the
page's order and in the current folder, and stops at the first that fails. What a block writes comes
after a line that names it.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHELL = ("", "bash", "sh", "console")
RUN = re.compile(r"^#### block at line (\d+)$", re.MULTILINE)


class Block(NamedTuple):
    line: int  # of its fence
    language: str
    text: str
    skipped: str  # why it isn't run, of `<!-- not run: why -->` before it


def blocks(page: Path) -> list[Block]:
    found, lines, before = [], page.read_text().splitlines(), ""
    numbers = iter(range(len(lines)))
    for i in numbers:
        if fence := re.fullmatch(r"( *)```(.*)", lines[i]):
            end = next(j for j in range(i + 1, len(lines)) if lines[j] == fence[1] + "```")
            text = "".join(line[len(fence[1]) :] + "\n" for line in lines[i + 1 : end])
            skipped = re.fullmatch(r" *<!-- not run: (.+) -->", before)
            found.append(Block(i + 1, fence[2], text, skipped[1] if skipped else ""))
            for _ in range(end - i):
                next(numbers)
            before = ""
        elif lines[i].strip():
            before = lines[i]
    return found


def commands(text: str) -> list[str]:
    """The lines of a shell block, continued ones whole, without comments, prompts and the texts that
    it writes into files."""
    text = re.sub(r"(<<'EOF')\n.*?\nEOF$", r"\1", text, flags=re.DOTALL | re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    lines = [" ".join(re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").split()) for line in lines]
    return [line for line in lines if line]


def main(page: Path):
    session = {"__name__": "__main__"}
    for block in blocks(page):
        if block.skipped or block.language not in ("python", "bash"):
            continue
        print(f"#### block at line {block.line}", flush=True)
        if block.language == "python":
            # Errors name the page's own lines.
            code = "\n" * block.line + block.text
            exec(compile(code, page, "exec"), session)
            sys.stdout.flush()
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
