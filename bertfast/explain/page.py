"""Results as one page of HTML, without scripts and without anything from elsewhere."""

from html import escape

from .style import CSS

MARKED = 0.25  # of a text's largest score: words from here on have a sign
TITLES = {
    "integrated_gradients": "Integrated gradients",
    "occlusion": "Occlusion",
    "gradient_attention": "Gradient x attention",
    "attention_rollout": "Attention rollout",
}
_ABOUT = {
    "integrated_gradients": "a word's part in the change of the target's logit from a text of "
    "{baseline} tokens to this one; the parts sum to that change, but for the error told",
    "occlusion": "how much the target's {output} falls when the word is {gone}",
    "gradient_attention": "attention maps times their gradients, positive parts alone: how much a "
    "word's state went into the target, never against it",
    "attention_rollout": "attention maps multiplied through the layers: how much of a word reaches "
    "the decision's state, the same for every class; no sign",
}


def page(results: list[dict], about: dict) -> str:
    """UTF-8 text of an HTML document.

    Args:
        results: `explain`'s.
        about: "model", "classes", "settings" (`Settings`' fields and max_length), and perhaps
            "cut_texts", "left_out", "methods" (see `explain_table`), "sanity".
    """
    body = [f"<h1>What {escape(about['model'])} decides by</h1>", *_head(results, about)]
    if len(results) > 1:
        body += _contents(results)
    for number, result in enumerate(results, 1):
        body += _result(number, result, about)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(about['model'])}: words and scores</title>",
            f"<style>{CSS}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def _head(results, about) -> list[str]:
    s = about["settings"]
    words = {"baseline": s["baseline"], "output": "probability" if about["classes"] else "value"}
    words["gone"] = {"mask": "masked", "delete": "deleted"}[s["occlusion"]]
    named = [f"<li><b>{TITLES[m]}</b>: {_ABOUT[m].format(**words)}.</li>" for m in s["methods"]]
    lines = [f"<p>{_facts(results, about)}</p>", "<ul>", *named, "</ul>", _LEGEND]
    if about.get("left_out"):
        lines.append(f'<p class="bad">Rows that are not here: {about["left_out"]:,}.</p>')
    if about.get("cut_texts"):
        lines.append(
            f'<p class="bad">Texts with words that are not read (cut at {s["max_length"]} '
            f"tokens, or nothing to its tokenizer): {about['cut_texts']:,}.</p>"
        )
    own = about.get("methods", {}).get("integrated_gradients")
    if own:
        missing = len(results) - own["complete"]
        lines.append(
            f"<p{' class=bad' * bool(missing)}>Completeness: {own['complete']:,} of "
            f"{len(results):,} texts within 1 %, the largest error {own['largest_error']:.2%}, "
            f"{own['mean_steps']:.0f} steps on average (at most {s['max_steps']}).</p>"
        )
    return lines + _sanity(about.get("sanity"))


_LEGEND = (
    '<p>Legend: <span class="text"><span class="w p m" style="--s:1"><span>word</span><b>+</b>'
    "</span></span> speaks for the target: a full bar above the line, a straight underline; "
    '<span class="text"><span class="w n m" style="--s:1"><span>word</span><b>−</b></span></span> '  # noqa: RUF001
    "speaks against it: a hatched bar below the line, a wavy underline. Bars are as high as the "
    f"score beside the text's largest; signs and underlines stand from {MARKED:.0%} of it on. "
    '<span class="u">word</span> is not read by the model. Scores appear where the pointer '
    "rests.</p>"
)


def _facts(results, about) -> str:
    s = about["settings"]
    classes = ", ".join(map(escape, about["classes"])) or "a number"
    target = "the most probable class of each text" if s["target"] is None else escape(s["target"])
    facts = {"Texts": f"{len(results):,}", "classes": classes}
    if about["classes"]:
        facts["target"] = target
    facts["longest"] = f"{s['max_length']} tokens"
    return "; ".join(f"{name}: {value}" for name, value in facts.items()) + "."


