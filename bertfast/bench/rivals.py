"""Ways to run a BERT checkpoint: bertfast's, and transformers' own."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import ClassVar

import torch

import bertfast

from ..ops import extension


class Rival:
    """One way to run a BERT checkpoint; a subclass says which, in what precisions and where.

    `Rival(folder, precision, threads)` loads the transformers checkpoint in `folder`; a call takes
    {"input_ids", "attention_mask"}, int64 [batch, seqlen] and right-padded, and gives
    last_hidden_state [batch, seqlen, hidden], in which padded positions mean nothing and which the
    next call may overwrite. torch's threads are the caller's to set. Rivals that list "cuda" among
    their devices also take device="cuda".
    """

    name: str
    precisions: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    packages: tuple[str, ...] = ()  # beyond bertfast's own dependencies
    tolerance = 2e-5  # of last_hidden_state in fp32, against transformers
    on_torch = False  # transformers' layers on torch's own products
    ours = False

    @classmethod
    def available(cls) -> str | None:
        """None, or why it can't run here."""
        missing = [name for name in cls.packages if find_spec(name) is None]
        return f"not installed: {', '.join(missing)} (pip install '.[bench]')" if missing else None

    def __init__(self, folder: str, precision: str, threads: int) -> None:
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError


def torch_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


class Sdpa(Rival):
    name = "transformers sdpa"
    precisions = ("fp32", "bf16")
    devices = ("cpu", "cuda")
    on_torch = True
    attention = "sdpa"

    def __init__(self, folder: str, precision: str, threads: int, device: str = "cpu") -> None:
        import transformers

        model = transformers.BertModel.from_pretrained(
            folder, attn_implementation=self.attention, dtype=torch_dtype(precision)
        )
        self.model = model.eval().to(device)

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).last_hidden_state


class Eager(Sdpa):
    name = "transformers eager"
    attention = "eager"


class Compiled(Sdpa):
    """Shapes are symbols from the start: one compilation serves every batch."""

    name = "transformers compiled"
    options: dict | None = None

    def __init__(self, folder: str, precision: str, threads: int, device: str = "cpu") -> None:
        super().__init__(folder, precision, threads, device)
        self.model = torch.compile(self.model, dynamic=True, options=self.options)


class MaxAutotune(Compiled):
    """With the weights as constants, which inductor lays out as its products want them."""

    name = "transformers max-autotune"
    options: ClassVar = {"max_autotune": True, "freezing": True}


class Loaded(Rival):
    """The native model as it loads."""

    name = "bertfast"
    precisions = ("fp32", "bf16")
    devices = ("cpu", "cuda")
    ours = True

    def __init__(self, folder: str, precision: str, threads: int, device: str = "cpu") -> None:
        model = bertfast.BertModel.from_pretrained(folder)
        self.model = model.eval().to(device, torch_dtype(precision))

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).last_hidden_state


class Frozen(Loaded):
    name = "bertfast frozen"
    precisions = ("fp32", "bf16", "int8")
    devices = ("cpu",)

    @classmethod
    def available(cls) -> str | None:
        return None if extension.C else f"no C++ extension: {extension.error}"

    def __init__(self, folder: str, precision: str, threads: int) -> None:
        super().__init__(folder, "fp32", threads)
        bertfast.freeze(self.model, precision)


class DropIn(Sdpa):
    """transformers' model after `bertfast.accelerate`."""

    name = "bertfast drop-in"
    ours, on_torch = True, False

    def __init__(self, folder: str, precision: str, threads: int, device: str = "cpu") -> None:
        super().__init__(folder, precision, threads, device)
        bertfast.accelerate(self.model)


IMPLEMENTATIONS = {  # as `--impl` calls them
    "bertfast": Loaded,
    "frozen": Frozen,
    "dropin": DropIn,
    "sdpa": Sdpa,
    "eager": Eager,
    "compile": Compiled,
    "max-autotune": MaxAutotune,
}
