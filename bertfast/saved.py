"""Frozen models in a folder, whose files are mapped: processes share their pages.

A folder has the configuration, `frozen.safetensors` with all weights but the encoders', and for
each instruction set that packed the model `packed.<it>.safetensors` with those, besides the
manifest with checksums of all. A model of sentence-transformers has that for each of its
Transformers where it keeps these, and its own files.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .encoder.packed import PADDING, PRECISIONS, Freezable
from .encoder.packed_cpu import PackedCpu, layout
from .encoder.parts import damaged, padded, save_aligned
from .files import StrPath, locked, read_json, sha256, write_text, write_whole
from .ops.extension import C, error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MANIFEST, CONFIG, REST = "bertfast_frozen.json", "config.json", "frozen.safetensors"
_FORMAT = 1
_SENTENCES, _MODULES = "config_sentence_transformers.json", "modules.json"


def save_frozen(model: object, folder: StrPath) -> Path:
    """Write a frozen model to a folder, for `load_frozen`; the folder.

    Where the folder has the same model as another instruction set packed it (another processor, or
    `BERTFAST_CPU_ISA`), that stays beside it: one folder serves all kinds.

    Args:
        model: what `freeze` was given and has frozen for a CPU: a model of transformers or
            bertfast with any head, or one of sentence-transformers. Its tokenizer is saved with
            the latter alone.

    Raises: TypeError for another, ValueError for one that isn't frozen or is of a class that
    neither of these three has, FileExistsError where the folder has weights of another kind,
    BlockingIOError while another process saves there.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"save_frozen got a {type(model).__name__}, expected a frozen model: of a pipeline "
            "give its .model"
        )
    folder = Path(folder)
    if any(isinstance(m, Freezable) and m.packed is None for m in model.modules()) or not any(
        isinstance(m, Freezable) for m in model.modules()
    ):
        raise ValueError(
            f"the {type(model).__name__} isn't frozen: bertfast.freeze it, or save it by its own "
            "save_pretrained"
        )
    sentences = type(model).__module__.startswith("sentence_transformers.")
    check_out(folder, sentences)
    folder.mkdir(parents=True, exist_ok=True)
    if sentences:
        model.save_pretrained(str(folder), create_model_card=False)
        from .verify import write_rest

        write_rest(folder)
    else:
        write(model, folder)
    return folder


def sentences_class(folder: Path) -> str | None:
    """Which of sentence-transformers' classes a folder holds; None where it is no such folder."""
    about = folder / _SENTENCES
    if not about.is_file():
        return "SentenceTransformer" if has_modules(folder) else None
    return read_json(about).get("model_type") or "SentenceTransformer"


def is_frozen(folder: Path) -> bool:
    """Whether `save_frozen` wrote it; of another folder below it nothing follows."""
    if has_modules(folder):
        return any(folder.rglob(MANIFEST))
    return (folder / MANIFEST).is_file()


def has_modules(folder: Path) -> bool:
    """Whether it is of sentence-transformers, whose modules may have folders in it."""
    return (folder / _MODULES).is_file()


def recorded(folder: Path) -> dict[str, str]:
    """The SHA-256 that frozen models in a folder have of their files, by path in it. Raises
    OSError, ValueError for a damaged manifest."""
    found = {}
    for path in folder.rglob(MANIFEST) if has_modules(folder) else [folder / MANIFEST]:
        if not path.is_file():
            continue
        with damaged(path.parent):
            manifest = read_json(path)
            sums = {CONFIG: manifest["config"], REST: manifest["rest"]}
            sums |= {name: one["sha256"] for name, one in manifest["packed"].items()}
        found |= {(path.parent / n).relative_to(folder).as_posix(): s for n, s in sums.items()}
    return found


