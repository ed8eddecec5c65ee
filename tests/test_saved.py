"""`save_frozen` and `load_frozen`: the same bits from files that are mapped."""

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from families import FAMILIES, PARTLY_FP32, build, inputs_for
from helpers import refused
from safetensors import SafetensorError

import bertfast
from bertfast.encoder.packed_cpu import ALIGNMENT
from bertfast.files import locked, sha256
from bertfast.ops.extension import C
from bertfast.saved import CONFIG, MANIFEST, REST

pytestmark = [
    pytest.mark.skipif(C is None, reason="no compiled extension"),
    pytest.mark.filterwarnings("ignore:int8"),
]


def frozen(family="Bert", precision="int8", head="Model", **options):
    return bertfast.freeze(build(family, head, initializer_range=0.1, **options), precision)


@torch.inference_mode()
def same(a, b, given=None):
    given = given or inputs_for()
    pairs = zip(a(**given).to_tuple(), b(**given).to_tuple(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def packed_file(folder):
    (path,) = folder.glob("packed.*.safetensors")
    return path


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, precision, tmp_path):
    model = frozen(family, precision)
    bertfast.save_frozen(model, tmp_path)
    loaded = bertfast.load_frozen(tmp_path)
    assert type(loaded) is type(model) and not loaded.training and same(loaded, model)
    assert not any(p.requires_grad for p in loaded.parameters())
    for (name, a), (_, b) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "head",
    ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
)
@pytest.mark.parametrize("family", ["Bert", "DebertaV2", "ModernBert", "DistilBert"])
def test_heads(family, head, tmp_path):
    """Tied weights too."""
    model = frozen(family, head=head)
    bertfast.save_frozen(model, tmp_path)
    loaded = bertfast.load_frozen(tmp_path)
    assert same(loaded, model)
    shared = lambda m: len([*m.parameters()]) - len([*m.named_parameters(remove_duplicate=False)])
    assert shared(loaded) == shared(model)


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_native(cls, tmp_path):
    from families import config

    torch.manual_seed(0)
    model = bertfast.freeze(getattr(bertfast, cls)(config("Bert")), "bf16")
    bertfast.save_frozen(model, tmp_path)
    assert same(bertfast.load_frozen(tmp_path), model)


def test_other_dtypes_and_parts(tmp_path):
    """A model in bf16, one without its pooler, and whatever accelerate was told."""
    low = build("Bert").to(torch.bfloat16)
    low.pooler = None
    bertfast.accelerate(low, padding="zeros")
    bertfast.save_frozen(bertfast.freeze(low, "bf16"), tmp_path)
    loaded = bertfast.load_frozen(tmp_path)
    assert loaded.pooler is None and loaded.dtype == torch.bfloat16 and same(loaded, low)
    given = inputs_for()
    assert not loaded(**given).last_hidden_state[given["attention_mask"] == 0].any()
    assert "ModernBert" in PARTLY_FP32  # test_every_family has those


@pytest.mark.parametrize(
    "cls", ["SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder"]
)
def test_sentences(saved, tmp_path, cls):
    """Of their class again, prompts and all, and by their own save, too."""
    st = pytest.importorskip("sentence_transformers")
    head = {"CrossEncoder": "ForSequenceClassification", "SparseEncoder": "ForMaskedLM"}.get(cls)
    options = {} if cls == "CrossEncoder" else {"prompts": {"query": "the "}}
    if not hasattr(st, cls):
        pytest.skip(f"this sentence-transformers has no {cls}")
    model = getattr(st, cls)(saved(head=head or "Model"), device="cpu", **options)
    bertfast.freeze(model, "int8")
    texts = ["a cat", "the dog ran far away", "sea"]

    def answer(model):
        if cls == "CrossEncoder":
            return model.predict([("sun", text) for text in texts], convert_to_tensor=True)
        if cls == "MultiVectorEncoder":
            return torch.cat([*model.encode(texts, prompt_name="query")])
        found = model.encode(texts, prompt_name="query", convert_to_tensor=True)
        return found.to_dense() if found.is_sparse else found

    expected = answer(model)
    bertfast.save_frozen(model, tmp_path / "a")
    model.save_pretrained(str(tmp_path / "b"))
    for folder in (tmp_path / "a", tmp_path / "b"):
        loaded = bertfast.load_frozen(folder)
        assert type(loaded) is type(model) and torch.equal(answer(loaded), expected)
    bertfast.save_frozen(loaded, tmp_path / "c")  # what is mapped is saved as well
    assert torch.equal(answer(bertfast.load_frozen(tmp_path / "c")), expected)