def _sanity(found) -> list[str]:
    if not found:
        return []
    rows = [
        f"<tr><td>{TITLES[m]}</td><td>{_number(one['spearman'])}</td>"
        f"<td>{_number(one['spearman_of_absolute'])}</td><td>{one['texts']:,}</td></tr>"
        for m, one in found.items()
    ]
    return [
        "<p>Sanity: Spearman's correlation of words' scores with those of the same model with "
        "random weights. Near 1, a method would say nothing of what was learnt.</p>",
        '<div class="scroll"><table><tr><th>method</th><th>scores</th><th>absolute scores</th>'
        "<th>texts</th></tr>",
        *rows,
        "</table></div>",
    ]


def _number(value) -> str:
    return "none" if value is None else f"{value:+.2f}".replace("-", "−")  # noqa: RUF001


def _contents(results) -> list[str]:
    """A table of the texts, with the words of largest scores by the first method."""
    lines = ['<div class="scroll"><table><tr><th>row</th><th>decision</th><th>for</th>'
             "<th>against</th></tr>"]  # fmt: skip
    for number, result in enumerate(results, 1):
        method = next(iter(result["methods"]))
        scored = [(w["scores"][method] or 0.0, w["text"]) for w in result["words"]]
        best = [t for s, t in sorted(scored, reverse=True) if s > 0][:3]
        worst = [t for s, t in sorted(scored) if s < 0][:3]
        cells = escape(_decision(result)), *(escape(", ".join(t)) for t in (best, worst))
        lines.append(f'<tr><td><a href="#t{number}">{result["row"]}</a></td>'
                     + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")  # fmt: skip
    return [*lines, "</table></div>"]


def _decision(result) -> str:
    if "value" in result:
        return f"{result['value']:.4g}"
    text, predicted = f"{result['target']} {result['probability']:.1%}", result["predicted"]
    if predicted != result["target"] and predicted != [result["target"]]:
        shown = ", ".join(predicted) or "no class" if isinstance(predicted, list) else predicted
        text += f" (predicted: {shown})"
    return text


def _result(number, result, about) -> list[str]:
    lines = [f'<section id="t{number}">', f"<h2>Row {result['row']}: {escape(_decision(result))}"
             "</h2>"]  # fmt: skip
    if result["unread_words"]:
        lines.append(f'<p class="bad">Words that are not read: {result["unread_words"]:,}.</p>')
    for method, own in result["methods"].items():
        lines.append(f'<p class="quiet">{TITLES[method]}{escape(_said(own))}</p>')
        largest = max((abs(w["scores"][method] or 0.0) for w in result["words"]), default=0.0)
        for side, name in enumerate(("text", "pair")):
            if name in result:
                words = [w for w in result["words"] if w.get("side", 0) == side]
                lines.append(_text(result[name], words, method, largest))
    return [*lines, "</section>"]


def _said(own) -> str:
    if "completeness_error" not in own:
        return f", of other tokens {own['rest']:.3g}" if "rest" in own else ""
    text = f": logit {own['logit']:.4g}, of the baseline {own['baseline_logit']:.4g}; "
    text += f"completeness error {own['completeness_error']:.2%} after {own['steps']} steps"
    return text if own["complete"] else text + ", MORE THAN 1 %: don't rely on the scores"


def _text(text, words, method, largest) -> str:
    parts, at = [], 0
    for word in words:
        parts += [escape(text[at : word["start"]]), _word(word, method, largest)]
        at = word["end"]
    return f'<div class="text" dir="auto">{"".join(parts)}{escape(text[at:])}</div>'


def _word(word, method, largest) -> str:
    score, shown = word["scores"][method], escape(word["text"])
    if score is None:
        return f'<span class="u" title="not read">{shown}</span>'
    share = abs(score) / largest if largest else 0.0
    marked = share >= MARKED
    sign = "p" if score >= 0 else "n"
    mark = f"<b>{'+' if sign == 'p' else '−'}</b>" if marked else ""  # noqa: RUF001
    return (
        f'<span class="w {sign}{" m" * marked}" style="--s:{share:.3f}" title="{score:+.4g}">'
        f"<span>{shown}</span>{mark}</span>"
    )
