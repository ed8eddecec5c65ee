"""Checkpoints of an encoder and a decoder, as transformers' `EncoderDecoderModel` has them."""

import copy
import json
import re
import reprlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, EncoderDecoderConfig

from ..files import StrPath, read_json, write_whole
from .bert import BertModel
from .checkpoint import _check_parameter, resolve
from .config import CONFIG, _check_values
from .config import check as check_bert
from .decoder import as_encoder
from .described import _Undrawn, described
from .errors import CheckpointError, unreadable
from .tensors import SAFETENSORS, by_name, read

if TYPE_CHECKING:
    from .translation import BertEncoderDecoder

M = TypeVar("M", bound="BertEncoderDecoder")
GENERATION = "generation_config.json"
_TOKENS = "decoder_start_token_id", "eos_token_id", "pad_token_id"
TABLES = "word_embeddings", "position_embeddings", "token_type_embeddings"
_BIAS = "decoder.cls.predictions.decoder.bias"
_TIED = {  # names that are one parameter where the decoder's configuration says so
    "decoder.cls.predictions.decoder.weight": "decoder.bert.embeddings.word_embeddings.weight",
    _BIAS: "decoder.cls.predictions.bias",
}
_SHARED = {  # and where the whole's says `tie_embeddings`
    f"decoder.bert.embeddings.{name}.weight": f"encoder.embeddings.{name}.weight" for name in TABLES
}
_OPTIONAL = re.compile(r"encoder\.pooler\.").match  # nothing here reads it
_BUFFERS = re.compile(r".*embeddings\.(position|token_type)_ids$").match


def check(config: EncoderDecoderConfig) -> None:
    """Raises ValueError for what no encoder and decoder of BERT can be built with."""
    for name in ("encoder", "decoder"):
        own = getattr(config, name, None)
        if getattr(own, "model_type", None) != "bert":
            kind = getattr(own, "model_type", None)
            raise ValueError(f"the {name} is of the type {kind!r}, expected 'bert'")
    if not (config.decoder.is_decoder and config.decoder.add_cross_attention):
        raise ValueError("the decoder's is_decoder and add_cross_attention are not both true")
    check_bert(config.encoder)
    check_bert(as_encoder(config.decoder))
    for name in _TOKENS:
        found, words = getattr(config, name, None), config.decoder.vocab_size
        for value in found if isinstance(found, list) and name == "eos_token_id" else [found]:
            if value is not None and not (type(value) is int and 0 <= value < words):
                raise ValueError(
                    f"{name} is {value!r}, expected a token from 0 to {words - 1} or null"
                )
    if getattr(config, "tie_embeddings", False):
        sizes = "vocab_size", "hidden_size", "max_position_embeddings", "type_vocab_size"
        for size in sizes:
            both = getattr(config.encoder, size), getattr(config.decoder, size)
            if both[0] != both[1]:
                raise ValueError(
                    f"tie_embeddings is true, but {size} is {both[0]} in the encoder and {both[1]} "
                    "in the decoder"
                )


def make_config(
    encoder: BertConfig,
    *,
    decoder_start_token_id: int,
    eos_token_id: int,
    decoder_layers: int | None = None,
    tie_embeddings: bool = True,
) -> EncoderDecoderConfig:
    """Of an encoder's sizes, and as many layers of a decoder; for a `BertEncoderDecoder` with new
    weights. Raises ValueError for what none can be built with."""
    decoder = copy.deepcopy(encoder)
    decoder.is_decoder = decoder.add_cross_attention = True
    if decoder_layers is not None:
        decoder.num_hidden_layers = decoder_layers
    config = EncoderDecoderConfig(
        encoder=encoder.to_dict(),
        decoder=decoder.to_dict(),
        pad_token_id=encoder.pad_token_id,
        decoder_start_token_id=decoder_start_token_id,
        eos_token_id=eos_token_id,
    )
    config.tie_embeddings = tie_embeddings
    check(config)
    return config


