"""`bertfast convert`, beside transformers' classes with the same numbers assigned by hand."""

import json
import os
import random
import shutil
import sys

import pytest
import tiny
import torch
import transformers
from foreign import (
    SIZES,
    flax_folder,
    google_folder,
    pack,
    places,
    tensorflow,
    tensors,
    text,
    training,
)
from helpers import refused
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.cli import main
from bertfast.convert import convert
from bertfast.data.errors import ConfigError
from bertfast.model import CheckpointError
from bertfast.model.foreign import flax as foreign_flax
from bertfast.model.foreign import tensorflow as bundle
from bertfast.model.foreign.stored import FLOATS
from bertfast.model.tokenizer import load_tokenizer

HEADS = ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification"]
HEADS += ["ForTokenClassification", "ForQuestionAnswering", "ForNextSentencePrediction"]
GOOGLE = ["Model", "ForPreTraining", "ForSequenceClassification", "ForQuestionAnswering"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "##s"]


def built(head, num_labels=3, **options):
    """transformers' model, without our files or its own."""
    if head == "ForQuestionAnswering":
        num_labels = 2
    config = transformers.BertConfig(**SIZES, num_labels=num_labels, **options)
    return getattr(transformers, f"Bert{head}")(config).eval()


def batch():
    g = torch.Generator().manual_seed(1)
    mask = (torch.arange(20) < torch.tensor([20, 3, 11])[:, None]).long()
    ids = torch.randint(5, 200, (3, 20), generator=g)
    types = torch.randint(0, 2, (3, 20), generator=g)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def same_model(reference, out):
    """The folder's model, loaded by both libraries, says what `reference` does."""
    name, given = type(reference).__name__, batch()
    cls = getattr(transformers, name)
    model, info = cls.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    state = model.state_dict()
    for key, value in reference.state_dict().items():
        assert torch.equal(state[key], value), key
    with torch.no_grad():
        expected, found = reference(**given).to_tuple(), model.eval()(**given).to_tuple()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        if hasattr(bertfast, name):
            ours = getattr(bertfast, name).from_pretrained(out)
            assert ours.new_weights == [] and ours.unused_weights == []
            keep = given["attention_mask"].bool()
            for a, b in zip(expected, ours(**given).to_tuple(), strict=True):
                a, b = (x[keep] if x.shape[:2] == keep.shape else x for x in (a, b))
                assert (a - b).abs().max() <= 1e-5 * a.abs().max()


@pytest.mark.parametrize("head", GOOGLE)
def test_tensorflow(tmp_path, head):
    reference = built(head)
    folder = google_folder(tmp_path / "in", training(tensors(reference, flax=False)))
    result = convert(folder, tmp_path / "out")
    assert result["class"] == f"Bert{head}" and result["left_out"] == []
    count = len({p.data_ptr() for p in reference.parameters()})
    assert result["tensors"] == count
    assert result["ignored"] == {"global_step": 1, "*/adam_m": count, "*/adam_v": count}
    assert result["parameters"] == sum(p.numel() for p in reference.parameters())
    same_model(reference, tmp_path / "out")


@pytest.mark.parametrize("head", HEADS)
def test_flax(tmp_path, head):
    reference = built(head)
    folder = flax_folder(tmp_path / "in", tensors(reference, flax=True))
    result = convert(folder, tmp_path / "out")
    assert result["class"] == f"Bert{head}" and not result["ignored"] | {}
    same_model(reference, tmp_path / "out")


def test_pooler_under_a_head_without_one(tmp_path):
    """SQuAD's checkpoints have it, though nothing reads it; so have those of a masked LM's encoder."""
    reference = built("ForQuestionAnswering")
    weights = tensors(reference, flax=False)
    pooler = {
        "bert/pooler/dense/kernel": torch.ones(48, 48),
        "bert/pooler/dense/bias": torch.ones(48),
    }
    result = convert(google_folder(tmp_path / "in", weights | pooler), tmp_path / "out")
    assert result["class"] == "BertForQuestionAnswering" and result["left_out"] == sorted(pooler)
    assert "no place for bert/pooler/dense/bias, bert/pooler/dense/kernel" in result["notes"][0]
    same_model(reference, tmp_path / "out")


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_as_many_labels_as_rows(tmp_path, labels):
    weights = tensors(built("ForSequenceClassification", labels), flax=False)
    convert(google_folder(tmp_path / "in", weights), tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_labels == labels


def test_names_of_labels_are_kept(tmp_path):
    names = {
        "id2label": {"0": "no", "1": "yes", "2": "so"},
        "label2id": {"no": 0, "yes": 1, "so": 2},
    }
    weights = tensors(built("ForSequenceClassification"), flax=True)
    convert(flax_folder(tmp_path / "in", weights, **names), tmp_path / "out")
    model = bertfast.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "no", 1: "yes", 2: "so"}


