"""transformers' own BERT: eager and SDPA attention, and torch.compile."""

import torch
import transformers

from .base import Rival


class Sdpa(Rival):
    name = "transformers sdpa"
    precisions = ("fp32", "bf16")
    attention = "sdpa"

    def __init__(self, folder, precision, threads):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = transformers.BertModel.from_pretrained(
            folder, attn_implementation=self.attention, dtype=dtype
        ).eval()

    def __call__(self, batch):
        return self.model(**batch).last_hidden_state


class Eager(Sdpa):
    name = "transformers eager"
    attention = "eager"


class Compiled(Sdpa):
    name = "transformers compiled"

    def __init__(self, folder, precision, threads):
        super().__init__(folder, precision, threads)
        self.model = torch.compile(self.model)
