"""Who may read the padded rows of an encoder's result. Where nobody does, they need no work.

Only the code that called the encoder knows, and one model is called in many ways: by a head's
forward, its encoder alone, a pipeline, under a hook. So the question is put to the call stack, at
every call with padding: each frame above the encoder hands its result on, or is known not to look
at padding, or reads it. Whatever is not known here reads it.
"""

import inspect
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..encoder.packed import Freezable
from ..encoder.watch import hooked, untouched

if TYPE_CHECKING:
    from ..encoder.batch import Packing
    from ..families.family import Family

# Modules whose functions hand a result on as it is.
_PASSING = {
    "bertfast.dropin.fused",
    "bertfast.dropin.readers",
    "bertfast.dropin.stack",
    "bertfast.encoder.compile",
    "bertfast.encoder.watch",
    "torch._dynamo.eval_frame",
    "torch.nn.modules.module",
    "torch.nn.parallel.distributed",
    "torch.utils._contextlib",
    "torch.amp.autocast_mode",
    "accelerate.utils.operations",
    "peft.peft_model",
    "peft.tuners.tuners_utils",
    "transformers.utils.generic",
    "transformers.utils.output_capturing",
}
_SENTENCES, _POOLED = "sentence_transformers.", "sentence_embedding"
# sentence-transformers' modules that weigh tokens by the mask, and those that see only what these
# made of them.
_TRANSFORMERS = ("Transformer", "MLMTransformer", "FrozenTransformer")
_POOLINGS = ("Pooling", "SpladePooling")
_AFTER_POOLING = ("Normalize", "Dense", "Dropout", "LayerNorm")
# Functions of sentence-transformers that keep what its model returns to themselves.
_OWNERS = ("_inference", "encode", "compute_loss")
_OURS = ("bertfast.text_encoder", "vectors")  # bertfast.embed takes the embeddings alone
_REAL = ("bertfast.train.networks", "logits")  # takes the rows of real tokens alone
_ROW_BY_ROW = {nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.CrossEntropyLoss, nn.ModuleList}
_ROW_BY_ROW |= {nn.Tanh}
_EMBEDDINGS = ("embeddings", "embed_tokens")  # of a base model, before its encoder
_BASE, _FIRST, _TOKENS = range(3)
_FORWARDS = {}  # place of a forward -> what becomes of the states there, and by which module


def register(family: "Family") -> None:
    """A `Family`'s `Readers`."""

    def place(name):
        return _place(_code(family.named(name)))

    base, first, tokens = family.readers
    _FORWARDS[place(base)] = _BASE, None
    for head, taker in first.items():
        _FORWARDS[place(head)] = _FIRST, taker and (taker[0], family.named(taker[1]))
    _FORWARDS.update({place(head): (_TOKENS, None) for head in tokens})


def _code(cls: type):
    function = cls.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__code__


def _place(code):
    """Of a function: torch.compile runs other code for it, with the same variables, from there."""
    return code.co_filename, code.co_firstlineno, code.co_name


def runs(frame: FrameType, cls: type) -> bool:
    """Whether a frame runs a class's forward."""
    return _place(frame.f_code) == _place(_code(cls))


def states_read(base: type, read: Any) -> bool:
    """Whether whoever called an encoder reads the states of all layers; of the family's model its
    forward's variables tell, by `Family.reads_states`."""
    for frame in _callers():
        if isinstance(frame, nn.Module) or not runs(frame, base):
            return True
        try:
            return read(variables(frame))
        except (AttributeError, KeyError):  # not the model that is known here
            return True
    return True


def reader(packing: "Packing") -> str | None:
    """Who may read padded rows of what this call of an encoder returns, or None.

    packing: the call's `Packing`, which drops some rows.
    """
    try:
        return _reader(packing)
    except (AttributeError, KeyError, ValueError) as e:  # not built as the classes here are
        return f"a caller that is not known here ({e!r})"


