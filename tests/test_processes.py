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
    def run(**options):
        """pytest's exit code and output on four files, of which two at a time meet; `options`: what
        is other in a file."""
        (tmp_path / "conftest.py").write_text(CONFTEST.format(folder=str(Path(__file__).parent)))
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        for mine, other in ("ab", "ba", "cd", "dc"):
            own = dict(wrong=-1, last="pass") | options.get(mine, {})
            folder = tmp_path / ("one" if mine in "ab" else "two")
            folder.mkdir(exist_ok=True)
            (folder / f"test_{mine}.py").write_text(TESTS.format(mine=mine, other=other, **own))
        command = [str(Path(sys.executable).parent / "pytest"), "--processes", "2", "-rfs"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("wrong", [{}, {"one/test_b": 2, "two/test_c": 1}])
def test_all_is_reported_once(run, wrong):
    code, said = run(**{name[-1]: {"wrong": n} for name, n in wrong.items()})
    assert code == (1 if wrong else 0), said
    counts = f"{len(wrong)} failed, " * bool(wrong) + f"{20 - len(wrong)} passed, 4 skipped in"
    assert counts in said.splitlines()[-1]
    failed = re.findall(r"^FAILED (\S+)", said, re.MULTILINE)
    assert sorted(failed) == [f"{name}.py::test_some[{n}]" for name, n in wrong.items()]
    assert said.count("a reason") == 4 and ("as expected" in said) == bool(wrong)


@pytest.mark.parametrize("last", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_the_end_of_a_process_is_a_failure(run, last):
    last = {"last": f"'--beside' not in ' '.join(sys.argv) or {last}"}
    code, said = run(c=last, d=last)
    assert code == 1 and "1 tests were not run" in said and "another process" in said, said
    assert re.search("[12] failed, 19 passed, 4 skipped in", said.splitlines()[-1])
