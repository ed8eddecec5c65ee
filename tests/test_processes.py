"""The quick tests in two processes: nothing is lost, twice or unseen."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import sys
sys.path.insert(0, {folder!r})
from processes import join

def pytest_addoption(parser):
    parser.addoption("--processes", type=int, default=1)
    parser.addoption("--beside")

def pytest_configure(config):
    join(config)
"""
# Either waits until the other has begun: in one process that would last.
TESTS = """
import os, sys, time
from pathlib import Path
import pytest

def test_meets_the_other():
    Path({mine!r}).touch()
    end = time.monotonic() + 20
    while not Path({other!r}).exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert Path({other!r}).exists()

@pytest.mark.parametrize("n", range(3))
def test_some(n):
    assert n != {wrong}, "as expected"

def test_left_out():
    pytest.skip("a reason")

def test_last():
    {last}
"""


@pytest.fixture
def run(tmp_path):
    def run(first, second):
        """pytest's exit code and output on two files of tests."""
        (tmp_path / "conftest.py").write_text(CONFTEST.format(folder=str(Path(__file__).parent)))
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        for mine, other, options in (("a", "b", first), ("b", "a", second)):
            text = TESTS.format(mine=mine, other=other, **dict(wrong=-1, last="pass") | options)
            (tmp_path / f"test_{mine}.py").write_text(text)
        command = [str(Path(sys.executable).parent / "pytest"), "--processes", "2", "-rfs"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("wrong", [(-1, -1), (-1, 2)])
def test_all_is_reported_once(run, wrong):
    code, said = run(*({"wrong": n} for n in wrong))
    failed = [f"test_{'ab'[i]}.py::test_some[{n}]" for i, n in enumerate(wrong) if n >= 0]
    assert code == (1 if failed else 0), said
    counts = f"{len(failed)} failed, " * bool(failed) + f"{10 - len(failed)} passed, 2 skipped in"
    assert counts in said.splitlines()[-1]
    assert re.findall(r"^FAILED (\S+)", said, re.MULTILINE) == failed
    assert said.count("a reason") == 2 and ("as expected" in said) == bool(failed)


@pytest.mark.parametrize("last", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_the_end_of_a_process_is_a_failure(run, last):
    last = f"'--beside' not in ' '.join(sys.argv) or {last}"
    code, said = run({"last": last}, {"last": last})
    assert code == 1 and "1 tests were not run" in said and "another process" in said, said
    assert re.search("[12] failed, 9 passed, 2 skipped in", said.splitlines()[-1])
