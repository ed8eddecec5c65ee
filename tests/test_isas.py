"""The C++ kernels of the instruction sets that this machine could run but doesn't choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertfast.ops.extension import C

HERE = Path(__file__).parent
SUBSET = "(test_same_states and even) or (test_forward_backward and cpu)"


@pytest.mark.slow
@pytest.mark.skipif(C is None, reason="no C++ kernels")
@pytest.mark.parametrize("isa", C.build_info()["isas_built"] if C else [])
def test_kernels(isa):
    if isa == C.build_info()["cpu_isa"]:
        pytest.skip("the default: every other test runs it")
    command = [sys.executable, "-m", "pytest", "-q", "-k", SUBSET, "-p", "no:cacheprovider"]
    command += [str(HERE / f"test_{name}.py") for name in ("linear_act", "frozen", "attention")]
    environment = os.environ | {"BERTFAST_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    if "which this processor lacks" in done.stdout + done.stderr:
        pytest.skip(f"this processor lacks {isa}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
