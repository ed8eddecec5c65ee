"""Servers of a SentenceTransformer: threads, processes, limits of cores and of memory."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from sentences import TEXTS

import bertfast

st = pytest.importorskip("sentence_transformers")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, reads /proc")
WAYS = ("accelerated", "frozen", "int8", "loaded")


def make(way, folder, kept=None):
    """The model of `folder`; kept: where to keep what is loaded again."""
    model = st.SentenceTransformer(folder, device="cpu")
    if way == "stock":
        return model
    if way == "accelerated":
        bertfast.accelerate(model)
        return model
    bertfast.freeze(model, "fp32" if way == "frozen" else "int8")
    return model if way != "loaded" else bertfast.load_frozen(bertfast.save_frozen(model, kept))


def encode(model, texts=TEXTS, **options):
    return model.encode(texts, show_progress_bar=False, convert_to_tensor=True, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["Bert", "ModernBert", "DebertaV2"])
def test_eight_threads_answer_as_one(family, way, saved, tmp_path):
    """To the bit: each thread its own texts, of many lengths, in calls of one and of several."""
    model = make(way, saved(family, initializer_range=0.1), tmp_path)
    calls = [TEXTS[i:] + TEXTS[:i] for i in range(8)]
    options = {"batch_size": 5}
    expected = [encode(model, texts, **options) for texts in calls]
    singles = [encode(model, text) for text in TEXTS]
    failed, together = [], threading.Barrier(8)

    def work(i):
        together.wait()
        for _ in range(3):
            good = torch.equal(encode(model, calls[i], **options), expected[i])
            good &= all(torch.equal(encode(model, TEXTS[j]), singles[j]) for j in range(i, 21, 4))
            if not good:
                failed.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


SETUP = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
from test_threads_sentences import *
folder, kept = sys.argv[2:4]
def answered(child):
    return os.waitpid(child, 0)[1] == 0
def child(check):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(not check())
    return pid
"""


def run(program, *arguments, threads="2"):
    command = [sys.executable, "-c", SETUP + program, os.path.dirname(__file__), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return done.stdout.split("\n")[:-1]


@linux
@pytest.mark.seconds
def test_processes_and_cores(saved, tmp_path):
    """As gunicorn preloads: a parent loads, has answered or not, and forks workers. And a worker
    thread with a number of threads of its own, in a process of one core."""
    program = """
def preloaded(way, used):
    model = make(way, folder, f"{kept}/{way}{used}")
    if used:
        expected = encode(model)
    workers = [child(lambda: encode(model).isfinite().all()) for _ in range(2)]
    if used:
        workers.append(child(lambda: torch.equal(encode(model), expected)))
    return all([answered(worker) for worker in workers]) and encode(model).isfinite().all()

def one_core(way):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    model, more = make(way, folder, f"{kept}/one{way}"), []
    expected = encode(model)
    before = len(os.listdir("/proc/self/task"))
    def work():
        torch.set_num_threads(1)
        more.append(torch.equal(encode(model), expected))
        more.append(len(os.listdir("/proc/self/task")) - before)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return more == [True, 1]

for way in WAYS:
    for used in (False, True):
        print(way, used, answered(child(lambda: preloaded(way, used))))
    print(way, "one core", answered(child(lambda: one_core(way))))
"""
    found = run(program, saved("Bert"), str(tmp_path))
    assert found == [f"{way} {case} True" for way in WAYS for case in (False, True, "one core")]


@linux
@pytest.mark.slow
def test_multi_process_pool(saved, tmp_path):
    program = """
if __name__ == "__main__":  # not in the pool's processes
    for way in ("accelerated", "loaded"):
        model = make(way, folder, f"{kept}/{way}")
        expected = torch.cat([encode(model, TEXTS[i : i + 7]) for i in range(0, 21, 7)])
        pool = model.start_multi_process_pool(["cpu", "cpu"])
        found = encode(model, pool=pool, chunk_size=7)
        model.stop_multi_process_pool(pool)
        after = encode(model, TEXTS[:7])
        print(way, torch.equal(found, expected), torch.equal(after, expected[:7]))
"""
    found = run(program, saved("Bert", initializer_range=0.1), str(tmp_path))
    assert found == [f"{way} True True" for way in ("accelerated", "loaded")]


@linux
@pytest.mark.seconds
@pytest.mark.parametrize("calls", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_is_flat(calls, saved, tmp_path):
    """Texts of every length, one a call, after those of a tenth of the calls."""
    program = """
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
model, calls = make("int8", folder), int(kept)
for i in range(calls + calls // 10):
    if i == calls // 10:
        before = resident()
    encode(model, " ".join(["the cat sat"] * (i % 10)))
print(resident() - before)
"""
    (grown,) = run(program, saved("Bert"), str(calls))
    print(f"{calls} calls: {float(grown):+.1f} MB")
    assert float(grown) < 4
