"""Where memory is short an operator raises, whichever thread needed it, and the next call works."""

import json
import subprocess
import sys

import pytest

# In a process for each case, with inputs and threads made, the address space may grow by `room`
# bytes: enough for the results, not for the kernel's own memory.
CODE = """
import json, os, resource, sys, traceback
import torch, transformers
import bertfast
from bertfast import ops

def attention(n, grad=False, **options):
    qkv = torch.full((n, 3, 2, 8), 0.5, requires_grad=grad)
    starts = torch.tensor([0, n], dtype=torch.int32)
    return lambda: ops.attention(qkv, starts, n, **options)

def attention_backward(n):
    y = attention(n, True)()
    return lambda: y.sum().backward()

def relative(n, grad=False):
    rel, index = torch.ones(3, 2, 8, requires_grad=grad), torch.zeros(2 * n - 1, dtype=torch.int32)
    return attention(n, grad, window=9, rel_key=rel, rel_query=rel, rel_index=index)

def relative_backward(n):
    y = relative(n, True)()
    return lambda: y.sum().backward()

def linear_act(n):
    x, w = torch.ones(600, n), torch.ones(n, n)  # of few rows it packs one panel at a time
    return lambda: ops.linear_act(x, w)

def add_layer_norm(n):
    x, w = torch.ones(2, n), torch.ones(n)
    return lambda: ops.add_layer_norm(x, None, w, w, 1e-5)

def gated_act(n):
    x = torch.ones(2, n)
    return lambda: ops.gated_act(x, x, dropout_p=0.1, seed=1)

def embedding_layer_norm(n):
    ids, w = torch.zeros(2, dtype=torch.int64), torch.ones(n)
    return lambda: ops.embedding_layer_norm(ids, ids, None, w[None], w[None], None, w, w, 1e-5)

def frozen(n, models=[]):
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=64, vocab_size=9, max_position_embeddings=1 << 16)
    models += [] if models else [bertfast.freeze(bertfast.BertModel(config, False), "fp32")]
    ids = torch.ones(1, n, dtype=torch.int64)
    return lambda: models[0](ids)

def case(name, small, large, room):
    torch.set_num_threads(2)
    make = globals()[name]
    make(small)()
    again, call = make(small), make(large)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    try:
        call()
        return "it had the memory"
    except MemoryError:
        again()
    return "as it should be"

for name, *sizes in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        try:
            print(name, case(name, *sizes), sep=": ", flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(pid, 0)
"""
CASES = [
    ("attention", 64, 40000, 12 << 20),
    ("attention_backward", 64, 20000, 16 << 20),
    ("relative", 64, 40000, 12 << 20),
    ("relative_backward", 64, 20000, 16 << 20),
    ("linear_act", 512, 4096, 16 << 20),
    ("add_layer_norm", 20000, 4 << 20, 48 << 20),
    ("gated_act", 20000, 4 << 20, 48 << 20),
    ("embedding_layer_norm", 20000, 4 << 20, 48 << 20),
    ("frozen", 64, 30000, 40 << 20),
]


@pytest.fixture(scope="module")
def ran():
    command = [sys.executable, "-c", CODE, json.dumps(CASES)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.seconds
@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_scratch_memory(ran, name):
    assert f"{name}: as it should be\n" in ran.stdout, ran.stdout + ran.stderr[-2000:]
