"""`bertfast convert`, beside transformers' classes with the same numbers assigned by hand."""

import json
import os
import shutil
import sys

import pytest
import tiny
import torch
import transformers
from foreign import (
    SIZES,
    WORDS,
    built,
    flax_folder,
    google_folder,
    places,
    tensorflow,
    tensors,
    training,
)
from helpers import refused
from safetensors.torch import load_file

import bertfast
from bertfast.convert import convert
from bertfast.data.errors import ConfigError
from bertfast.model import CheckpointError
from bertfast.model.tokenizer import load_tokenizer

HEADS = ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification"]
HEADS += ["ForTokenClassification", "ForQuestionAnswering", "ForNextSentencePrediction"]
GOOGLE = ["Model", "ForPreTraining", "ForSequenceClassification", "ForQuestionAnswering"]


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


def test_writer_of_the_tests_has_every_weight():
    for head in HEADS:
        model = built(head)
        found = {p.data_ptr() for p, _, _ in places(model, True)}
        assert found == {p.data_ptr() for p in model.parameters()}