def test_where_it_came_from(tmp_path):
    """As from_pretrained says it: pipelines and logs show it."""
    folder = tmp_path / "a folder \u00fc"
    bertfast.save_frozen(frozen(), folder)
    loaded = bertfast.load_frozen(str(folder))
    assert loaded.name_or_path == loaded.config.name_or_path == str(folder)


def test_half_a_folder_of_sentences(saved, tmp_path):
    """It is no model of transformers."""
    st = pytest.importorskip("sentence_transformers")
    model = bertfast.freeze(st.SentenceTransformer(saved(), device="cpu"))
    bertfast.save_frozen(model, tmp_path)
    (tmp_path / "config_sentence_transformers.json").unlink()
    refused(FileNotFoundError, "config_sentence", bertfast.load_frozen, tmp_path)


def test_mapped(tmp_path):
    """No copy: packed weights lie in the file's pages, where kernels want them."""
    bertfast.save_frozen(frozen(), tmp_path)
    loaded = bertfast.load_frozen(tmp_path)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        [int(x, 16) for x in m[0].split("-")] for m in maps if m[-1] == str(packed_file(tmp_path))
    ]
    tensors = [t for layer in loaded.encoder.packed.layers for t in layer.tensors.values()]
    assert spans and len(tensors) > 10
    for t in tensors:
        assert t.data_ptr() % ALIGNMENT == 0
        assert any(start <= t.data_ptr() < end for start, end in spans)


def test_another_process(tmp_path):
    """By a pickle of multiprocessing's, which shares memory, and by loading."""
    model = frozen()
    again = ForkingPickler.loads(ForkingPickler.dumps(model))
    assert same(again, model) and bertfast.is_accelerated(again)
    refused(TypeError, "save_frozen", pickle.dumps, model)
    native = bertfast.freeze(bertfast.BertModel(model.config), "int8")
    assert same(pickle.loads(pickle.dumps(native)), native)


