"""Settings: read from YAML as from the command line, and refused with what was expected."""

import dataclasses
import math
import re

import pytest
import yaml
from helpers import refused

from bertfast.cli import main
from bertfast.data import LabelSet
from bertfast.train import ClassifyConfig, ConfigError, PretrainConfig
from bertfast.train.config import read_yaml
from bertfast.train.tasks.classify import ClassificationTask


def read(tmp_path, text, settings=ClassifyConfig, **options):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return read_yaml(path, settings, **options)


VALUES = {
    "resume: no": "no",
    "resume: 'no'": "no",
    "model: yes": "yes",
    "train: on": "on",
    "out: 2024": "2024",
    "out: 2024-01-01": "2024-01-01",
    "out: 1_0": "1_0",
    "text_column: y": "y",
    "label_column: 'null'": "null",
    "valid: null": None,
    "valid: ~": None,
    "valid:": None,
    "valid: 'null'": "null",
    "lr: 1e-4": 1e-4,
    "lr: 1": 1.0,
    "max_steps: null": None,
    "max_steps: 7": 7,
    "dedup: yes": True,
    "dedup: Off": False,
    "dedup: true": True,
    "class_weights: {no: 3, yes: 1.5, 1: 2, null: 4}": {"no": 3, "yes": 1.5, "1": 2, "null": 4},
    "class_weights:": {},
    "class_weights: {}": {},
}


@pytest.mark.parametrize("text", VALUES)
def test_a_value_is_read_by_its_kind(tmp_path, text):
    (value,) = read(tmp_path, text).values()
    assert value == VALUES[text] and type(value) is type(VALUES[text])


@pytest.mark.parametrize("config", [
    ClassifyConfig(out="no", model="1e3", label_column="null", valid="~", class_weights={"on": 2.0}),
    PretrainConfig(out="2024", eval_steps=None),
])  # fmt: skip
def test_what_is_written_is_read(tmp_path, config):
    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    assert type(config)(**read(tmp_path, text, type(config))) == config


@pytest.mark.parametrize("text, message", [
    ("lr: 1\nepochs: 2\nlr: 3", "line 3: 'lr' stands twice"),
    ("class_weights:\n  no: 1\n  'no': 2", "line 3: 'no' stands twice"),
    ('{"lr": 1, "lr": 2}', "'lr' stands twice"),
    ("class_weights: {red: abc}", "class_weights: red is 'abc', expected float"),
    ("class_weights: {red: }", "class_weights: red is '', expected float"),
    ("class_weights: [1, 2]", "class_weights is a sequence"),
    ("class_weights: red", "class_weights is 'red'"),
    ("epochs: true", "epochs is 'true', expected int"),
    ("epochs: 1.5", "epochs is '1.5', expected int"),
    ("epochs: null", "epochs is 'null', expected int"),
    ("max_steps: many", "max_steps is 'many', expected int or nothing"),
    ("model: ~", "model is '~', expected str"),
    ("model: [a]", "model is a sequence, expected str"),
    ("dedup: 2", "dedup is '2', expected bool"),
    ("? [a]\n: 1", "a key is no name"),
    ("", "holds nothing"),
    ("[[" * 500, "can't be read as YAML"),
])  # fmt: skip
def test_bad_yaml(tmp_path, capsys, text, message):
    refused(ConfigError, message, read, tmp_path, text)
    assert main(["finetune", "classify", "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_some_settings_only(tmp_path):
    text = "new: 1\nlength: [\n]\nmax_length: 7\nlr: many"
    assert read(tmp_path, text, only=("max_length", "text_column")) == {"max_length": 7}


@pytest.mark.parametrize("weight", [-3.0, math.inf, math.nan, 1e300, "abc", None])
def test_bad_class_weights(weight):
    message = re.escape(f"class_weights: red is {weight!r}, expected a number, 0 to 1e+30")
    refused(ConfigError, message, ClassifyConfig, class_weights={"red": weight})


@pytest.mark.parametrize("given", ["red=-3", "red=inf", "red=abc", "red", "red=1 red=2"])
def test_bad_class_weights_on_the_command_line(capsys, given):
    try:
        code = main(["finetune", "classify", "--class-weights", *given.split()])
    except SystemExit as e:
        code = e.code
    assert code == 2
    err = capsys.readouterr().err
    assert re.search("class.weights.*(red|a label stands twice)", err)


def test_class_weights_by_name():
    """A class has one name here too, whatever wrote it; not all weights may be 0."""

    def task(**weights):
        made = ClassificationTask(ClassifyConfig(class_weights=weights), "cpu", print)
        made.name(LabelSet(("True", "2", "c")))
        return made.class_weights.tolist()

    assert task(**{"true": 3.0, "2.0": 0}) == [3, 0, 1]
    refused(ConfigError, "class_weights names pink, which no row has; known are True, 2, c",
            task, pink=2.0)  # fmt: skip
    refused(ConfigError, "class_weights are 0 for all", task, **{"True": 0, "2": 0, "c": 0})


def test_of_prepare(tmp_path, capsys):
    """Wrong usage as everywhere: exit code 2."""
    given = ["prepare", "--corpus", "c.txt", "--out", str(tmp_path / "o")]
    for name, value in (
        ("shard_mb", "inf"), ("shard_mb", "0.0"), ("valid_fraction", "nan"), ("similarity", "2.0"),
        ("boilerplate", "-1.0"), ("vocab_size", "3"), ("processes", "0"),
    ):  # fmt: skip
        assert main([*given, f"--{name.replace('_', '-')}={value}"]) == 2
        assert f"{name} is {value}, expected" in capsys.readouterr().err


def test_every_number_is_finite():
    for settings in (ClassifyConfig, PretrainConfig):
        for f in dataclasses.fields(settings):
            for value in (math.inf, math.nan) if f.type is float else ():
                refused(ConfigError, f"{f.name} is {value}", settings, **{f.name: value})
    refused(ConfigError, "seed is -1", ClassifyConfig, seed=-1)


def test_standard_input_is_not_for_training():
    for name in ("train", "valid", "test"):
        refused(ConfigError, f"{name} is '-', expected a file", ClassifyConfig, **{name: "-"})