def test_which_class(tmp_path):
    both = built("ForPreTraining"), built("ForSequenceClassification")
    weights = tensors(both[0], False) | tensors(both[1], False)
    folder = google_folder(tmp_path / "in", weights)
    message = "heads of a BertForPreTraining and of a BertForSequenceClassification: choose one by"
    refused(CheckpointError, message, convert, folder, tmp_path / "out")
    for name in ("BertForSequenceClassification", "BertForMaskedLM", "BertForTokenClassification"):
        result = convert(folder, tmp_path / name, architecture=name)
        assert result["class"] == name and result["left_out"]
    same_model(both[1], tmp_path / "BertForSequenceClassification")
    refused(
        ConfigError,
        "'BertX', expected one of BertFor",
        convert,
        folder,
        tmp_path / "out",
        architecture="BertX",
    )
    message = "lacks qa_outputs.bias, qa_outputs.weight, which"
    refused(
        CheckpointError,
        message,
        convert,
        folder,
        tmp_path / "out",
        architecture="BertForQuestionAnswering",
    )


def test_half_a_head(tmp_path):
    reference = built("Model")
    weights = tensors(reference, flax=False) | {"output_weights": torch.ones(3, 48)}
    folder = google_folder(tmp_path / "in", weights)
    message = (
        "has output_weights, of a head of which it lacks the rest: --ignore it, or .* BertModel"
    )
    refused(CheckpointError, message, convert, folder, tmp_path / "out")
    result = convert(folder, tmp_path / "out", architecture="BertModel")
    assert result["left_out"] == ["output_weights"]
    same_model(reference, tmp_path / "out")


def test_of_equal_classes_the_configuration_names_one(tmp_path):
    weights = tensors(built("ForSequenceClassification", 1), flax=True)
    folder = flax_folder(tmp_path / "in", weights, architectures=["BertForMultipleChoice"])
    assert convert(folder, tmp_path / "out")["class"] == "BertForMultipleChoice"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flax", [False, True])
def test_numbers_of_16_bits(tmp_path, dtype, flax):
    reference = built("Model")
    weights = tensors(reference, flax, dtype)
    made = (flax_folder if flax else google_folder)(tmp_path / "in", weights)
    result = convert(made, tmp_path / "out")
    assert result["dtype"] == str(dtype).removeprefix("torch.")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in reference.state_dict().items():
        assert found[name].dtype == dtype and torch.equal(found[name].float(), value)
    mixed = weights | {name: t.float() for name, t in list(weights.items())[:3]}
    made = (flax_folder if flax else google_folder)(tmp_path / "mixed", mixed)
    assert convert(made, tmp_path / "wide")["dtype"] == "float32"
    same_model(reference, tmp_path / "wide")


def test_roberta_of_flax(tmp_path):
    sizes = SIZES | {"pad_token_id": 1}
    torch.manual_seed(0)
    reference = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes)).eval()
    weights = {}
    for name, value in reference.state_dict().items():
        path = name.replace(".", "/")
        if "decoder" in name:  # tied
            continue
        if "embeddings/" in path and value.dim() == 2:
            path = path.removesuffix("weight") + "embedding"
        elif "norm" in path.lower():
            path = path.replace("/weight", "/scale")
        elif value.dim() == 2:
            path, value = path.removesuffix("weight") + "kernel", value.T.contiguous()
        weights[path] = value
    folder = flax_folder(tmp_path / "in", weights, model_type="roberta", pad_token_id=1)
    assert convert(folder, tmp_path / "out")["class"] == "RobertaForMaskedLM"
    same_model(reference, tmp_path / "out")


def _keras_name(name):
    """Of a variable that Flax calls so, as TFBertFor... keeps it below its first two scopes."""
    path, _, leaf = name.rpartition("/")
    if path.endswith("LayerNorm"):
        leaf = {"scale": "gamma", "bias": "beta"}[leaf]
    if leaf == "embedding":
        leaf = "weight" if "word" in path else "embeddings"
    path = path.replace("layer/", "layer_._").replace("cls/pred", "mlm___cls/pred")
    return f"{path}/{leaf}:0".replace("cls/seq", "nsp___cls/seq")


