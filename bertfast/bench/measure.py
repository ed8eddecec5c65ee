"""What every benchmark shares: lengths, interleaved timing, ceilings, and where it was measured."""

import datetime
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROOT = Path(__file__).resolve().parents[2]
SETTLE, LONG = 0.25, 0.5  # seconds
SLOWEST = 10  # times that fp32's product is quicker where torch is still a rival
GATED = ("modernbert", "nomic_bert", "gte", "eurobert")  # three products in a feed-forward
BENCHED = ("onnxruntime", "openvino", "nncf", "ctranslate2")  # rivals that may be installed


def natural_lengths(
    batch: int, seed: int = 0, median: float = 24, sigma: float = 0.8, longest: int = 128
) -> list[int]:
    """Sentence lengths in tokens, [CLS] and [SEP] included: log-normal, cut at `longest`."""
    draw = torch.empty(batch).log_normal_(
        torch.tensor(float(median)).log().item(),
        sigma,
        generator=torch.Generator().manual_seed(seed),
    )
    return draw.round().clamp(3, longest).long().tolist()


def padded_lengths(batch: int, seqlen: int, ratio: float, seed: int = 0) -> list[int]:
    """Lengths of `batch` rows, the longest of `seqlen`, `ratio` of all positions padding.

    Row i of the sorted lengths is seqlen * ((i + 1) / batch)^k, whose k makes the ratio; in
    shuffled order. Raises: ValueError for a ratio that no such lengths have.
    """
    most = (batch - 1) * (seqlen - 1) / (batch * seqlen)
    if not 0 <= ratio <= most:
        raise ValueError(
            f"pad ratio is {ratio}, expected 0 to {most:.2f}: {batch} x {seqlen} tokens, of which "
            "one row is full and the others have a token at least"
        )
    low, high = 0.0, 1e3
    for _ in range(60):
        power = (low + high) / 2
        lengths = [max(1, round(seqlen * ((i + 1) / batch) ** power)) for i in range(batch)]
        if 1 - sum(lengths) / (batch * seqlen) < ratio:
            low = power
        else:
            high = power
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed)).tolist()
    return [lengths[i] for i in order]


def random_batch(lengths: list[int], seqlen: int, vocabulary: int, seed: int = 0) -> dict:
    """input_ids and attention_mask int64 [batch, seqlen], right-padded; random ids."""
    mask = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).long()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, mask.shape, generator=generator)  # 0 is the padding
    return {"input_ids": ids * mask, "attention_mask": mask}


def turns(names: list, rounds: int) -> Iterator[tuple[int, Any]]:
    """(round, name): every round has each name once, starting with another each time."""
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            yield i, name