def check_out(folder: Path, sentences: bool) -> None:
    """FileExistsError where a folder has what a frozen model would spoil, or be spoiled by."""
    theirs = [p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin")]
    theirs = [n for n in theirs if n != REST and not n.startswith("packed.")]
    kind = _MODULES if sentences else _SENTENCES
    if (folder / kind).is_file() and not (sentences and is_frozen(folder)):
        theirs.append(kind)
    if theirs:
        raise FileExistsError(
            f"{folder} has another model's {', '.join(theirs)}: give another folder"
        )


def load_frozen(folder: StrPath) -> Any:
    """What `save_frozen` has written, of the same class, on the CPU and in eval mode.

    The files are mapped, not read: they may not be changed while a process has the model.

    Raises: FileNotFoundError, ValueError where a file is damaged or missing, was packed for other
    processors alone, or is of another version.
    """
    folder = Path(folder)
    name = sentences_class(folder)
    if name is None:
        return read(folder)
    read_json(folder / _SENTENCES)  # which `save_frozen` always writes
    from .dropin.sentences import load

    return load(folder, name)


def write(model: nn.Module, folder: Path) -> None:
    """`save_frozen` of a model of transformers or bertfast."""
    with locked(folder):
        _write(model, folder)


def _write(model, folder):
    """The largest come first, for which a full disk has no room, the manifest last, so that what a
    crash leaves is refused."""
    encoders = {n: m for n, m in model.named_modules() if isinstance(m, Freezable)}
    if not all(isinstance(m.packed, PackedCpu) for m in encoders.values()):
        raise ValueError("the model isn't frozen for a CPU, as save_frozen takes it")
    reference, config = _reference(model), model.config
    twin = _empty(_class(reference, folder), config, encoders)
    absent = _same_but_absent(model, twin)
    found, tied, seen = {}, {}, {}
    for name, t in _tensors(model):
        if id(t) in seen:
            tied[name] = seen[id(t)]
        else:
            seen[id(t)], found[name] = name, t.detach().contiguous()
    write_whole(folder / REST, lambda path: save_file(found, path))
    rest, name = sha256(folder / REST), f"packed.{C.build_info()['cpu_isa']}.safetensors"
    about, tensors, precisions, layers = {}, {}, set(), []
    for i, (path, encoder) in enumerate(encoders.items()):
        about[path], own = encoder.packed.parts()
        about[path]["padding"] = encoder.bertfast_padding
        precisions |= {layer.precision for layer in encoder.packed.layers}
        layers.append([path, [[layer.spec, layer.source] for layer in encoder.packed.layers]])
        tensors |= {f"{i}/{key}": padded(t) for key, t in own.items()}
    metadata = {"encoders": json.dumps(about)}
    write_whole(folder / name, lambda path: save_aligned(tensors, path, metadata))
    manifest = {"format": _FORMAT, "class": reference, "tied": tied, "absent": absent}
    manifest |= {"rest": rest, "layers": hashlib.sha256(json.dumps(layers).encode()).hexdigest()}
    others = _others(folder, manifest)
    config.save_pretrained(str(folder))
    manifest["config"] = sha256(folder / CONFIG)
    own = {"sha256": sha256(folder / name), "precisions": sorted(precisions)}
    manifest["packed"] = others | {name: own | {"layout": layout(frozenset(precisions))}}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    for path in folder.glob("packed.*.safetensors"):
        if path.name not in manifest["packed"]:
            path.unlink()  # of another model


def _others(folder: Path, manifest: dict) -> dict:
    """What other instruction sets packed of the same model; nothing where that can't be read."""
    try:
        with damaged(folder):
            before = read_json(folder / MANIFEST)
            same = all(before[key] == value for key, value in manifest.items())
            return dict(before["packed"]) if same else {}
    except (OSError, ValueError):
        return {}


def read(folder: Path, config: "PreTrainedConfig | None" = None) -> nn.Module:
    """`load_frozen` of a model of transformers or bertfast; config: in place of the folder's."""
    if C is None:
        raise RuntimeError(f"load_frozen needs the C++ kernels: {error}")
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: expected a folder that bertfast.save_frozen has written"
        )
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{folder / MANIFEST} is of another version of bertfast: freeze it anew")
    with damaged(folder):
        return _read(folder, manifest, config)