@pytest.mark.seconds
def test_two_instruction_sets_in_a_folder(tmp_path):
    """Each processor takes its own; one that has none says so, and what to do."""
    other = next(
        isa for isa in reversed(C.build_info()["isas_built"]) if isa != C.build_info()["cpu_isa"]
    )
    tests = Path(__file__).parent
    code = f"""
import sys
sys.path[:0] = [{str(tests)!r}]
import bertfast, test_saved
from pathlib import Path
folder = Path({str(tmp_path)!r})
try:
    bertfast.load_frozen(folder)
except ValueError as e:
    print(e)
bertfast.save_frozen(test_saved.frozen(), folder)
assert test_saved.same(bertfast.load_frozen(folder), test_saved.frozen())
"""
    bertfast.save_frozen(frozen(), tmp_path)
    environment = os.environ | {"BERTFAST_CPU_ISA": other, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "packed for other processors" in done.stdout and f"runs {other}" in done.stdout
    assert len([*tmp_path.glob("packed.*")]) == 2
    assert same(bertfast.load_frozen(tmp_path), frozen())
    changed = build("Bert", initializer_range=0.1)
    with torch.no_grad():  # another model, by its layers alone, as LoRA leaves one
        changed.encoder.layer[1].attention.self.query.weight[0, 0] += 1
    bertfast.save_frozen(bertfast.freeze(changed, "int8"), tmp_path)
    assert len(json.loads((tmp_path / MANIFEST).read_text())["packed"]) == 1
    assert len([*tmp_path.glob("packed.*")]) == 1


def test_damage_is_found(tmp_path):
    refused(FileNotFoundError, "save_frozen has written", bertfast.load_frozen, tmp_path)
    bertfast.save_frozen(frozen(), tmp_path)
    for path in (packed_file(tmp_path), tmp_path / REST):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(ValueError, "is damaged", bertfast.load_frozen, tmp_path)
        path.write_bytes(whole)
    packed_file(tmp_path).rename(tmp_path / "away")
    refused(ValueError, "packed for other processors", bertfast.load_frozen, tmp_path)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"format": 2}, "another version"),
        ({"class": "transformers.Trainer"}, "expected a model's"),
        ({"class": "os.system"}, "expected a model's"),
        ({"class": "transformers.BertForMaskedLM"}, "differ in|no encoder at"),
        ({"class": "transformers.PreTrainedModel"}, "is damaged"),
        ({"absent": ["pooler"]}, "differ in pooler"),
        ({"absent": ["forward"]}, "is damaged"),
        ({"absent": None}, "is damaged"),
        ({"tied": {"embeddings.word_embeddings.weight": "nowhere"}}, "is damaged"),
        ({"packed": 3}, "is damaged"),
        ({"config": "0"}, "config.json is damaged"),
    ],
)
def test_manifests_that_are_wrong(tmp_path, change, match):
    bertfast.save_frozen(frozen(), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | change))
    refused(ValueError, match, bertfast.load_frozen, tmp_path)
    bertfast.save_frozen(frozen(), tmp_path)  # as the errors say
    assert same(bertfast.load_frozen(tmp_path), frozen())