def interleave(rivals: dict, rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call; every round calls each rival once."""
    for run in rivals.values():
        for _ in range(warmup):
            run()
    seconds = {name: [] for name in rivals}
    for _, name in turns(list(rivals), rounds):
        start = time.perf_counter()
        rivals[name]()
        seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def burst(
    run: Callable[[], object], seconds: float, device: str = "cpu"
) -> tuple[Callable[[], None], int, float]:
    """A call that repeats run() for about `seconds`, how often it does, and the seconds of one."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    one = time.perf_counter() - start
    count = max(1, round(seconds / one))

    def repeat():
        for _ in range(count):
            run()
        synchronize(device)

    return repeat, count, one


def take_turns(
    runs: dict,
    rounds: int,
    device: str = "cpu",
    seconds: float = 0.1,
    warm: bool = False,
    one_openmp: bool = False,
) -> dict:
    """Median seconds of each run(), in interleaved bursts of so many seconds, each after others
    that don't count, or a pause where one call takes longer than they would: OpenMP's threads of
    the library before spin on for 0.2 s. Of a call of over half a second, the one that told so is
    the first round's. warm: each has run before; otherwise it does once, since what a first call
    makes doesn't count. one_openmp: all use torch's, so that one burst before is enough."""
    for run in () if warm else runs.values():
        run()
    wait = (seconds if one_openmp else SETTLE) if device == "cpu" else 0
    bursts, timed = {}, {name: [] for name in runs}
    for name, run in runs.items():
        time.sleep(wait)
        bursts[name] = burst(run, seconds, device)
    for i, name in turns(list(runs), rounds):
        repeat, count, one = bursts[name]
        if one > LONG and i == 0:
            timed[name].append(one)
            continue
        start = time.perf_counter()
        if one > wait:
            time.sleep(wait)
        while time.perf_counter() - start < wait:
            repeat()
        start = time.perf_counter()
        repeat()
        timed[name].append((time.perf_counter() - start) / count)
    return {name: median(found) for name, found in timed.items()}


def aligned(lines: list[list[str]]) -> list[str]:
    """A table's lines, the first column flush left and the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, values, widths[1:])])
        for name, *values in lines
    ]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def product(precision: str, device: str = "cpu") -> tuple[Callable[[], object], float]:
    """torch's own square product, the yardstick of `share_of_peak`, and its operations. In int8 it
    is no ceiling: weights that are packed already can pass it."""
    # The first side that takes long enough: where torch is slow, a large one takes a minute.
    for side in (8192,) if device == "cuda" else (384, 768, 1536, 3072):
        if precision == "int8":
            whole = torch.randint(-127, 128, (2, side, side), dtype=torch.int8, device=device)
            multiply = partial(torch._int_mm, *whole)
        else:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            multiply = partial(torch.matmul, *torch.randn(2, side, side, device=device).to(dtype))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - start)
        if min(seconds) > 0.05:
            break
    return multiply, 2 * side**3


@cache
def rate(precision: str) -> float:
    """Operations a second of torch's own product on this CPU."""
    multiply, flop = product(precision)
    return flop / median(interleave({precision: multiply}, 3, 1)[precision])


def emulated(precision: str) -> str | None:
    """Why torch itself is no rival in a precision on this CPU, if so: without instructions for it
    (bf16 with AVX2 alone), its products take a hundred times as long as in fp32."""
    if precision == "fp32" or SLOWEST * rate(precision) >= rate("fp32"):
        return None
    rates = " and ".join(f"{rate(p) / 1e9:.0f} GFLOP/s in {p}" for p in (precision, "fp32"))
    return f"left out: torch's own product runs at {rates}"


def copy(device: str = "cpu") -> tuple[Callable[[], object], float]:
    """torch's own copy of 256 MB, the yardstick of memory traffic, and its bytes."""
    a = torch.zeros(64 * 2**20, device=device)
    b = torch.ones_like(a)
    return lambda: a.copy_(b), 2 * 4 * a.numel()  # read and written


def encoder_flop(config: "PreTrainedConfig", lengths: list[int]) -> int:
    """Operations of the encoder's products, a multiply-add being two, over real tokens only, and
    inside a window; those of relative positions not counted."""
    hidden, tokens = config.hidden_size, sum(lengths)
    gate = getattr(config, "model_type", "") in GATED
    linears = 2 * tokens * (4 * hidden**2 + (2 + gate) * hidden * config.intermediate_size)
    flop = config.num_hidden_layers * linears
    for kind in getattr(config, "layer_types", None) or [None] * config.num_hidden_layers:
        reach = config.local_attention // 2 if kind == "sliding_attention" else tokens
        near = [min(n - 1, reach) for n in lengths]
        pairs = sum(n * (2 * r + 1) - r * (r + 1) for n, r in zip(lengths, near, strict=True))
        flop += 2 * 2 * hidden * pairs
    return flop


def cpu_name() -> str:
    """As the kernel has it. A virtual machine's may be of many kinds ("AMD EPYC"): its family and
    model then say which."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    name = found.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name) or not {"cpu family", "model"} <= found.keys():
        return name
    return f"{name} family {found['cpu family']} model {found['model']}"


# What holds other libraries to an instruction set: torch and oneDNN, MKL, CTranslate2. ONNX Runtime
# knows no such variable.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_VARIABLES += ("CT2_FORCE_CPU_ISA",)
_HELD = {
    "baseline": ("default", "SSE41", "SSE4_2", "GENERIC"),
    "avx2": ("avx2", "AVX2", "AVX2", "AVX2"),
    "avx2_vnni": ("avx2", "AVX2_VNNI", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512", "AVX512"),
    "avx512_vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512", "AVX512"),
}


def held_to(isa: str) -> dict[str, str]:
    """The environment in which we and our rivals use an instruction set of `build_info()` at most;
    for a new process. Of sets without a row there, like the best ones, only we are held."""
    held = dict(zip(_VARIABLES, _HELD.get(isa, ()), strict=False))
    return {"BERTFAST_CPU_ISA": isa} | held


def commit() -> str:
    """Of the clone that the package runs from; "unknown" for an installed package."""
    if not (ROOT / ".git").exists():
        return "unknown"

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    written = (":!benchmarks/results", ":!README.md", ":!docs/performance.md")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")


def origin(device: str = "cpu") -> dict:
    """Device, versions, commit and date of a measurement."""
    import transformers

    import bertfast

    def version(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    where, gpu = {"name": cpu_name(), "threads": torch.get_num_threads()}, ()
    if device == "cuda":
        where, gpu = {"name": torch.cuda.get_device_name()}, ("triton",)
    return {
        "device": where,
        "versions": {
            "bertfast": bertfast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **{name: v for name in (*BENCHED, *gpu) if (v := version(name))},
        },
        "build": {
            key: value
            for key, value in bertfast.build_info().items()
            if key not in ("version", "python", "torch", "extension")
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
