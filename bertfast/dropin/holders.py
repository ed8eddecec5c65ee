"""Models inside other libraries' objects: a pipeline's, a trainer's, SetFit's, LangChain's,
LlamaIndex's; found by what they are, whatever the attribute is called."""

from types import FunctionType, ModuleType

from torch import nn

_DEPTH = 2  # a LangChain pipeline has a transformers pipeline, which has the model


def modules(holder: object) -> dict[str, nn.Module]:
    """The torch modules in an object's attributes or in their attributes, each once, by path; a
    module itself is the only one, at "".

    Raises: TypeError where there is none.
    """
    if isinstance(holder, nn.Module):
        return {"": holder}
    found, level = {}, {"": holder}
    for _ in range(_DEPTH):
        below = {}
        for path, one in level.items():
            for name, value in _attributes(one).items():
                below[f"{path}.{name}".lstrip(".")] = value
        for path, value in below.items():
            if isinstance(value, nn.Module) and not any(value is m for m in found.values()):
                found[path] = value
        level = {path: v for path, v in below.items() if not isinstance(v, nn.Module)}
    if not found:
        raise TypeError(
            f"expected a torch.nn.Module, or an object that has one in an attribute as a pipeline "
            f"has; got a {type(holder).__module__}.{type(holder).__qualname__}, in which there is "
            "none: give the model itself"
        )
    return found


def _attributes(one) -> dict:
    if isinstance(one, type | ModuleType | FunctionType):
        return {}
    found = dict(getattr(one, "__dict__", {}))
    if hasattr(type(one), "__pydantic_private__"):  # a slot
        found |= one.__pydantic_private__ or {}
    return found
