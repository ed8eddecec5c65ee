"""The drop-in's and the native models' tests once more, every call recorded and replayed: trainers,
poolings, losses, adapters and whoever else consumes an accelerated model (tests/tape.py)."""

import subprocess
import sys

import pytest
from helpers import ROOT

# These count calls, name executors, or hold a replayed step, which sums padded rows, to a plain
# one's bits.
OTHER = "gradient_checkpointing or inference_and_training or who_runs"


@pytest.mark.slow
def test_everything_else_replayed():
    files = [*map(str, (ROOT / "tests" / "dropin").glob("test_*.py")), "tests/model"]
    files += [
        f"tests/encoder/test_{n}.py" for n in ("watch", "watch_native", "adapters", "families")
    ]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--tape", "-k", f"not ({OTHER})", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 1000
