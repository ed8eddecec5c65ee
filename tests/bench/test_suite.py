"""benchmarks/suite.py: its parts are scripts, and one that fails stops it."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# The part's process imports this file again, and so sees the change.
FAILING = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import suite
suite.PARTS["breakdown"] = "--rounds none"
if __name__ == "__main__":
    suite.main()
"""


def test_parts_are_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import suite

    assert all((BENCHMARKS / f"{part}.py").exists() for part in suite.PARTS)


def test_unknown_part(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["suite.py", "report", "nonsense"])
    import suite

    with pytest.raises(SystemExit) as stopped:
        suite.main()
    assert stopped.value.code == 2
    assert "no part nonsense, expected some of test_ops" in capsys.readouterr().err


@pytest.mark.slow
def test_failure(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    command = [sys.executable, str(script), "breakdown", "report"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "invalid int value: 'none'" in done.stderr
    assert done.stderr.endswith("breakdown failed with 2\n")
    assert "report" not in done.stdout
