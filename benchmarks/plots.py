"""Pictures of the results, as PNG: bertfast in one colour, rivals in grey, labels at the marks."""

from pathlib import Path

import numpy as np

OURS, RIVAL, INK, FAINT = "#d9480f", "#c3c8ce", "#30363d", "#8b949e"
PRECISIONS = ("fp32", "bf16", "int8")
STYLE = {
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
}


def figure(width, height, title, subtitle=""):
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=110)
    text = f"{title}\n{subtitle}" if subtitle else title
    made.suptitle(text, x=0.01, ha="left", fontsize=11, color=INK)
    return made


def color(name: str) -> str:
    return OURS if name.startswith("bertfast") else RIVAL


def human(value: float) -> str:
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"


def bars(axes, rows, field, unit, places):
    """A horizontal bar for each row that has the field, the best at the top, its value beside it;
    rows arrive best first. `places`: bars that there is room for."""
    rows = [row for row in rows if field in row][::-1]
    values = [row[field] for row in rows]
    axes.barh([row["name"] for row in rows], values, color=[color(row["name"]) for row in rows])
    for i, value in enumerate(values):
        axes.text(
            value,
            i,
            f" {(short if unit else human)(value)}{unit}",
            va="center",
            fontsize=8,
            color=INK,
        )
    for label in axes.get_yticklabels():
        if label.get_text().startswith("bertfast"):
            label.set(color=OURS, fontweight="bold")
    axes.set_xlim(0, 1.2 * max(values, default=1))
    axes.set_ylim(len(rows) - places - 0.5, len(rows) - 0.4)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(length=0)


def bar_grid(cells, row_of, field, unit, title, subtitle):
    """A panel for each cell: a row for each of row_of(cell), a column for each precision."""
    across = [p for p in PRECISIONS if any(c["precision"] == p for c in cells)]
    down = list(dict.fromkeys(map(row_of, cells)))
    most = [
        max(sum(field in r for r in c["rows"]) for c in cells if row_of(c) == row) for row in down
    ]
    height = sum(most) * 0.26 + 0.45 * len(down) + 0.6
    made = figure(4.2 * len(across) + 0.4, height, title, subtitle)
    ratios = {"height_ratios": [m + 0.5 for m in most]}
    grid = made.subplots(len(down), len(across), squeeze=False, gridspec_kw=ratios)
    for i, row in enumerate(down):
        for j, precision in enumerate(across):
            axes = grid[i][j]
            found = [c for c in cells if (row_of(c), c["precision"]) == (row, precision)]
            if not found:
                axes.set_axis_off()
                continue
            bars(axes, found[0]["rows"], field, unit, most[i])
            axes.set_title(f"{row}, {precision}" if row else precision, color=INK, fontsize=8)
    return made


def workload(cell) -> str:
    """The task without what all have in common."""
    return cell["task"].replace(" inference", "").rsplit(", ", 1)[0]


def speed(result):
    cells = [c for c in result["cells"] if "-1x" not in c["workload"]]
    if not cells:
        return None
    return bar_grid(
        *(cells, workload, "tokens_per_second", ""),
        "Encoder inference: useful tokens a second",
        f"longer is better; padding isn't counted; {device(result)}",
    )


def latency(result):
    cells = [c for c in result["cells"] if "-1x" in c["workload"]]
    if not cells:
        return None
    return bar_grid(
        *(cells, workload, "milliseconds", " ms"),
        "One sequence at a time: milliseconds",
        f"shorter is better; {device(result)}",
    )


def memory(result):
    return bar_grid(
        *(result["cells"], lambda cell: "", "inference_peak_mb", " MB"),
        "Peak memory of inference: BERT-base, 8 x 128 tokens",
        f"shorter is better; weights included, what the imports take left out; {device(result)}",
    )


def device(result) -> str:
    threads = result["device"].get("threads")
    if threads is None:  # a GPU
        return result["device"]["name"]
    isa = result["build"]["cpu_isa"]
    return f"{result['device']['name']}, {isa}, {threads} thread{'s' if threads > 1 else ''}"


