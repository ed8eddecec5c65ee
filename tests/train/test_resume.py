"""Runs killed at any moment end with the weights of an unbroken run, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny
import tiny_pretrain
import torch
from safetensors.torch import load_file

# Runs in a forked child each, so that 50 kills don't pay 50 times for importing torch.
SERVER = """
import os, sys, json
os.environ["OMP_NUM_THREADS"] = "1"
import torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
import accelerate, transformers, sklearn.metrics, matplotlib.figure, torch.utils.tensorboard
from bertfast.train import ClassifyConfig, PretrainConfig, finetune, pretrain
print("ready", flush=True)
while line := sys.stdin.readline():
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            values = json.loads(line)
            if "data" in values:
                pretrain(PretrainConfig(**values))
            else:
                finetune(ClassifyConfig(**values))
            code = 0
        except BaseException as e:
            print(repr(e), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()  # the parent has sent its signal: until then the pid stays this run's
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Runner:
    def __init__(self, log):
        self.path, self.log = log, open(log, "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=-1, stdout=-1, stderr=self.log, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, settings, kill_after=None, sig=signal.SIGKILL) -> int:
        """The exit code; negative where a signal ended the run."""
        import json

        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, sig)
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    r = Runner(tmp_path_factory.mktemp("runner") / "log")
    yield r
    r.close()


def finetuning(folder, out):
    return tiny.settings(
        folder, out=str(folder / out), epochs=4, save_steps=3, accumulation=2, batch_size=4
    )


def pretraining(folder, out):
    return tiny_pretrain.settings(
        folder, out=str(folder / out), accumulation=2, max_steps=36, eval_steps=15, save_steps=3
    )


def same(folder, out):
    a, b = (load_file(folder / o / "model.safetensors") for o in ("unbroken", out))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


TIMES = {"tokens_per_second", "eta_seconds", "mfu"}


def steps(folder, out):
    """metrics.jsonl but for its timings."""
    import json

    with open(folder / out / "metrics.jsonl") as f:
        records = [json.loads(line) for line in f]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


@pytest.fixture(scope="module", params=[finetuning, pretraining])
def unbroken(request, tmp_path_factory, runner):
    """A run's settings, their folder, in which it ended once, and the seconds that it took."""
    folder, settings = tmp_path_factory.mktemp("resume"), request.param
    given = settings(folder, "unbroken")
    start = time.monotonic()
    assert runner.run(given) == 0, runner.path.read_text()
    return settings, folder, time.monotonic() - start


def kills(runner, count, settings, folder, length):
    moments = random.Random(1)
    killed, run = 0, 0
    while killed < count:
        run += 1
        out = f"killed{run}of{count}"
        for attempt in range(12):
            # Later kills come later in the run, or a slow start would never let it end.
            code = runner.run(
                settings(folder, out), moments.uniform(0.05, 0.7) * length * (1 + attempt / 4)
            )
            if code == 0:
                break
            assert code == -signal.SIGKILL
            killed += 1
            if killed >= count:
                break
        assert runner.run(settings(folder, out)) == 0, runner.path.read_text()
        assert same(folder, out) and steps(folder, out) == steps(folder, "unbroken")
    return killed


@pytest.mark.seconds
def test_a_few_kills(runner, unbroken):
    assert kills(runner, 3, *unbroken) >= 3


@pytest.mark.slow
def test_fifty_kills(runner, unbroken):
    assert kills(runner, 50, *unbroken) >= 50


@pytest.mark.seconds
def test_sigterm_saves(runner, unbroken):
    """Within 10 seconds, at the step under way; the run goes on from there."""
    settings, folder, length = unbroken
    start = time.monotonic()
    code = runner.run(settings(folder, "stopped"), 0.6 * length, signal.SIGTERM)
    assert time.monotonic() - start < 0.6 * length + 10
    assert code in (0, 1, -signal.SIGTERM)  # ended before, saved, or not yet training
    assert runner.run(settings(folder, "stopped")) == 0
    assert same(folder, "stopped")
    if code == 1:
        assert "stopped at step" in runner.path.read_text()
