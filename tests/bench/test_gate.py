"""The regression gate: what it lets pass, and, slowly, that nothing got slower here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gate

BASE = {"inference, a": 2.0, "training, b": 4.0}


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the measurements: a list of what each call finds; the calls made."""
    calls = []

    def use(*answers):
        left = list(answers)

        def measure(rounds=gate.ROUNDS, parts=gate.PARTS):
            calls.append((rounds, list(parts)))
            return left.pop(0)

        monkeypatch.setattr(gate, "measure", measure)
        return calls

    return use


def test_noise_passes(measured):
    calls = measured({"inference, a": 1.3, "training, b": 9.0})
    assert gate.check(BASE) == [] and len(calls) == 1


def test_one_bad_measurement_passes(measured):
    calls = measured({"inference, a": 1.0, "training, b": 4.0}, {"inference, a": 1.9})
    assert gate.check(BASE) == []
    assert calls[1] == (gate.AGAIN, ["inference"])


@pytest.mark.parametrize("found", [{"inference, a": 1.1}, {"inference, a": float("nan")}])
def test_slower_twice_fails(measured, found):
    measured(found | {"training, b": 4.0}, found)
    (sentence,) = gate.check(BASE)
    assert sentence.startswith("inference, a: ") and "baseline's 2.0" in sentence


def test_a_missing_ratio_fails(measured):
    measured({"inference, a": 2.0}, {})
    (sentence,) = gate.check(BASE)
    assert sentence.startswith("training, b: None")


def test_baseline_is_sound():
    for isa, entry in gate.baselines().items():
        assert isa.startswith(("avx", "baseline")) and entry["commit"] and entry["threads"]
        assert entry["ratios"] and all(ratio > 0 for ratio in entry["ratios"].values())
        assert all(name.startswith(tuple(gate.PARTS)) for name in entry["ratios"])


@pytest.mark.slow
def test_nothing_got_slower():
    baseline = gate.baselines().get(gate.isa())
    if baseline is None:
        pytest.skip(f"no baseline for {gate.isa()}")
    # Threads that wait as they do outside of tests.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    command = [sys.executable, gate.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
