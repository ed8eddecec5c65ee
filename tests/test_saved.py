"""`save_frozen` and `load_frozen`: the same bits from files that are mapped."""

import json
import os
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from families import FAMILIES, PARTLY_FP32, build, inputs_for
from helpers import refused

import bertfast
from bertfast.encoder.packed_cpu import ALIGNMENT
from bertfast.ops.extension import C
from bertfast.saved import MANIFEST, REST

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
    bertfast.save_frozen(frozen("Bert", "int8", vocab_size=91), tmp_path)  # another model
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
        ({"absent": ["pooler"]}, "differ in pooler"),
    ],
)
def test_manifests_that_are_wrong(tmp_path, change, match):
    bertfast.save_frozen(frozen(), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | change))
    refused(ValueError, match, bertfast.load_frozen, tmp_path)


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
    del tensors["1.up"]
    refused(ValueError, "up has None bytes", of_parts, about, tensors, None)


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