@pytest.mark.parametrize("part", ["config", "rest"])
def test_parts_that_do_not_fit_together(tmp_path, part):
    """A configuration of another model, of an earlier one say, and weights of another shape."""
    bertfast.save_frozen(frozen(), tmp_path / "a")
    bertfast.save_frozen(frozen(hidden_act="relu", vocab_size=91), tmp_path / "b")
    if part == "config":
        shutil.copy(tmp_path / "b" / CONFIG, tmp_path / "a")
        return refused(ValueError, "config.json is damaged", bertfast.load_frozen, tmp_path / "a")
    shutil.copy(tmp_path / "b" / REST, tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    manifest["rest"] = sha256(tmp_path / "a" / REST)
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    refused(ValueError, "makes .90, 48", bertfast.load_frozen, tmp_path / "a")


def test_sizes_are_checked():
    """Kernels read what a file says is there."""
    about, tensors = frozen().encoder.packed.parts()
    of_parts = type(frozen().encoder.packed).of_parts
    for name in ("0.qkv", "1.down", "0.norm1.weight", "1.norm2.bias"):
        refused(
            ValueError,
            "bytes, expected",
            of_parts,
            about,
            tensors | {name: tensors[name][:-64]},
            None,
        )
    refused(ValueError, "damaged", of_parts, about, tensors | {"-1.qkv": tensors["0.qkv"]}, None)
    del tensors["1.up"]
    refused(ValueError, "up has None bytes", of_parts, about, tensors, None)


_HUGE = 1 << 62


@pytest.mark.parametrize(
    "name, values",
    {
        "hidden": [-48, 0, 24, "48", _HUGE],
        "heads": [-3, 0, 1, 3.0],
        "head_dim": [-16, 0, 8, 15],
        "inner": [-80, 0, 16, True, _HUGE],
        "activation": ["foo", 3, []],
        "eps": ["x", -1.0, math.nan],
        "groups": [0, -1, 2, 7],
        "rotary": [-1, "a", _HUGE],
        "window": [-1, "a", 1 << 63],
        "relative": [["c2p"], ["x"], None, "c2p"],
        "pre_norm": [1, None],
        "gated": [True, 1],
        "extra": [3],
    }.items(),
)
def test_descriptions_are_checked(name, values):
    """Or kernels would read past what is there, or divide by zero."""
    about, tensors = frozen().encoder.packed.parts()
    of_parts = type(frozen().encoder.packed).of_parts
    for value in values:
        wrong = copy.deepcopy(about)
        for fields, *_ in wrong["layers"]:
            fields[name] = value
        refused(ValueError, "damaged", of_parts, wrong, tensors, None)


@pytest.mark.parametrize(
    "change",
    [
        *({"order": order} for order in ([], [0], [0, 99], [-1, 0], [0.0, 1], "01", None)),
        *({"precision": "fp99"}, {"dtype": "load"}, {"dtype": "float16"}, {"layers": []}),
        *({"buckets": n} for n in (-1, 5, None)),
        *({"noise": [0.1]}, {"noise": ["x", "y"]}, {"least_cosine": "x"}, {"why": 3}),
        {"layers": [[{}, "int8", 0]]},
    ],
    ids=str,
)
def test_what_is_said_of_layers_is_checked(change):
    packed = frozen().encoder.packed
    about, tensors = packed.parts()
    refused(ValueError, "damaged", packed.of_parts, about | change, tensors, None)
    for name in change:
        del about[name]
        refused(ValueError, "damaged", packed.of_parts, about, tensors, None)


def test_relative_positions_have_buckets():
    packed = frozen("DebertaV2").encoder.packed
    about, tensors = packed.parts()
    for n in (0, -3, 10**9):
        refused(ValueError, "damaged", packed.of_parts, about | {"buckets": n}, tensors, None)


def test_refusals(tmp_path):
    refused(TypeError, "expected a frozen model", bertfast.save_frozen, "model", tmp_path)
    refused(ValueError, "isn't frozen", bertfast.save_frozen, build("Bert"), tmp_path)
    refused(ValueError, "isn't frozen", bertfast.save_frozen, torch.nn.Linear(2, 2), tmp_path)
    changed = frozen()
    changed.pooler.activation = torch.nn.ReLU()
    refused(ValueError, "activation .* ReLU", bertfast.save_frozen, changed, tmp_path)
    changed = frozen()
    changed.extra = torch.nn.Linear(2, 2)
    refused(ValueError, "extra", bertfast.save_frozen, changed, tmp_path)

    class Own(type(build("Bert"))):
        pass

    own = Own(build("Bert").config)
    refused(ValueError, "public class", bertfast.save_frozen, bertfast.freeze(own), tmp_path)
    build("Bert").save_pretrained(tmp_path)
    refused(FileExistsError, "another folder", bertfast.save_frozen, frozen(), tmp_path)


def test_folders_of_another_kind(saved, tmp_path):
    """Neither is spoiled: not a router's, whose weights lie deeper, nor one of sentences."""
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    part = [modules.Transformer(saved()), modules.Pooling(48), modules.Dense(48, 8)]
    router = modules.Router.for_query_document(part, [*part])
    model = st.SentenceTransformer(modules=[router], device="cpu")
    model.save_pretrained(str(tmp_path / "a"))
    bertfast.freeze(model)
    refused(FileExistsError, "modules.json", bertfast.save_frozen, model, tmp_path / "a")
    for _ in range(2):  # over its own
        bertfast.save_frozen(model, tmp_path / "b")
    refused(FileExistsError, "config_sent", bertfast.save_frozen, frozen(), tmp_path / "b")
    loaded = bertfast.load_frozen(tmp_path / "b")
    assert not any(p.requires_grad for p in loaded.parameters())


def test_two_at_once(tmp_path):
    """Of two processors, say: neither takes the other's file for another model's."""
    with locked(tmp_path):
        refused(BlockingIOError, "in use", bertfast.save_frozen, frozen(), tmp_path)
    bertfast.save_frozen(frozen(), tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    bertfast.save_frozen(frozen(), tmp_path)
    other = frozen(hidden_act="relu")

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(bertfast.saved, "save_file", full)
        refused(OSError, "can't be written.*No space", bertfast.save_frozen, other, tmp_path)
    assert same(bertfast.load_frozen(tmp_path), frozen())
    bertfast.save_frozen(other, tmp_path)
    assert same(bertfast.load_frozen(tmp_path), other)