@pytest.mark.parametrize("head", HEADS[1:])
def test_keras(tmp_path, head):
    h5py = pytest.importorskip("h5py")
    reference = built(head)
    weights = tensors(reference, flax=True)
    folder = flax_folder(tmp_path / "in", {})
    os.remove(folder / "flax_model.msgpack")
    with h5py.File(folder / "tf_model.h5", "w") as f:
        for name, value in weights.items():
            own = _keras_name(name)
            f[f"{own.split('/')[0]}/tf_bert/{own}"] = value.numpy()
        shared = "bert/embeddings/word_embeddings/weight:0"
        f[f"mlm___cls/tf_bert/{shared}"] = f[f"bert/tf_bert/{shared}"][()]
    assert convert(folder, tmp_path / "out")["class"] == f"Bert{head}"
    same_model(reference, tmp_path / "out")
    with h5py.File(folder / "tf_model.h5", "r+") as f:
        f[f"mlm___cls/tf_bert/{shared}"][3, 3] += 1
    refused(CheckpointError, "are one variable, and differ", convert, folder, tmp_path / "o")


def test_keras_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    message = r"takes h5py to read: install it with pip install 'bertfast\[convert\]'"
    refused(CheckpointError, message, convert, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "given", ["", "bert_model.ckpt", "bert_model.ckpt.index", "bert_model.ckpt.data-00001-of-00002"]
)
def test_the_checkpoint_by_any_of_its_names(tmp_path, given):
    folder = google_folder(tmp_path / "in", tensors(built("Model"), flax=False))
    assert convert(folder / given, tmp_path / "out")["source"] == str(folder / "bert_model.ckpt")


