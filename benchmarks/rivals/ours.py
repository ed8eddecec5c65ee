"""bertfast: the model as it loads, and frozen for inference."""

import bertfast
from bertfast.ops import extension

from .base import Rival


class Loaded(Rival):
    name = "bertfast"
    precisions = ("fp32",)

    def __init__(self, folder, precision, threads):
        self.model = bertfast.BertModel.from_pretrained(folder).eval()

    def __call__(self, batch):
        return self.model(**batch).last_hidden_state


class Frozen(Loaded):
    name = "bertfast frozen"
    precisions = ("fp32", "bf16", "int8")

    @classmethod
    def available(cls):
        return None if extension.C else f"no C++ extension: {extension.error}"

    def __init__(self, folder, precision, threads):
        super().__init__(folder, precision, threads)
        bertfast.freeze(self.model, precision)