def _read(folder: Path, manifest: dict, config):
    name = _fitting(folder, manifest["packed"])
    sums = {CONFIG: manifest["config"], REST: manifest["rest"]}
    for file, expected in (sums | {name: manifest["packed"][name]["sha256"]}).items():
        if sha256(folder / file) != expected:
            raise ValueError(f"{folder / file} is damaged: its checksum is another; save it anew")
    cls, tied = _class(manifest["class"], folder), manifest["tied"]
    config = config or cls.config_class.from_pretrained(str(folder))
    config.name_or_path = str(folder)  # as from_pretrained does
    with safe_open(folder / name, framework="pt") as f:
        about = json.loads(f.metadata()["encoders"])
        packed = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    with safe_open(folder / REST, framework="pt") as f:
        rest = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    model = _empty(cls, config, about)
    for path in manifest["absent"]:
        model.get_submodule(path)
        setattr(*_owner(model, path), None)
    for i, (path, parts) in enumerate(about.items()):
        own = {k.partition("/")[2]: t for k, t in packed.items() if k.startswith(f"{i}/")}
        encoder = model.get_submodule(path)
        encoder.packed = PackedCpu.of_parts(parts, own, config)
        if parts["padding"] not in PADDING:
            raise ValueError(f"{folder / name} has the padding {parts['padding']!r}")
        encoder.bertfast_padding = parts["padding"]
    empty = dict(_tensors(model))
    if {*empty} != {*rest, *tied}:
        names = ", ".join(sorted({*empty} ^ {*rest, *tied}))
        raise ValueError(f"{folder} and its class {manifest['class']} differ in {names}")
    for name, t in empty.items():
        found, own = rest[tied.get(name, name)], name not in tied
        if found.shape != t.shape or found.is_floating_point() != t.is_floating_point():
            raise ValueError(
                f"{folder} has {name} as {found.dtype} {[*found.shape]}, and its configuration "
                f"makes {[*t.shape]}"
            )
        if own and isinstance(t, torch.nn.Parameter):
            rest[name] = torch.nn.Parameter(found, requires_grad=False)
    for name, t in empty.items():
        module, leaf = _owner(model, name)
        store = module._parameters if isinstance(t, torch.nn.Parameter) else module._buffers
        store[leaf] = rest[tied.get(name, name)]
    return model.eval()


def _empty(cls, config, encoders):
    """A model without weights, nor layers in its encoders, which are there for `packed`."""
    with torch.device("meta"):
        model = cls(config)
    if not any(isinstance(m, Freezable) for m in model.modules()):
        from .dropin import accelerate

        accelerate(model)
    for path in encoders:
        encoder = dict(model.named_modules()).get(path)
        if not isinstance(encoder, Freezable):
            raise ValueError(f"a {cls.__name__} has no encoder at {path}")
        encoder.empty()
    return model


def _tensors(model):
    """(name, it) of all parameters and buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _owner(model, name):
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _same_but_absent(model, twin) -> list[str]:
    """The modules that the model lacks and its class makes. Raises ValueError for other
    differences, which would be lost."""
    made = {n: type(m).__name__ for n, m in twin.named_modules(remove_duplicate=False)}
    there = {n: type(m).__name__ for n, m in model.named_modules(remove_duplicate=False)}
    absent = [n for n in made if n not in there and n.rpartition(".")[0] in there]
    for name in absent:
        setattr(*_owner(twin, name), None)
    made = {
        n: kind for n, kind in made.items() if not any(f"{n}.".startswith(f"{a}.") for a in absent)
    }
    shapes = [{n: tuple(t.shape) for n, t in _tensors(m)} for m in (model, twin)]
    for a, b in ((there, made), shapes):
        for name in a.keys() | b.keys():
            if a.get(name) != b.get(name):
                raise ValueError(
                    f"{name} of the {type(model).__name__} is {a.get(name)}, and its class makes "
                    f"{b.get(name)} of its configuration: save_frozen can't save what was changed"
                )
    return absent


def _fitting(folder, packed: dict) -> str:
    """The file that this processor's kernels read."""
    for name, one in packed.items():
        precisions = frozenset(one["precisions"])
        if not precisions <= {*PRECISIONS}:
            raise ValueError(f"{folder / MANIFEST} has the precisions {sorted(precisions)}")
        if one["layout"] == layout(precisions) and (folder / name).is_file():
            return name
    raise ValueError(
        f"{folder} was packed for other processors ({', '.join(packed)}) than this one, which runs "
        f"{C.build_info()['cpu_isa']}: freeze and save it here again, into the same folder, or set "
        "BERTFAST_CPU_ISA to an instruction set of these that both have"
    )


def _reference(model) -> str:
    cls = type(model)
    reference = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
    if _public(reference) is not cls:
        raise ValueError(
            f"save_frozen can't save a {cls.__module__}.{cls.__qualname__}, expected a public "
            "class of transformers or bertfast: give the model of such a class in it"
        )
    return reference


def _public(reference: str):
    import transformers

    from . import model

    library, _, name = reference.partition(".")
    return getattr({"transformers": transformers, "bertfast": model}.get(library), name, None)


def _class(reference, folder):
    """Raises ValueError for what is no model's."""
    from transformers import PreTrainedModel

    from .model import BertPreTrainedModel

    cls = _public(str(reference))
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel | BertPreTrainedModel):
        return cls
    raise ValueError(f"{folder / MANIFEST} has the class {reference!r}, expected a model's")
