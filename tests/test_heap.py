"""Freed memory is kept where the next step wants it, and given back where nobody does."""

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import torch
from bertfast import heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():  # a gradient of 80 MB, made and freed
    before = faults()
    torch.empty(20_000_000).fill_(1)
    return faults() - before

before = [step() for _ in range(3)][-1]
heap.keep_freed()
kept = sorted([step() for _ in range(40)][-9:])[4]  # once the heap has found its shape
heap.release_freed()
print(json.dumps([before, kept, step()]))
"""


@pytest.mark.seconds
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory():
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, check=True)
    before, kept, released = json.loads(done.stdout)
    if before < 10_000:
        pytest.skip("the system gives large pages: there is nothing to gain")
    assert kept < before / 100 and released > before / 2
