"""Who may read the padded rows of an encoder's result. Where nobody does, they need no work.

Only the code that called the encoder knows, and one model is called in many ways: by a head's
forward, its encoder alone, a pipeline, under a hook. So the question is put to the call stack, at
every call with padding: each frame above the encoder hands its result on, or is known not to look
at padding, or reads it. Whatever is not known here reads it.
"""

import sys

import torch
from torch import nn

from ..model.watch import hooked, untouched

# Modules whose functions hand a result on as it is.
_PASSING = {
    "bertfast.dropin.fused",
    "torch.nn.modules.module",
    "torch.nn.parallel.distributed",
    "torch.utils._contextlib",
    "torch.amp.autocast_mode",
    "accelerate.utils.operations",
    "transformers.utils.generic",
    "transformers.utils.output_capturing",
}
_SENTENCES, _POOLED = "sentence_transformers.", "sentence_embedding"
# sentence-transformers' modules that weigh tokens by the mask, and those that see only what these
# made of them.
_TRANSFORMERS = ("Transformer", "MLMTransformer")
_POOLINGS = ("Pooling", "SpladePooling")
_AFTER_POOLING = ("Normalize", "Dense", "Dropout", "LayerNorm")
_BASE, _FIRST, _TOKENS = range(3)
_FORWARDS = {}  # code of a forward -> what becomes of the states there, and by which module


def register(base: type, first: dict[type, tuple[str, type] | None], tokens: tuple[type, ...]):
    """A family's classes.

    base: its model, which hands on the states, and what a pooler makes of column 0.
    first: heads that give away column 0 alone -> the module that takes it from the states, by name
        and class; None where their own forward does.
    tokens: heads that give away a row for each token.
    """
    _FORWARDS[_code(base)] = _BASE, None
    _FORWARDS.update({_code(head): (_FIRST, taker) for head, taker in first.items()})
    _FORWARDS.update({_code(head): (_TOKENS, None) for head in tokens})


def _code(cls: type):
    function = cls.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__code__


def reader(packing) -> str | None:
    """Who may read padded rows of what this call of an encoder returns, or None.

    packing: the call's `Packing`, which drops some rows.
    """
    masked_loss = pooled = trusted = False
    for frame in _callers():
        if isinstance(frame, nn.Module):
            return f"a hook on {type(frame).__name__}"
        code, own, module = frame.f_code, frame.f_locals, frame.f_globals.get("__name__", "")
        if code in _FORWARDS:
            kind, taker = _FORWARDS[code]
            if kind == _FIRST:
                return _column_0(own["self"], taker, packing)
            if kind == _TOKENS:
                if any(map(hooked, _behind_encoder(own["self"]))):
                    return f"a hook in {type(own['self']).__name__}"
                masked_loss = _leaves_padding_out(own.get("labels"), packing)
        elif module.startswith(_SENTENCES):
            if own.get("output_value", _POOLED) != _POOLED:
                return f"output_value={own['output_value']!r}"
            if pooled:
                trusted = True
            elif isinstance(own.get("self"), nn.Sequential):
                why = _modules_after(own, packing)
                if why:
                    return why
                pooled = True
            elif type(own.get("self")).__name__ not in _TRANSFORMERS:
                return _name(frame)
        elif trusted:
            return None
        elif masked_loss and (module, code.co_name) == ("transformers.trainer", "compute_loss"):
            return "compute_loss(return_outputs=True)" if own["return_outputs"] else None
        else:
            return _name(frame)
    return "an unknown caller"


def _name(frame):
    return f"{frame.f_code.co_name} of {frame.f_globals.get('__name__')}"


def _callers():
    """Frames above the encoder that do more than hand on, and modules there with hooks."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in _PASSING:
            yield frame
        elif module == "torch.nn.modules.module":
            called = frame.f_locals.get("self")
            if called is not None and hooked(called):
                yield called
        frame = frame.f_back


def _column_0(head, taker, packing) -> str | None:
    """What keeps a head from reading only real rows."""
    if taker is not None and untouched(head.get_submodule(taker[0]), taker[1]):
        return f"{type(head).__name__}.{taker[0]}, which is not as its class made it"
    if bool((packing.mask[:, 0] == 0).any()):
        return f"{type(head).__name__}, which takes column 0: padding in some row"
    return None


def _behind_encoder(head):
    return (
        module
        for name, child in head.named_children()
        if name != head.base_model_prefix
        for module in child.modules()
    )


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
        if untouched(m, type(m)) or getattr(m, "module_input_name", _POOLED) != _POOLED:
            break
    else:
        m = pooling
        # Where no token counts "cls" takes column 0, and with a mask of another length all count.
        excluded = not getattr(m, "include_prompt", True) and "cls" in m.pooling_mode
        lengths = packing.cu_seqlens.diff()
        if rest and not excluded and mask.shape[-1] == packing.seqlen and bool(lengths.all()):
            return None
    return f"{type(m).__name__} of {type(container).__name__}"