def lines(axes, cells, x):
    """Useful tokens/s of each implementation over cells, with its name at the line's end."""
    ends, top = [], 0
    for name in sorted({row["name"] for c in cells for row in c["rows"]}):
        points = [
            (x(c["value"]), row["tokens_per_second"])
            for c in cells
            for row in c["rows"]
            if row["name"] == name and "tokens_per_second" in row
        ]
        if not points:
            continue
        ours = name.startswith("bertfast")
        style = "--" if name == "oneDNN packed" else "-"
        look = {"color": OURS if ours else FAINT, "lw": 2.4 if ours else 1.4, "zorder": 2 + ours}
        axes.plot(*zip(*points, strict=True), style, marker="o", ms=4, **look)
        ends.append((points[-1][1], name))
        top = max(top, *(y for _, y in points))
    place = -top
    for y, name in sorted(ends):
        place = max(y, place + 0.07 * top)  # names that would touch move apart
        weight = "bold" if name.startswith("bertfast") else "normal"
        ink = OURS if name.startswith("bertfast") else INK
        axes.text(
            *(x(cells[-1]["value"]) + 0.12, place, name),
            **{"va": "center", "fontsize": 8, "color": ink, "weight": weight},
        )
    axes.set_ylim(0, 1.12 * top)


def sweep(result):
    """Two rows, length and padding; a column for each precision."""
    precisions = list(dict.fromkeys(c["precision"] for c in result["cells"]))
    made = figure(
        *(4.9 * len(precisions), 6.6, "Useful tokens a second against length and padding"),
        f"MiniLM inference; higher is better; {device(result)}",
    )
    grid = made.subplots(2, len(precisions), squeeze=False)
    titles = {"length": "tokens in each sequence", "padding": "share of positions that is padding"}
    for i, axis in enumerate(titles):
        for j, precision in enumerate(precisions):
            axes, wanted = grid[i][j], (axis, precision)
            cells = [c for c in result["cells"] if (c["axis"], c["precision"]) == wanted]
            values = [c["value"] for c in cells]
            at = {v: k for k, v in enumerate(values)}  # even steps: each length is twice the last
            lines(axes, cells, at.__getitem__)
            shown = [f"{v:.0%}" if axis == "padding" else str(v) for v in values]
            axes.set_xticks(range(len(values)), shown)
            axes.set_xlim(-0.2, 1.45 * (len(values) - 1))
            axes.yaxis.set_major_formatter(lambda value, _: human(value) if value else "0")
            axes.grid(axis="y", color="#e6e8eb", lw=0.8)
            axes.set_axisbelow(True)
            axes.set_title(precision, color=INK)
            axes.set_xlabel(titles[axis], loc="left")
    return made


def roofline(result):
    """GFLOP/s against FLOP/byte of the operators that are products, under the measured roofs."""
    cells = [c for c in result["cells"] if c["step"] == "forward"]
    models = list(dict.fromkeys(c["model"] for c in cells))
    precisions = list(dict.fromkeys(c["precision"] for c in cells))
    made = figure(
        *(max(6, 4.9 * len(precisions)), 3.5 * len(models), "Roofline of a layer's forward"),
        f"torch's own copy and product are the roofs; {device(result)}",
    )
    grid = made.subplots(len(models), len(precisions), squeeze=False)
    for i, model in enumerate(models):
        for j, precision in enumerate(precisions):
            (cell,) = (c for c in cells if (c["model"], c["precision"]) == (model, precision))
            roof(grid[i][j], [p for p in cell["parts"] if p["gflop"]])
            grid[i][j].set_title(f"{model}, {precision}", color=INK)
    return made