def _reader(packing):
    masked_loss = pooled = False
    for frame in _callers():
        if isinstance(frame, nn.Module):
            return f"a hook on {type(frame).__name__}"
        code, module = frame.f_code, frame.f_globals.get("__name__", "")
        if _place(code) in _FORWARDS:
            own, (kind, taker) = variables(frame), _FORWARDS[_place(code)]
            if kind == _FIRST:
                return _column_0(own["self"], taker, packing)
            changed = _changed(own["self"], kind)
            if changed is not None:
                return f"{type(changed).__name__} in {type(own['self']).__name__}"
            if kind == _TOKENS:
                masked_loss = _leaves_padding_out(own.get("labels"), packing)
        elif module.startswith(_SENTENCES):
            own = variables(frame)
            if pooled and code.co_name in _OWNERS:
                value = own.get("output_value", _POOLED)
                return None if value == _POOLED else f"output_value={value!r}"
            if not pooled and isinstance(own.get("self"), nn.Sequential):
                why = _modules_after(own, packing)
                if why:
                    return why
                pooled = True
            elif not pooled and type(own.get("self")).__name__ not in _TRANSFORMERS:
                return _name(frame)
        elif (pooled and (module, code.co_name) == _OURS) or (module, code.co_name) == _REAL:
            return None
        elif masked_loss and (module, code.co_name) == ("transformers.trainer", "compute_loss"):
            returned = variables(frame)["return_outputs"]
            return "compute_loss(return_outputs=True)" if returned else None
        else:
            return _name(frame)
    return "an unknown caller"


def _name(frame):
    return f"{frame.f_code.co_name} of {frame.f_globals.get('__name__')}"


def _callers():
    """Frames above the encoder that do more than hand on, and modules there with hooks."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in _PASSING:
            yield frame
        elif module == "torch.nn.modules.module":
            called = variables(frame).get("self")
            if called is not None and hooked(called):
                yield called
        frame = frame.f_back


def variables(frame: FrameType) -> dict:
    """The frame's variables. Python before 3.13 keeps those that it shows alive on the frame."""
    shown = frame.f_locals
    found = dict(shown)
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        shown.clear()
    return found


def _as_made(m: nn.Module, cls: type) -> bool:
    """Whether m is a plain `cls` whose forward is the one in its class's own file."""
    return not untouched(m, cls) and _code(cls).co_filename == sys.modules[cls.__module__].__file__


def _changed(model, kind):
    """A module behind the encoder that may do more than one row at a time, or None; of a base
    model its norm and pooler, which see all rows."""
    if kind == _BASE:
        children = model.named_children()
        behind = (c for n, c in children if n not in _EMBEDDINGS and not isinstance(c, Freezable))
    else:
        children = model.named_children()
        behind = (m for n, c in children if n != model.base_model_prefix for m in c.modules())
    own = type(model).__module__, "transformers.activations"
    for m in behind:
        known = type(m) in _ROW_BY_ROW or type(m).__module__ in own
        if not (known and _as_made(m, type(m))):
            return m
    return None


def _column_0(head, taker, packing) -> str | None:
    """What keeps a head from reading only real rows."""
    if taker is not None and not _as_made(head.get_submodule(taker[0]), taker[1]):
        return f"{type(head).__name__}.{taker[0]}, which is not as its class made it"
    if bool((packing.mask[:, 0] == 0).any()):
        return f"{type(head).__name__}, which takes column 0: padding in some row"
    return None


def _leaves_padding_out(labels, packing) -> bool:
    """Whether a loss with these labels [batch, seqlen] does."""
    return (
        isinstance(labels, torch.Tensor)
        and labels.shape == packing.mask.shape
        and bool((labels[packing.mask == 0] == -100).all())
    )


def _modules_after(frame, packing) -> str | None:
    """Who may read padding behind the Transformer that a container's forward now runs.

    frame: that forward's variables.
    """
    container, modules = frame["self"], list(frame["self"])
    mask = frame["input"].get("attention_mask")
    rest = modules[modules.index(frame["module"]) + 1 :]
    pooling = rest[0] if rest else container
    for m in rest:
        known = _POOLINGS if m is pooling else _AFTER_POOLING
        if type(m).__name__ not in known or not type(m).__module__.startswith(_SENTENCES):
            break
        if not _as_made(m, type(m)) or getattr(m, "module_input_name", _POOLED) != _POOLED:
            break
    else:
        m = pooling
        # Where no token counts "cls" takes column 0, and with a mask of another length all count.
        excluded = not getattr(m, "include_prompt", True) and "cls" in m.pooling_mode
        lengths = packing.cu_seqlens.diff()
        if rest and not excluded and mask.shape[-1] == packing.seqlen and bool(lengths.all()):
            return None
    return f"{type(m).__name__} of {type(container).__name__}"
