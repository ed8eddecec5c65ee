"""sentence-transformers' models whose Transformer modules are frozen."""

from pathlib import Path
from typing import Any

import sentence_transformers
from sentence_transformers.base.modules import Transformer
from torch import nn

from .. import saved


class FrozenTransformer(Transformer):
    """Saved and loaded by bertfast/saved.py; else as theirs."""

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        saved.write(self.model, Path(output_path))
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)

    def _load_model(
        self, model_name_or_path, transformer_task, config, backend, is_peft_model, **model_kwargs
    ):
        return saved.read(Path(model_name_or_path, model_kwargs.get("subfolder") or ""), config)


def load(folder: Path, name: str) -> nn.Module:
    """What `save_frozen` has written of the model class `name`.

    Raises: ValueError for a class that sentence-transformers doesn't have, ImportError where it is
    too old to be told of ours.
    """
    cls = getattr(sentence_transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"{folder} holds a {name!r}, which sentence-transformers doesn't have")
    # Not trust_remote_code, which would let the folder name any class.
    make = getattr(cls, "_load_with_module_classes", None)
    if make is None:
        raise ImportError("load_frozen needs sentence-transformers 6.2 or newer for this folder")
    reference = f"{FrozenTransformer.__module__}.{FrozenTransformer.__qualname__}"
    known = {reference: FrozenTransformer}
    return (
        make(str(folder), known, device="cpu", local_files_only=True).eval().requires_grad_(False)
    )