def roof(axes, parts):
    bandwidth = sorted(p["copy_gb_per_second"] for p in parts)[len(parts) // 2]
    peak = sorted(p["matmul_peak_gflops"] for p in parts)[len(parts) // 2]
    xs = [1e3 * p["gflop"] / p["mb"] for p in parts]
    edges = [min(*xs, peak / bandwidth) / 2, max(*xs, peak / bandwidth) * 5]
    axes.plot(
        [edges[0], peak / bandwidth, edges[1]],
        [edges[0] * bandwidth, peak, peak],
        color=INK,
        lw=1.2,
    )
    axes.text(edges[1], peak * 1.08, f"product {peak:.0f} GFLOP/s", ha="right", fontsize=8)
    text = f" copy {bandwidth:.0f} GB/s"
    axes.text(edges[0], edges[0] * bandwidth * 0.8, text, va="top", fontsize=8)
    for p, x in sorted(zip(parts, xs, strict=True), key=lambda pair: pair[1]):
        ours, theirs = (1e3 * p["gflop"] / p[key] for key in ("bertfast_ms", "torch_ms"))
        axes.plot([x, x], [theirs, ours], color=RIVAL, lw=1, zorder=1)
        axes.plot(x, theirs, "o", color=FAINT, ms=5)
        axes.plot(x, ours, "o", color=OURS, ms=7)
        low = min(ours, theirs)
        axes.text(x, low / 1.25, p["operator"], fontsize=8, color=INK, rotation=-40, va="top")
    lows = [1e3 * p["gflop"] / max(p["bertfast_ms"], p["torch_ms"]) for p in parts]
    axes.set(xscale="log", yscale="log", xlim=edges, ylim=(min(lows) / 8, peak * 2))
    axes.set_xlabel("useful FLOP for each byte that must move", loc="left")
    axes.set_ylabel("useful GFLOP/s")
    place = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
    axes.text(0.99, 0.1, "bertfast", color=OURS, weight="bold", **place)
    axes.text(0.99, 0.02, "PyTorch, padded", color=FAINT, **place)


def short(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


SHADES = ("#d9480f", "#f08c5a", "#f7b48f", "#8a2f0b", "#fbd7c3")  # one for each operator
DARK = ("#d9480f", "#8a2f0b", "#646c75")
GREYS = ("#8b949e", "#aab1b8", "#c3c8ce", "#646c75", "#dfe2e6")


def breakdown(result):
    """Where a layer's time goes: two stacked bars for each model, step and precision."""
    cells = result["cells"]
    made = figure(
        *(10.5, 0.85 * len(cells) + 1.2, "Where the time of an encoder layer goes"),
        f"milliseconds, padded PyTorch above, bertfast below; {device(result)}",
    )
    for axes, cell in zip(made.subplots(len(cells), 1, squeeze=False)[:, 0], cells, strict=True):
        totals = [sum(p[key] for p in cell["parts"]) for key in ("bertfast_ms", "torch_ms")]
        for y, (key, shades) in enumerate((("bertfast_ms", SHADES), ("torch_ms", GREYS))):
            left = 0
            for p, shade in zip(cell["parts"], shades, strict=False):
                axes.barh(y, p[key], left=left, color=shade, edgecolor="white", height=0.8)
                if p[key] > 0.09 * max(totals):
                    name = p["operator"].replace("_", " ")
                    ink = "white" if shade in DARK else INK
                    place = {"ha": "center", "va": "center", "fontsize": 7, "color": ink}
                    axes.text(left + p[key] / 2, y, name, **place)
                left += p[key]
            text = f" {short(left)} ms" + (f", {totals[1] / left:.1f}x" if y == 0 else "")
            axes.text(left, y, text, va="center", fontsize=8, weight="bold" if y == 0 else None)
        axes.set_xlim(0, 1.14 * max(totals))
        axes.set_axis_off()
        axes.set_title(cell["task"].removeprefix("a layer of "), color=INK, fontsize=9, pad=2)
    return made


PLOTS = {  # file: the benchmark that it shows, and how
    "speed": ("encoder_inference", speed),
    "latency": ("encoder_inference", latency),
    "sweep": ("sweep", sweep),
    "memory": ("rivals_memory", memory),
    "roofline": ("breakdown", roofline),
    "breakdown": ("breakdown", breakdown),
}


def save(made, path: Path) -> None:
    """As a PNG of 64 colours: a third of the size, and nobody sees it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(made)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def draw(found: dict[str, dict], folder: Path) -> list[Path]:
    """<name>.png in `folder` for all of PLOTS that the results, by benchmark, have data for."""
    from matplotlib import rc_context

    written = []
    for name, (benchmark, plot) in PLOTS.items():
        with rc_context(STYLE):
            made = plot(found[benchmark]) if benchmark in found else None
            if made is not None:
                path = folder / f"{name}.png"
                save(made, path)
                written.append(path)
    return written
