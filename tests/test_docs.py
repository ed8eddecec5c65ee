"""The site of `make docs`: whole, with links that lead somewhere, and nothing from elsewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import bertfast

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/]+\.md$", NAV, re.MULTILINE)
    assert sorted(listed) == [path.relative_to(DOCS).as_posix() for path in PAGES]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_links_lead_to_files(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.partition("#")[0]
        if not urlsplit(link).scheme and target:
            assert (path.parent / target).resolve().is_relative_to(DOCS), (
                f"{link} is not on the site"
            )
            assert (path.parent / target).exists(), link


def test_reference_has_every_public_name():
    texts = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    documented = {
        name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", texts, re.MULTILINE)
    }
    assert {*bertfast.__all__} - documented == set()
    assert {*bertfast.ops.__all__} - documented == {"registry"}


def test_reference_has_every_environment_variable():
    code = [*(ROOT / "bertfast").rglob("*.py"), ROOT / "setup.py", ROOT / "csrc" / "dispatch.cpp"]
    read = re.compile(r"(?:environ|getenv).*?(BERTFAST_[A-Z_]+)")
    found = {name for path in code for name in read.findall(path.read_text())}
    text = (DOCS / "reference" / "environment.md").read_text()
    assert found == {*re.findall(r"^\| `(BERTFAST_\w+)`", text, re.MULTILINE)}


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if found.get(LOADED.get(tag)) and found.get("rel") != "canonical":
            self.loaded.append(found[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Path of a page -> the page, of all that mkdocs makes."""
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(PAGES) < len([*folder.rglob("*.html")])  # and 404.html
    return {path: Page(path) for path in folder.rglob("*.html")}, folder


@pytest.mark.slow
def test_site_loads_nothing_from_elsewhere(site):
    pages, folder = site
    for path, page in pages.items():
        assert page.loaded
        for address in page.loaded:
            scheme, host, *_ = urlsplit(address)
            assert not host and scheme in ("", "data"), f"{path.name} loads {address}"
    for path in folder.rglob("*.css"):
        for address in re.findall(r"url\(([^)]+)\)|@import\s+([^;]+)", path.read_text()):
            assert not re.match(r"[\"']?(https?:)?//", "".join(address)), f"{path}: {address}"


@pytest.mark.slow
def test_site_has_what_its_links_name(site):
    pages, _ = site
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # whose links are the server's root's
        for link in page.links:
            scheme, host, target, _, anchor = urlsplit(link)
            if scheme or host:
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            assert there.is_file(), f"{path.name}: {link}"
            if anchor and there in pages:
                assert unquote(anchor) in pages[there].ids, f"{path.name}: {link}"
