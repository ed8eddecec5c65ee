"""Configurations and tokenizers with values changed, lost or of another kind: what is read either
works or is refused with the documented error, in one line, soon."""

import copy
import json
import math
import random
import shutil
import time
from contextlib import suppress

import pytest
import tiny
import torch
import transformers
from helpers import relative
from safetensors.torch import load_file, save_file

import bertfast
import bertfast.data
from bertfast.cli import main
from bertfast.model import CheckpointError
from bertfast.model.tokenizer import load_tokenizer

INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 12, 100, 512, 513, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30]
NUMBERS += [0.0, 1.0, 0.5, 1e-12, 2.5, 1e38, 1e300, math.inf, math.nan]
NUMBERS += [-n for n in NUMBERS]
OTHERS = [
    None,
    True,
    False,
    "",
    "8",
    "gelu",
    "relu",
    "bert",
    "float16",
    "int8",
    "\ud800",
    "x" * 9999,
]
OTHERS += [[], [8], [None], {}, {"0": "a"}, {"a": 0}, {"0": "a", "1": "b", "2": "c"}, {"1": {}}]
NAMES = ["position_embedding_type", "classifier_dropout", "is_decoder", "add_cross_attention"]
NAMES += ["quantization_config", "per_layer_config", "num_labels", "problem_type", "torch_dtype"]
NAMES += ["chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict"]
NAMES += [
    "attn_implementation",
    "_attn_implementation",
    "rope_scaling",
    "rope_theta",
    "layer_types",
]
NAMES += ["to_dict", "__class__", "__dict__", "name_or_path", "_name_or_path", "", "a.b", "\ud800"]
NAMES += [
    "tokenizer_class",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "architectures",
    "model_type",
]


def places(value, path=()):
    """The path of every value in a tree."""
    yield path
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield from places(value[key], (*path, key))


def value_for(draw, tree):
    kind = draw.randrange(8)
    if kind < 4:
        return draw.choice(NUMBERS)
    if kind < 7:
        return copy.deepcopy(draw.choice(OTHERS))
    found = tree
    for key in draw.choice(list(places(tree))[1:]):
        found = found[key]
    return copy.deepcopy(found)


def mutate(draw, tree):
    """One change: a value set, lost, renamed or made another's; `tree` is changed or a new one."""
    path = draw.choice(list(places(tree))[1:])
    owner = tree
    for key in path[:-1]:
        owner = owner[key]
    kind = draw.randrange(12)
    if kind < 7:
        owner[path[-1]] = value_for(draw, tree)
    elif kind < 9:
        del owner[path[-1]]
    elif kind < 11 and isinstance(owner, dict):
        owner[draw.choice(NAMES)] = value_for(draw, tree)
    elif kind == 11 and draw.random() < 0.2:
        return value_for(draw, tree)
    return tree


def mutated(draw, text: str) -> bytes:
    """A JSON file with up to three changes, now and then with bytes changed or lost."""
    tree = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if isinstance(tree, dict) and tree:
            tree = mutate(draw, tree)
    data = bytearray(json.dumps(tree).encode())
    kind = draw.randrange(30)
    if kind == 0:
        del data[draw.randrange(len(data)) :]
    elif kind == 1:
        data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == 2:
        data = bytearray(draw.choice((b"[", b'{"a":')) * 100_000)
    return bytes(data)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A classifier of three classes with its tokenizer."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("source"))
    base = bertfast.BertModel.from_pretrained(folder)
    names = dict(enumerate(("red", "green", "blue")))
    base.config.id2label, base.config.label2id = names, {n: i for i, n in names.items()}
    model = bertfast.BertForSequenceClassification(base.config)
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / SHARD)
    index = {"metadata": {}, "weight_map": dict.fromkeys(list(model.state_dict())[:3], SHARD)}
    (folder / INDEX).write_text(json.dumps(index))
    tiny.write(folder / "texts.jsonl", tiny.rows(3))
    tiny.write(folder / "train.jsonl", tiny.rows(60))
    return folder


