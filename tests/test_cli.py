import io
import json
import subprocess
import sys

import pytest
import tiny
import torch

import bertfast
from bertfast.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fine-tuned tiny model."""
    folder = tmp_path_factory.mktemp("cli")
    arguments = options(tiny.settings(folder, epochs=6))
    assert main(["finetune", "classify", *arguments]) == 0
    return folder


def options(settings):
    return [
        a for name, value in settings.items() for a in ("--" + name.replace("_", "-"), str(value))
    ]


def finetune(folder, *extra, **changes):
    return main(["finetune", "classify", *options(tiny.settings(folder, **changes)), *extra])


@pytest.mark.seconds
def test_evaluate_and_predict(folder, capsys, tmp_path):
    model, data = str(folder / "out"), str(folder / "valid.jsonl")
    assert (
        main(
            [
                "evaluate",
                "classify",
                "--model",
                model,
                "--data",
                data,
                "--json",
                str(tmp_path / "r.json"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "r.json").read_text())["accuracy"] > 0.8
    assert main(["evaluate", "classify", "--model", model, "--data", data]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 21
    assert main(["predict", "classify", "--model", model, "--input", data]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 21 and abs(sum(rows[0]["probabilities"].values()) - 1) < 1e-6


@pytest.mark.seconds
def test_predict_from_stdin(folder, monkeypatch, capsys):
    arguments = ["predict", "classify", "--model", str(folder / "out"), "--input", "-"]
    done = subprocess.run(
        [sys.executable, "-m", "bertfast", *arguments],
        input='\ufeff{"text": "red cat dog"}\n\n{"text": "walk blue"}\n\n',
        capture_output=True,
        text=True,
    )
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["red", "blue"]
    raw = io.BytesIO(b'{"text": "a"}\n\n{"t": "b"}\n')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert "standard input: row 2 (line 3): column 'text' is missing" in err and out == ""


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["backends"]["attention"][0] == "cpu" and info["cpu_isa"]
    assert main(["info"]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    told = {name: value.strip() for name, value in told.items()}
    assert told["cpu isa"] == info["cpu_isa"]
    assert told["backends of attention"].split(", ")[0] == "cpu"
    assert told["executor operators"] == "ready"


def test_version(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--version"])
    assert e.value.code == 0
    assert capsys.readouterr().out == f"bertfast {bertfast.__version__}\n"


@pytest.mark.parametrize(
    "arguments, near",
    [
        (["finetun"], "did you mean finetune?"),
        (["finetune", "token"], "did you mean tokens?"),
        (["finetune", "qa", "--lerning-rate", "1"], None),
        (["finetune", "qa", "--batchsize=3"], "did you mean --batch-size?"),
        (["predict", "pairs", "--model", "m", "--input", "f", "--ouptut", "g"], "mean --output?"),
        (["finetune", "qa", "--schedule", "liner"], "did you mean linear?"),
    ],
)
def test_nearest(arguments, near, capsys):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2
    told = capsys.readouterr().err
    assert near in told if near else "did you mean" not in told


def test_completion(capsys, tmp_path):
    """In bash itself: what follows the words typed so far."""
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    for typed, expected in (
        ("fine", {"finetune"}),
        ("finetune tok", {"tokens"}),
        ("finetune tokens --batch-s", {"--batch-size"}),
        ("predict qa --precision in", {"int8"}),
    ):
        words = ["bertfast", *typed.split()]
        code = f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        code += "$(complete -p bertfast | sed 's/.*-F //; s/ .*//'); printf '%s\\n' ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
        assert {*done.stdout.split()} == expected, done.stderr


def test_config_file(folder, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-3\nepochs: 7\ntask: regression\nclass_weights:\n")
    path.write_text("lr: 1e-3\nepochs: 7\ntask: regression\n")
    assert (
        main(["finetune", "classify", "--config", str(path), "--epochs", "9", "--print-config"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "lr: 0.001" in shown and "epochs: 9" in shown and "metric: mse" in shown
    for text, message in (
        ("learning: 1", "unknown setting 'learning'"),
        ("epoch: 1", "unknown setting 'epoch'; did you mean epochs?"),
        ("epochs: soon", "epochs is 'soon'"),
        ("- 1", "expected `setting: value`"),
        ("a: [", "can't be read as YAML"),
    ):
        path.write_text(text)
        assert main(["finetune", "classify", "--config", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_dry_run(folder, tmp_path, capsys):
    out = tmp_path / "o"
    assert finetune(folder, "--dry-run", out=str(out)) == 0
    assert "nothing is kept" in capsys.readouterr().err and not out.exists()


def test_usage_errors(capsys):
    for arguments in (
        [],
        ["finetune"],
        ["finetune", "classify", "--epochs", "x"],
        ["finetune", "classify", "--schedule", "x"],
        ["predict", "classify"],
    ):
        with pytest.raises(SystemExit) as e:
            main(arguments)
        assert e.value.code == 2
    assert main(["finetune", "classify"]) == 2
    assert "model is not set: give --model" in capsys.readouterr().err


def test_failures(folder, tmp_path, capsys):
    """Each a line on stderr that says what is wrong, exit code 1, and nothing on stdout."""
    path = tmp_path / "bad.jsonl"
    cases = [
        ({"text_column": "body"}, None, "body"),
        ({"train": str(tmp_path / "none.jsonl")}, None, "none.jsonl"),
        ({"train": str(path)}, b"", "bad.jsonl"),
        ({"train": str(path)}, b'{"text": "caf\xe9", "label": "x"}\n', "UTF-8"),
        ({"valid": str(path)}, b'{"text": "red", "label": "pink"}\n', "unknown label 'pink'"),
        ({"model": str(tmp_path)}, None, "config.json"),
    ]
    for changes, content, message in cases:
        if content is not None:
            path.write_bytes(content)
        assert finetune(folder, out=str(tmp_path / "o"), **changes) == 1, changes
        out, err = capsys.readouterr()
        last = err.strip().splitlines()[-1]
        assert message in last and last.startswith("bertfast: ") and out == "", (changes, err)
    path.write_bytes(b'{"text": "red", "label": "pink"}\n')
    assert main(["evaluate", "classify", "--model", str(folder / "out"), "--data", str(path)]) == 1
    assert "unknown label 'pink'" in capsys.readouterr().err
    assert (
        main(["predict", "classify", "--model", str(folder / "model"), "--input", str(path)]) == 1
    )
    assert "no fine-tuned model" in capsys.readouterr().err


def test_damaged_checkpoint_is_found_before_training(folder, tmp_path, capsys):
    bad = tiny.checkpoint(tmp_path / "bad")
    weights = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert finetune(folder, model=str(bad), out=str(tmp_path / "o")) == 1
    assert "corrupt or truncated" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_success_leaves_the_other_ranks(tmp_path):
    """At the interpreter's end Gloo's threads would abort some processes; a failure may not wait."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert main(["verify", str(tmp_path / "none")]) != 0
        assert torch.distributed.is_initialized()
        assert main(["info", "--json"]) == 0
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
