"""Peak memory of a rival's inference, in a process of its own.

`python -m bertfast.bench.memory SPEC` is that process; SPEC and its output are JSON.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .measure import random_batch

STATUS = Path("/proc/self/status")


def resident(field: str) -> float:
    """MB of this process by /proc: "VmRSS" now, "VmHWM" at its peak."""
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now: proc(5)


@torch.inference_mode()
def main(spec: dict) -> dict:
    module, _, name = spec["rival"].partition(":")
    cls = getattr(importlib.import_module(module), name)
    torch.set_num_threads(spec["threads"])
    batch = random_batch(spec["lengths"], spec["seqlen"], spec["vocabulary"])
    idle = resident("VmRSS")
    forget_peak()
    rival = cls(spec["folder"], spec["precision"], spec["threads"])
    load = resident("VmHWM")
    rival(batch)
    forget_peak()
    rival(batch)
    return {
        "imports_mb": round(idle),
        "load_peak_mb": round(load - idle),
        "inference_peak_mb": round(resident("VmHWM") - idle),
    }


def measure(
    cls: type,
    folder: str,
    precision: str,
    threads: int,
    lengths: Sequence[int],
    seqlen: int,
    vocabulary: int,
    path: Sequence[str] = (),
) -> dict:
    """MB above what the imports take: the peak while it loads, and of a second call.

    cls: a `Rival`; path: folders where its module is found. Raises: RuntimeError with the last
    line that the process wrote, OSError off Linux.
    """
    if not STATUS.exists():
        raise OSError("peak memory is read from /proc, which this system lacks")
    spec = {"rival": f"{cls.__module__}:{cls.__qualname__}", "folder": os.path.abspath(folder)}
    spec |= {"precision": precision, "threads": threads, "vocabulary": vocabulary}
    spec |= {"lengths": lengths, "seqlen": seqlen}
    found = [*map(str, path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in found if p)
    command = [sys.executable, "-m", "bertfast.bench.memory", json.dumps(spec)]
    # Elsewhere, since python -m puts the folder it runs in on the path: see CONTRIBUTING.md.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.sep)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