def cases(source, folder, seed, n, files):
    """`n` times `folder` is a copy of `source` with one file changed: what it then holds."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    texts = {name: (source / name).read_text() for name in files}
    for i in range(n):
        draw = random.Random(f"{seed} {i}")
        name = draw.choice(files)
        data = mutated(draw, texts[name])
        (folder / name).write_bytes(data)
        yield f"{name}, case {i} of seed {seed}: {data[:2000]!r}"
        (folder / name).write_text(texts[name])


def soon(case, function, *arguments):
    """What the function returns, None for the documented error, within two seconds' work."""
    start = time.process_time()
    try:
        found = function(*arguments)
    except CheckpointError as e:
        assert str(e).strip() and "\n" not in str(e), case
        found = None
    except BaseException as e:
        raise AssertionError(f"{type(e).__name__}: {e}; {case}") from e
    assert time.process_time() - start < 2, case
    return found


def logits(folder, library=bertfast):
    model = library.BertForSequenceClassification.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return model(torch.tensor([[2, 5, 9, 3]]), return_dict=True).logits


def check_configurations(source, folder, seed, n):
    assert logits(source).shape == (1, 3)
    loaded = 0
    for case in cases(source, folder, seed, n, [*["config.json"] * 9, INDEX]):
        found = soon(case, logits, folder)
        if found is not None:
            loaded += 1
            assert found.shape == (1, 3) and found.isfinite().all(), case
            if case.startswith("config.json") and (loaded < 20 or not loaded % 20):
                stock = found
                with suppress(Exception):  # what it reads beyond what is ours: chunks, attention
                    stock = logits(folder, transformers)
                assert relative(found, stock) < 0.01, (found, stock, case)
    assert n / 10 < loaded < n * 9 / 10  # some of each


def check_tokenizers(source, folder, seed, n):
    files = ["tokenizer.json", "tokenizer_config.json"]
    assert load_tokenizer(source) is not None
    for case in cases(source, folder, seed, n, files):
        tokenizer = soon(case, load_tokenizer, folder)
        if tokenizer is not None:
            rows = bertfast.data.encode(tokenizer, ["a red bird"], max_length=16)
            assert all(0 <= i < len(tokenizer) for i in rows[0]["input_ids"]), case


def check_commands(source, folder, seed, n, capsys):
    """On the command line: the work done, or one line and no traceback."""
    files = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    common = ["classify", "--model", str(folder), "--device", "cpu"]
    predict = ["predict", *common, "--input", str(source / "texts.jsonl")]
    train = ["finetune", *common, "--train", str(source / "train.jsonl"), "--max-length", "16"]
    train += ["--out", str(folder / "out"), "--dry-run"]
    shutil.copytree(source, folder, dirs_exist_ok=True)
    assert main(predict) == main(train) == 0
    capsys.readouterr()
    for i, case in enumerate(cases(source, folder, seed, n, files)):
        code = soon(case, main, train if i % 2 else predict)
        out, err = capsys.readouterr()
        if code:
            lines = [line for line in err.splitlines() if line.startswith("bertfast: ")]
            assert code in (1, 2) and len(lines) == 1 and "Traceback" not in err, (case, err)
        else:
            assert len(out.splitlines()) == (0 if i % 2 else 3), (case, err)


@pytest.mark.parametrize("command", ["predict --input", "evaluate --data"])
def test_weights_that_are_no_numbers(source, tmp_path, capsys, command):
    """A class comes out of NaN as well: the first."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / SHARD)
    weights["classifier.bias"][1] = math.nan
    save_file(weights, tmp_path / SHARD, metadata={"format": "pt"})
    name, option = command.split()
    texts = str(source / "texts.jsonl")
    assert main([name, "classify", "--model", str(tmp_path), option, texts]) == 1
    assert "classifier.bias holds NaN" in capsys.readouterr().err


@pytest.mark.seconds
def test_mutated_configurations(source, tmp_path):
    check_configurations(source, tmp_path, 0, 200)


def test_mutated_tokenizers(source, tmp_path):
    check_tokenizers(source, tmp_path, 1, 50)


@pytest.mark.seconds
def test_mutated_on_the_command_line(source, tmp_path, capsys):
    check_commands(source, tmp_path, 2, 20, capsys)


@pytest.mark.slow
def test_5000_mutations(source, tmp_path, capsys):
    check_configurations(source, tmp_path, 3, 5000)
    check_tokenizers(source, tmp_path, 4, 1000)
    check_commands(source, tmp_path, 5, 200, capsys)
