"""Where an encoder's time goes, how it scales over threads, and what holds a run to an instruction
set."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import ROOT

import bertfast
from bertfast.bench import measure, parts
from bertfast.bench.measure import held_to, random_batch
from bertfast.ops.extension import C

sys.path.insert(0, str(ROOT / "benchmarks"))

import harness
import threads

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "vocab_size": 50}


@pytest.mark.parametrize("precision", ["live", "fp32", "bf16", "int8"])
def test_parts(precision):
    """Each part takes time, all of them no more than the call; nothing is watched afterwards."""
    config = transformers.BertConfig(**TINY)
    model = bertfast.BertModel(config).eval()
    if precision != "live":
        model = bertfast.freeze(model, precision)
    batch = random_batch([40, 9], 40, 50)
    with torch.inference_mode():
        code = "fp32" if precision == "live" else precision
        rows = parts.layer_parts(lambda: model(**batch), config, [40, 9], code)
        model(**batch)
    assert [row["part"] for row in rows] == [
        "pack",
        "qkv",
        "attention",
        "out",
        "norm",
        "up",
        "down",
    ]
    products = [row for row in rows if row["part"] in ("qkv", "out", "up", "down")]
    assert all(row["milliseconds"] > 0 for row in rows[1:])
    assert all(0 < row["share_of_registers"] < 2 for row in products)
    assert products[0]["gflop"] == pytest.approx(2 * 6 * 49 * 64**2 / 1e9, abs=1e-4)
    assert not any(seconds for _, seconds in C.watch_parts(False))


def test_register_rates():
    assert all(C.register_rate(i) > 1e8 for i in range(3))


@pytest.mark.seconds
def test_scaling(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "WORKLOADS", {"tiny": (TINY, [20, 7])})
    before = torch.get_num_threads()
    try:
        threads.main(["--threads", "1", "2", "--rounds", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(before)
    found = json.loads((tmp_path / "threads.json").read_text())
    cells, rows = found["cells"], found["summary"]
    assert found["device"]["threads"] == 2 and len(rows) == 2
    assert all(
        row["rival"] / row["bertfast"] == pytest.approx(row["ratio"], abs=1e-3) for row in rows
    )
    assert [(c["workload"][1], c["threads"]) for c in cells] == [
        *[("fp32", 2), ("fp32", 1)],
        *[("int8", 2), ("int8", 1)],
    ]
    for row in cells[1]["rows"]:
        assert row["scaling"] == 1
    assert all(row["scaling"] > 0 for row in cells[0]["rows"])
    assert threads.counts(16) == [1, 2, 4, 8, 16] and threads.counts(6) == [1, 2, 4, 6]


def test_a_folder_for_each_instruction_set(monkeypatch):
    monkeypatch.setattr(harness, "cpu_name", lambda: "Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz")
    monkeypatch.setattr(harness, "build_info", lambda: {"cpu_isa": "avx512_vnni"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    folder = harness.result_file("sweep").parent.name
    assert folder == "intel-xeon-gold-6248-avx512_vnni-2-threads"


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("AMD EPYC", "AMD EPYC family 26 model 2"),
        ("AMD EPYC 7B13 64-Core Processor", "AMD EPYC 7B13 64-Core Processor"),
    ],
)
def test_a_nameless_cpu_says_its_family(monkeypatch, told, name):
    text = f"vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {told}\n"
    monkeypatch.setattr(measure.Path, "read_text", lambda path: 2 * text)
    assert measure.cpu_name() == name


@pytest.mark.seconds
def test_held_to():
    """A process so held says so, torch too."""
    assert held_to("avx512_amx") == {"BERTFAST_CPU_ISA": "avx512_amx"}
    code = "import bertfast, torch; print(bertfast.build_info()['cpu_isa'], "
    code += "torch.backends.cpu.get_cpu_capability())"
    isa = "baseline" if "baseline" in C.build_info()["isas_built"] else C.build_info()["cpu_isa"]
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | held_to(isa), capture_output=True, text=True
    )
    ours, theirs = done.stdout.split()
    assert ours == isa and (isa != "baseline" or theirs == "DEFAULT"), done.stderr