def from_encoder(
    cls: type[M],
    name: StrPath,
    start: int,
    end: int,
    decoder_layers: int | None,
    fresh: bool,
    tie_embeddings: bool,
    allow_pickle: bool,
) -> M:
    """The body of `BertEncoderDecoder.from_encoder`."""
    folder = resolve(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pooler that is new: nothing reads it
        encoder = BertModel.from_pretrained(folder, allow_pickle=allow_pickle)
    there = encoder.config.num_hidden_layers
    layers = there if decoder_layers is None else decoder_layers
    if not fresh and not 0 <= layers <= there:
        raise ValueError(
            f"decoder_layers is {layers}, the checkpoint has {there} to start from: give up to "
            "that, or fresh=True"
        )
    model = cls(
        make_config(
            encoder.config,
            decoder_start_token_id=start,
            eos_token_id=end,
            decoder_layers=layers,
            tie_embeddings=tie_embeddings,
        )
    )
    model.encoder.load_state_dict(encoder.state_dict())
    given = {} if fresh else _starting(folder, encoder, layers, allow_pickle)
    own = model.decoder.state_dict()
    model.decoder.load_state_dict({k: t for k, t in given.items() if k in own}, strict=False)
    tied = {k.removeprefix("decoder.") for k in (*_TIED, *(_SHARED if tie_embeddings else ()))}
    model.new_weights = [f"decoder.{k}" for k in own if k not in given and k not in tied]
    return model.eval()


def _starting(folder, encoder, layers, allow_pickle) -> dict:
    """A decoder's tensors that a checkpoint of an encoder has: its embeddings, layers spread evenly
    among its own, and a masked language model's head."""
    state, there = encoder.state_dict(), encoder.config.num_hidden_layers
    given = {f"bert.{k}": t for k, t in state.items() if k.startswith("embeddings.")}
    for i in range(layers):
        source = i if layers == there else round(i * (there - 1) / max(1, layers - 1))
        prefix = f"encoder.layer.{source}."
        for k in state:
            if k.startswith(prefix):
                given[f"bert.encoder.layer.{i}.{k.removeprefix(prefix)}"] = state[k]
    found, _ = by_name(folder, read(folder, allow_pickle), "bert")
    return given | {k: t for k, t in found.items() if k.startswith("cls.predictions.")}


def read_kind(folder: Path) -> str | None:
    """The model type that a folder's configuration says."""
    with unreadable(folder / CONFIG):
        values = read_json(folder / CONFIG)
    return values.get("model_type") if isinstance(values, dict) else None


def read_config(folder: Path) -> EncoderDecoderConfig:
    """Raises CheckpointError."""
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(f"{path} is not there: is this a checkpoint's folder?")
    with unreadable():
        values = read_json(path)
    with unreadable(path):
        kind = values.get("model_type") if isinstance(values, dict) else values
        if kind != "encoder-decoder":
            raise ValueError(
                f"model_type is {reprlib.repr(kind)}, expected 'encoder-decoder'; of an encoder's "
                "checkpoint BertEncoderDecoder.from_encoder makes one to be trained"
            )
        for name in ("encoder", "decoder"):
            own = values.get(name)
            if not isinstance(own, dict):
                raise ValueError(f"{name} is {reprlib.repr(own)}, expected a configuration")
            _check_values(own | {"is_decoder": False, "add_cross_attention": False})
        config = EncoderDecoderConfig.from_dict(values)
        _read_ends(config, folder / GENERATION)
        check(config)
    return config


def _read_ends(config, path):
    """What ends a sequence is an argument of `generate`'s in transformers, in a file of its own."""
    given = read_json(path) if path.is_file() else {}
    given = given if isinstance(given, dict) else {}
    known = (given, vars(config), vars(config.decoder))
    values = (where.get("eos_token_id") for where in known)
    config.eos_token_id = next((v for v in values if v is not None), None)
    for name in ("decoder_start_token_id", "pad_token_id"):
        if getattr(config, name, None) is None:
            setattr(config, name, given.get(name))


def load(cls: type[M], name_or_folder: StrPath, allow_pickle: bool, dtype: torch.dtype | None) -> M:
    """The body of `from_pretrained`."""
    folder = resolve(name_or_folder)
    config = read_config(folder)
    found, spelled = by_name(folder, read(folder, allow_pickle), "encoder_decoder")
    with torch.device("meta"), _Undrawn():
        expected = cls(config).state_dict()
    tied = (_TIED if config.decoder.tie_word_embeddings else {}) | (
        _SHARED if getattr(config, "tie_embeddings", False) else {}
    )
    if _BIAS in found and not config.decoder.tie_word_embeddings:
        found[_TIED[_BIAS]] = found[_BIAS]  # the one that transformers then adds
    tied |= {_BIAS: _TIED[_BIAS]}
    _check_names(folder, expected, found, spelled, tied)
    for name, t in expected.items():
        if name in found:
            _check_parameter(folder, spelled[name], found[name], t, dtype or t.dtype)
    for name, other in tied.items():
        if {name, other} <= found.keys() and not torch.equal(found[name], found[other]):
            raise CheckpointError(
                f"{folder}: {name} and {other} differ, but are one parameter: remove one, or set "
                "tie_embeddings and the decoder's tie_word_embeddings to false"
            )
    model = cls(config)
    model.load_state_dict({k: t for k, t in found.items() if k in expected}, strict=False)
    model.new_weights = []
    return (model if dtype is None else model.to(dtype)).eval()


def _check_names(folder, expected, found, spelled, tied) -> None:
    absent = expected.keys() - found.keys()
    lacking = sorted(k for k in absent if not _OPTIONAL(k) and tied.get(k) not in found)
    other = sorted(spelled[k] for k in found.keys() - expected.keys() if not _BUFFERS(k))
    if lacking or other:
        raise CheckpointError(
            f"{folder} is no BERT encoder and decoder as its configuration says: "
            + "; ".join(
                f"{what} {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
                for what, names in (("it lacks", lacking), ("it has no place for", other))
                if names
            )
        )


def save(model: nn.Module, folder: StrPath) -> None:
    """The body of `save_pretrained`."""
    config = copy.deepcopy(model.config)
    config.encoder = described(model.encoder)
    state = model.state_dict()
    with torch.device("meta"), _Undrawn():
        expected = {k: t.shape for k, t in type(model)(config).state_dict().items()}
    wrong = [k for k in expected.keys() | state.keys() if expected.get(k) != _shape(state.get(k))]
    if wrong:
        raise ValueError(
            f"this {type(model).__name__} can't be saved, for its configuration describes another: "
            f"{', '.join(sorted(wrong)[:3])}; merge adapters, remove parametrizations, or correct "
            "model.config"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, taken = {}, set()
    for name, t in state.items():
        own = t.detach().cpu().contiguous()
        # transformers reads both tables of a pair that is one here
        tensors[name] = own.clone() if own.data_ptr() in taken else own
        taken.add(own.data_ptr())
    for name in _TIED if config.decoder.tie_word_embeddings else ():
        del tensors[name]
    config.architectures = ["EncoderDecoderModel"]
    config.dtype = str(model.dtype).removeprefix("torch.")
    ends = {name: getattr(config, name, None) for name in _TOKENS}
    write_whole(folder / CONFIG, lambda p: Path(p).write_text(config.to_json_string()))
    write_whole(folder / GENERATION, lambda p: Path(p).write_text(json.dumps(ends, indent=2)))
    write_whole(folder / SAFETENSORS, lambda p: save_file(tensors, p, metadata={"format": "pt"}))


def _shape(t):
    return None if t is None else t.shape
