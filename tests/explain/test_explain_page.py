"""The page: nothing from elsewhere, escaped, legible without colour, and within the window."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from bertfast.explain import METHODS, explain, page

pytest.importorskip("captum")
HARD = '  red <script>alert(1)</script> & "dog" \n\n cat\u0301 \u05d0\u05d1\u05d2 ' + "walk" * 60
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture(scope="module")
def results(colours):
    return explain(colours, [HARD, "blue stone", "red cat dog " * 9], methods=METHODS, device="cpu")


@pytest.fixture(scope="module")
def made(results):
    settings = {"methods": METHODS, "target": None, "baseline": "mask", "occlusion": "mask"}
    settings |= {"steps": 32, "max_steps": 512, "max_length": 16}
    about = {"model": "a <model>", "classes": ["blue", "green", "red"], "settings": settings}
    own = {"complete": 2, "largest_error": 0.3, "mean_steps": 32.0}
    about |= {"cut_texts": 1, "left_out": 4, "methods": {"integrated_gradients": own}}
    one = {"spearman": -0.1, "spearman_of_absolute": None, "texts": 2}
    return page(results, about | {"sanity": dict.fromkeys(METHODS, one)})


class Reader(html.parser.HTMLParser):
    """Tags, and the text in elements of class `text`."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.depth, self.skip = [], [], 0, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "div" and attrs.get("class") == "text":
            self.texts.append("")
            self.depth = 1
        self.skip = tag == "b"

    def handle_endtag(self, tag):
        self.depth = 0 if tag == "div" else self.depth
        self.skip = False

    def handle_data(self, data):
        if self.depth and not self.skip:
            self.texts[-1] += data


def test_texts_are_whole_and_nothing_is_fetched(made, results):
    read = Reader(made)
    assert read.texts == [r["text"] for r in results for _ in METHODS]
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in read.tags}
    assert not re.search(r"https?:|url\(|@import|\bon\w+=", made)
    assert "a &lt;model&gt;" in made and "<script" not in made
    assert all(a["href"].startswith("#") for tag, a in read.tags if tag == "a")
    assert "prefers-color-scheme: dark" in made


def test_what_is_short_is_said(made):
    text = re.sub(r"<[^>]+>", "", made)
    assert "Rows that are not here: 4" in text and "2 of 3 texts within 1 %" in text
    assert "cut at 16 tokens" in text and "Words that are not read: " in text
    assert "none" in text and "−0.10" in text  # noqa: RUF001


def test_signs_without_colour(made, results):
    """The largest score has a mark, its side's bar and its side's underline."""
    for result in results:
        for method in METHODS:
            word = max(result["words"], key=lambda w: abs(w["scores"][method] or 0))
            score = word["scores"][method]
            side, mark = ("p", "+") if score >= 0 else ("n", "−")  # noqa: RUF001
            assert f'<span class="w {side} m" style="--s:1.000" title="{score:+.4g}">' in made
            assert f"</span><b>{mark}</b>" in made
    rules = dict(re.findall(r"^\s*(\.[pn]\S*|\.[pn]\.m > span) \{(.*?)\}", made, re.M | re.S))
    assert "repeating-linear-gradient" in rules[".n::after"] and "wavy" in rules[".n.m > span"]
    assert "gradient" not in rules[".p::after"] and "wavy" not in rules[".p.m > span"]


PROBE = """<script>addEventListener('load', () => {
  const words = [...document.querySelectorAll('section .w')];
  const bar = (w, k) => parseFloat(getComputedStyle(w, '::after')[k]);
  document.body.dataset.found = JSON.stringify({
    words: words.length, wide: document.documentElement.scrollWidth - innerWidth,
    out: words.filter(w => { const r = w.getBoundingClientRect();
      return r.left < 0 || r.right > innerWidth || !r.width; }).length,
    tall: Math.max(...words.map(w => bar(w, 'height'))),
    texts: [...document.querySelectorAll('section .text')].length,
    paper: getComputedStyle(document.body).backgroundColor });
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", (1200, 500))
def test_in_a_browser(made, results, tmp_path, width):
    """What a script that this test puts in finds; the page's own rule lets none run."""
    file = tmp_path / "page.html"
    rule = re.search(r"<meta http-equiv.*?>\n", made)[0]
    file.write_text(made.replace(rule, "").replace("</head>", PROBE + "</head>"), encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    found = json.loads(html.unescape(re.search(r'data-found="(.*?)"', done.stdout)[1]))
    read = sum(w["scores"]["occlusion"] is not None for r in results for w in r["words"])
    assert found["words"] == read * len(METHODS) and found["texts"] == 3 * len(METHODS)
    assert found["wide"] <= 0 and found["out"] == 0 and found["tall"] > 5
    assert found["paper"] in ("rgb(255, 255, 255)", "rgb(22, 22, 22)")
