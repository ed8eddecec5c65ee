"""Servers: worker threads, and processes forked from one that has loaded a model."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, reads /proc")
SETUP = """
import os, signal, sys, threading, torch, transformers, bertfast
import bertfast.dropin, transformers.models.bert.modeling_bert  # once, not in every fork
config = transformers.BertConfig(
    vocab_size=90, hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=384
)
ids = torch.arange(64).expand(8, 64).contiguous()
def live(): return bertfast.BertModel(config).eval()
def frozen(): return bertfast.freeze(live())
def int8(): return bertfast.freeze(live(), "int8")
def accelerated():
    model = transformers.BertModel(config).eval()
    bertfast.accelerate(model)
    return model
def accelerated_int8(): return bertfast.freeze(transformers.BertModel(config).eval(), "int8")
def call(model):
    model.pooler = None  # nothing that asks torch before ours
    with torch.inference_mode():
        return model(input_ids=ids)[0]
models = live, frozen, int8, accelerated, accelerated_int8
"""


def run(program, threads):
    command = [sys.executable, "-c", SETUP + program]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.seconds
@pytest.mark.parametrize("threads, cores", [("4", None), ("16", 1)])
def test_a_worker_thread_takes_as_many_threads_as_torch(threads, cores):
    """Whatever OpenMP was told, and where the process is limited to fewer cores."""
    program = f"""
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}])
torch.set_num_threads(1)
def work(model):
    before = len(os.listdir("/proc/self/task"))
    call(model)
    print(len(os.listdir("/proc/self/task")) - before)
for make in models:
    worker = threading.Thread(target=work, args=(make(),))
    worker.start()
    worker.join()
"""
    assert run(program, threads) == ["0"] * 5


@pytest.mark.seconds
def test_a_forked_process_answers():
    """Whether its parent has run the model or only loaded it; and so does the parent afterwards."""
    program = """
def answers(model, expected):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        found = call(model)
        os._exit(expected is not None and not torch.equal(found, expected))
    return os.waitpid(child, 0)[1] == 0
for make in models:
    for used in (False, True):
        server = os.fork()  # one without threads so far
        if server == 0:
            signal.alarm(60)
            model = make()
            expected = call(model) if used else None
            good = answers(model, expected) and answers(model, expected)
            call(model)
            os._exit(not good)
        print(make.__name__, used, os.waitpid(server, 0)[1])
"""
    found = run(program, "2")
    makes = "live", "frozen", "int8", "accelerated", "accelerated_int8"
    names = [f"{make} {used} 0" for make in makes for used in (False, True)]
    assert " ".join(found) == " ".join(names)


@pytest.mark.seconds
def test_a_process_forked_amid_calls_answers():
    """Which other threads are in at that moment: as a server does that replaces a worker."""
    program = """
for make in models:
    model, stop = make(), False
    expected = call(model)
    def work():
        while not stop:
            call(model)
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    good = 0
    for _ in range(4):
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(not torch.equal(call(model), expected))
        good += os.waitpid(child, 0)[1] == 0
    stop = True
    for worker in workers:
        worker.join()
    print(good)
"""
    assert run(program, "2") == ["4"] * 5