def test_folder_of_a_run(tmp_path):
    """The last of several; configuration and vocabulary are where the run started from."""
    reference, first, run = built("Model"), tmp_path / "first", tmp_path / "run"
    weights = tensors(reference, flax=False)
    google_folder(first, weights)
    (first / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tensorflow(run / "model.ckpt-20", weights)
    tensorflow(run / "model.ckpt-10", {name: t * 0 for name, t in weights.items()})
    given = {"config": first / "bert_config.json", "vocab": first / "vocab.txt"}
    message = "holds several checkpoints, model.ckpt-10, model.ckpt-20: give the path of one"
    refused(CheckpointError, message, convert, run, tmp_path / "out", **given)
    (run / "checkpoint").write_text(
        'model_checkpoint_path: "/gone/model.ckpt-20"\nall_model_checkpoint_paths: "model.ckpt-10"\n'
    )
    assert convert(run, tmp_path / "out", **given)["source"] == str(run / "model.ckpt-20")
    same_model(reference, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out")("red cats")["input_ids"] == [2, 5, 6, 7, 3]


CASES = {  # files beside the checkpoint, argument -> what "Red" becomes, words in the result
    "lower": ({}, None, 5, "uncased (guessed: 3 of its words have lower-case letters, 0 upper-case)"),
    "upper": ({"vocab": "Red"}, None, 8, "cased (guessed: 1 of its 9 words have upper-case letters)"),
    "told cased": ({}, False, 1, "cased (as told)"),
    "told uncased": ({"vocab": "Red"}, True, 5, "uncased (as told)"),
    "bert_config": ({"bert": {"do_lower_case": False}}, None, 1, "cased (do_lower_case is false"),
    "tokenizer_config": ({"vocab": "Red", "own": {"do_lower_case": True}}, None, 5, "uncased (do_lower_case is true"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tokenizer_of_a_vocabulary(tmp_path, case):
    files, lowercase, expected, said = CASES[case]
    folder = google_folder(tmp_path / "in", tensors(built("Model"), flax=False))
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *files.get("vocab", "").split()]) + "\n")
    values = json.loads((folder / "bert_config.json").read_text()) | files.get("bert", {})
    (folder / "bert_config.json").write_text(json.dumps(values))
    if "own" in files:
        (folder / "tokenizer_config.json").write_text(json.dumps(files["own"]))
    result = convert(folder, tmp_path / "out", lowercase=lowercase)
    assert result["tokenizer"].startswith(f"vocab.txt, {said}")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (folder / "vocab.txt").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Red cats")["input_ids"] == [2, expected, 6, 7, 3]
    assert tokenizer.model_max_length == 40


def test_tokenizer_that_is_whole(tmp_path):
    own = tiny.checkpoint(tmp_path / "own")
    folder = flax_folder(tmp_path / "in", tensors(built("Model"), flax=True))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(own / name, folder / name)
    refused(
        ConfigError,
        "leave --cased and --uncased out",
        convert,
        folder,
        tmp_path / "out",
        lowercase=True,
    )
    convert(folder, tmp_path / "out")
    given = "a red cat jumps"
    assert (
        load_tokenizer(tmp_path / "out")(given)["input_ids"]
        == load_tokenizer(own)(given)["input_ids"]
    )


def test_ignored_by_name(tmp_path):
    reference = built("Model")
    more = {"bert/adapter_1/kernel": torch.ones(2, 2), "bert/adapter_2/kernel": torch.ones(2, 2)}
    folder = google_folder(tmp_path / "in", tensors(reference, flax=False) | more)
    message = "has bert/adapter_1/kernel, bert/adapter_2/kernel, which no bert of transformers"
    refused(CheckpointError, message, convert, folder, tmp_path / "out")
    result = convert(folder, tmp_path / "out", ignore=["bert/adapter*"])
    assert result["ignored"] == {"bert/adapter*": 2}
    same_model(reference, tmp_path / "out")
    refused(
        ConfigError,
        "--ignore 'x' is no tensor's name",
        convert,
        folder,
        tmp_path / "o",
        ignore=["x"],
    )


def _edit(name, change):
    def fault(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return fault


def _config(**changes):
    return _edit(
        "bert_config.json",
        lambda data: json.dumps(
            {k: v for k, v in (json.loads(data) | changes).items() if v is not None}
        ).encode(),
    )


def _written(change=lambda weights: weights, **options):
    return lambda folder: google_folder(
        folder, change(tensors(built("Model"), flax=False)), **options
    )


def _field(number, value):
    def change(name, fields):
        if name == "bert/embeddings/word_embeddings":
            fields[number] = value

    return _written(entry=change)


def _without(name):
    return lambda folder: os.remove(folder / name)


def _only(name, data):
    """A folder with that file alone."""

    def fault(folder):
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_bytes(data)

    return fault


def _layer(weights, i):
    return {
        name.replace("layer_1", f"layer_{i}"): t for name, t in weights.items() if "layer_1" in name
    }


INDEX, DATA = "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00002"
MORE = text(7, b"")
FAULTS = {  # what is done to a sound folder, the words of the error
    "missing shard": (_without(DATA), f"lacks {DATA}: bert_model.ckpt.index has its tensors in 2 files"),
    "missing index": (_without(INDEX), "holds .*: expected bert_model.ckpt.index of TensorFlow, flax_model"),
    "truncated data": (_edit(DATA, lambda d: d[:-9]), f"{DATA} is truncated: .* is in its bytes .*take it anew"),
    "empty data": (_edit(DATA, lambda d: b""), "is truncated: .* and it has 0"),
    "flipped bit": (_edit(DATA, lambda d: d[:999] + bytes([d[999] ^ 16]) + d[1000:]), f"{DATA} is damaged: the checksum of .* is another"),
    "flipped bit of the index": (_edit(INDEX, lambda d: d[:30] + bytes([d[30] ^ 1]) + d[31:]), f"{INDEX} is damaged .*has another checksum"),
    "truncated index": (_edit(INDEX, lambda d: d[:-1]), f"{INDEX} is no index of a TensorFlow checkpoint, or is truncated: it ends in .*expected 57fb808b247547db"),
    "empty index": (_edit(INDEX, lambda d: b""), "it ends in nothing"),
    "missing configuration": (_without("bert_config.json"), "bert_config.json is not there: put .* by --config"),
    "configuration that is none": (_edit("bert_config.json", lambda d: b"{"), "bert_config.json is no JSON"),
    "configuration of a list": (_edit("bert_config.json", lambda d: b"[1]"), r"holds \[1\], expected names"),
    "another hidden_size": (_config(hidden_size=64), r"LayerNorm/beta is \[48\], expected \[64\] as hidden_size is 64; correct it, or"),
    "another intermediate_size": (_config(intermediate_size=90), r"dense/bias is \[100\], expected \[90\] as intermediate_size is 90"),
    "more layers": (_config(num_hidden_layers=3), r"lacks bert.encoder.layer.2.* and 13 more, which its configuration makes of a BertModel"),
    "fewer layers": (_config(num_hidden_layers=1), "has bert/encoder/layer_1.*, which are layers beyond num_hidden_layers, 1"),
    "no heads": (_config(num_attention_heads=None), "has no num_attention_heads, which no tensor tells"),
    "heads that do not fit": (_config(num_attention_heads=5), "hidden_size 48 is no multiple of num_attention_heads 5"),
    "another family": (_config(model_type="gpt2"), "model_type is 'gpt2', expected one of bert, roberta"),
    "unknown tensor": (_written(lambda w: w | {"bert/x": torch.ones(2)}), "has bert/x, which no bert of transformers has a place for: --ignore"),
    "lacks one": (_written(lambda w: {n: t for n, t in w.items() if "layer_1/output/dense/k" not in n}), "lacks bert.encoder.layer.1.output.dense.weight, which"),
    "layers of a gap": (_written(lambda w: w | _layer(w, 5)), "has bert/encoder/layer_5"),
    "two names": (_written(lambda w: w | {"bert/encoder/layer/0/output/dense/bias": torch.ones(48)}), "two of one weight"),
    "dtype": (_written(lambda w: w | {"bert/embeddings/position_embeddings": torch.ones(40, 48).double()}), "position_embeddings is float64, expected float32, float16, bfloat16"),
    "unknown dtype": (_written(lambda w: w | {"bert/x": torch.ones(2, dtype=torch.complex64)}), "bert/x is TensorFlow's type 8, expected"),
    "in parts": (_field(7, b""), "word_embeddings is kept in parts .a partitioned variable."),
    "object graph": (_written(lambda w: {"model/v/.ATTRIBUTES/VARIABLE_VALUE": torch.ones(2)}), "TensorFlow 2's object graphs"),
    "big-endian": (_written(header=b"\x10\x01"), "big-endian"),
    "shard beyond": (_field(3, 9), "word_embeddings is in data file 9 of 2"),
    "bytes beyond": (_field(4, 1 << 40), "is truncated: bert/embeddings/word_embeddings is in its bytes 1,099"),
    "other bytes than its shape": (_field(2, text(2, b"\x08\xc8\x01") + text(2, b"\x08\x30") + text(2, b"\x08\x01")), r"word_embeddings is \[200, 48, 1\], expected \[200, 48\]; correct"),
    "V1": (_only("bert_model.ckpt", b"abc" + bytes.fromhex("57fb808b247547db")), "bert_model.ckpt is a TensorFlow checkpoint of format V1"),
    "HDF5": (_only("tf_model.h5", b"\x89HDF\r\n\x1a\n..."), "tf_model.h5 is (an HDF5 file, of Keras|damaged)"),
    "pickle": (_only("pytorch_model.bin", b"PK\x03\x04..."), "pytorch_model.bin is a pickle"),
    "nothing": (_only("readme", b"x"), "holds readme: expected"),
    "vocabulary of more words": (lambda f: (f / "vocab.txt").write_text("\n".join(WORDS + [f"w{i}" for i in range(200)])), "vocab.txt has 208 words, and the model 200"),
    "vocabulary without letters": (lambda f: (f / "vocab.txt").write_text("\n".join([*WORDS[:5], "1"])), "no letters of either case: say --cased or --uncased"),
    "vocabulary that is no text": (lambda f: (f / "vocab.txt").write_bytes(b"\xff\xfe"), "vocab.txt is no text in UTF-8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    weights = tensors(built("Model"), flax=False)
    return google_folder(tmp_path_factory.mktemp("sound"), weights)


@pytest.mark.seconds
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path, sound, fault):
    break_it, message = FAULTS[fault]
    folder = tmp_path / "in"
    shutil.copytree(sound, folder)
    break_it(folder)
    refused(CheckpointError, message, convert, folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def _tree(weights):
    return lambda folder: (folder / "flax_model.msgpack").write_bytes(pack(weights))


FLAX = "flax_model.msgpack"
FLAX_FAULTS = {
    "truncated": (_edit(FLAX, lambda d: d[:-7]), f"{FLAX} is damaged, truncated or no MessagePack .take it anew.*it ends at byte"),
    "empty": (_edit(FLAX, lambda d: b""), f"{FLAX} is damaged"),
    "more": (_edit(FLAX, lambda d: d + b"x"), "its value ends at byte"),
    "a pickle": (_edit(FLAX, lambda d: b"\x80\x04\x95rest"), f"{FLAX} is damaged, truncated or no MessagePack"),
    "a list": (_edit(FLAX, lambda d: b"\x91\x01"), "it holds a list, expected names and arrays"),
    "a number": (_tree({"embeddings": {"word": 5}}), "embeddings/word is 5, expected an array"),
    "integers": (_tree({"bert": {"step": torch.ones(2, dtype=torch.int64)}}), "bert/step is int64, expected float32"),
    "nothing of BERT": (_tree({"params": {"x": torch.ones(2)}}), "lacks bert.embeddings.*, and has x: give"),
    "configuration": (_without("config.json"), "config.json is not there"),
    "no family": (_edit("config.json", lambda d: b"{}"), "model_type is None, expected one of"),
    "chunks": (_tree({"x": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": torch.ones(2)}}}), r"x is \[3\], its pieces have 2 numbers"),
    "chunks in disorder": (_tree({"x": {"__msgpack_chunked_array__": True, "shape": {"1": 3}, "chunks": {}}}), FLAX),
}  # fmt: skip


@pytest.mark.seconds
@pytest.mark.parametrize("fault", FLAX_FAULTS)
def test_faults_of_flax(tmp_path, fault):
    break_it, message = FLAX_FAULTS[fault]
    folder = flax_folder(tmp_path / "in", tensors(built("Model"), flax=True))
    break_it(folder)
    refused(CheckpointError, message, convert, folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.seconds
@pytest.mark.parametrize("flax", [False, True])
def test_any_damage_is_of_one_kind(tmp_path, flax):
    """Bytes that changed: an error of a checkpoint, or tensors of sound shapes."""
    weights = {"bert/x": torch.ones(3, 4), "bert/y/z": torch.ones(5)}
    folder = (flax_folder if flax else google_folder)(tmp_path, weights)
    path, read = folder / FLAX, foreign_flax.read
    if not flax:
        path, read = (
            folder / "bert_model.ckpt.index",
            lambda _: bundle.read(folder / "bert_model.ckpt"),
        )
    data, r, raised = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(r.randint(1, 3)):
            changed[r.randrange(len(data))] = r.randrange(256)
        path.write_bytes(changed[: r.choice([None, r.randrange(len(data))])])
        try:
            for stored in read(path).values():
                if stored.dtype in FLOATS:
                    assert stored.read().shape == stored.shape
        except CheckpointError:
            raised += 1
    assert raised > 150


def test_out(tmp_path, sound):
    refused(ConfigError, "the folder of the checkpoint itself", convert, sound, sound)
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x": torch.ones(1)}, other / "model.safetensors")
    refused(ConfigError, "holds model.safetensors: give a new folder", convert, sound, other)
    assert set(load_file(other / "model.safetensors")) == {"x"}
    refused(OSError, "is a file; give another", convert, sound, sound / "bert_config.json" / "x")
    (tmp_path / "empty").mkdir()
    convert(sound, tmp_path / "empty")
    convert(sound, tmp_path / "new" / "deep")
    assert sorted(os.listdir(tmp_path)) == ["empty", "new", "other"]
    assert os.listdir(tmp_path / "new") == ["deep"]


def test_src_that_is_not_there(tmp_path):
    for name in ("gone", "x" * 9999, "a\0b"):
        refused(
            CheckpointError,
            "is not there: give|is no name of",
            convert,
            tmp_path / name,
            tmp_path / "out",
        )


def test_full_disk_leaves_nothing(tmp_path, sound, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(OSError, "out can't be written: .*No space", convert, sound, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_command(tmp_path, sound, capsys):
    out = str(tmp_path / "out")
    assert main(["convert", str(sound), "--out", out]) == 0
    said, progress = capsys.readouterr()
    result = json.loads(said)
    assert result["class"] == "BertModel" and result["format"] == "TensorFlow"
    assert "note: " in progress and "tanh formula" in result["notes"][0]
    assert main(["convert", str(sound), "--out", out]) == 2
    assert "bertfast: out is" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "gone"), "--out", f"{out}2"]) == 1
    said, error = capsys.readouterr()
    assert said == "" and "gone is not there" in error
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(sound), "--out", f"{out}2", "--cased", "--uncased"])


def test_writer_of_the_tests_has_every_weight():
    for head in HEADS:
        model = built(head)
        found = {p.data_ptr() for p, _, _ in places(model, True)}
        assert found == {p.data_ptr() for p in model.parameters()}
