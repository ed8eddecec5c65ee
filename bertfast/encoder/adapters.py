"""peft's adapters over a layer's linear modules, called in a product's place: those that do to each
row the same, whatever rows are beside it, and so take packed ones.
"""

import sys
from collections.abc import Sequence

from torch import nn

from . import watch
from .spec import Unfit

_TUNERS = "peft.tuners."
_BY_ROW = {  # tests/encoder/test_adapters.py holds each of them to it
    "adalora.layer.SVDLinear",
    "boft.layer.Linear",
    "c3a.layer.C3ALinear",
    "delora.layer.DeloraLinear",
    "fourierft.layer.FourierFTLinear",
    "gralora.layer.Linear",
    "hira.layer.Linear",
    "hra.layer.HRALinear",
    "ia3.layer.Linear",
    "loha.layer.Linear",
    "lokr.layer.Linear",
    "lora.layer.Linear",
    "lora.variants.DoraLinearVariant",
    "miss.layer.MissLinear",
    "oft.layer.Linear",
    "randlora.layer.Linear",
    "road.layer.Linear",
    "shira.layer.Linear",
    "vblora.layer.Linear",
    "vera.layer.Linear",
    "waveft.layer.WaveFTLinear",
}


def _peft():
    return sys.modules.get("peft.tuners.tuners_utils")


def is_adapter(m: nn.Module) -> bool:
    peft = _peft()
    return peft is not None and isinstance(m, peft.BaseTunerLayer)


def unmerged(m: nn.Module) -> bool:
    """Whether it is an adapter whose linear layer alone isn't what was trained."""
    return is_adapter(m) and not m.merged


def limit(m: nn.Module, path: str) -> Unfit | None:
    """Why calling an adapter on packed rows may be another thing than on padded ones, or None."""
    variants = vars(m).get("lora_variant", {}).values()
    for name in map(watch.class_name, (m, *variants)):
        if name.removeprefix(_TUNERS) not in _BY_ROW:
            return Unfit(path, f"it is a {name}, not a plain Linear")
    for inside, child in m.named_modules():
        why = watch.untouched(child, type(child))
        if not type(child).__module__.startswith(("torch.nn.modules.", _TUNERS)):
            why = f"it is a {watch.class_name(child)}, not one of peft's"
        if why:
            return Unfit(f"{path}.{inside}".rstrip("."), why)
    return None


def split(
    modules: tuple[nn.Module, ...], paths: Sequence[str]
) -> tuple[tuple[nn.Module, ...] | Unfit, dict[int, nn.Module]]:
    """(the modules, with what each adapter is over in its place; by index the adapters that do
    something now), or (why not, {})."""
    if _peft() is None or not any(map(is_adapter, modules)):
        return modules, {}
    plain, adapters = [*modules], {}
    for i, (m, path) in enumerate(zip(modules, paths, strict=True)):
        if is_adapter(m):
            why = limit(m, path)
            if why is not None:
                return why, {}
            plain[i] = m.base_layer
            # One that is merged and disabled undoes its merge when it is called.
            if m.merged == m.disable_adapters:
                adapters[i] = m
    return tuple(plain), adapters
