"""Inference on a GPU: for a few tokens, all layers by one call into C++."""

import torch

from . import few_tokens
from .frozen import Frozen

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenCudaEncoder(Frozen):
    """What `freeze` puts in a BertEncoder's place on a GPU: everything in bf16 or fp16.

    A few tokens take one call, see few_tokens.py. More tokens, or another backend forced, take the
    layers one by one.
    """

    def __init__(self, encoder, config, precision: str):
        super().__init__(encoder, config, precision)
        self.low = PRECISIONS[precision]
        self.device = next(encoder.parameters()).device
        self._sizes = few_tokens.sizes(config)
        # In a tuple, so that they are nobody's parameters: their addresses must stay.
        self._layers = tuple(layer.to(self.low).eval() for layer in encoder.layer)
        self._keep = [layer.arithmetic()[0] for layer in self._layers]
        self._keep = [type(w)(*(p.detach().contiguous() for p in w)) for w in self._keep]
        self._addresses = torch.tensor([[p.data_ptr() for p in w] for w in self._keep])
        self.whole = few_tokens.fits(self._keep, config.num_attention_heads)

    def _run(self, first, last, hidden, packing, rows):
        if hidden.device != self.device:
            raise RuntimeError(
                f"the input is on {hidden.device}, a frozen encoder stays on {self.device}: move "
                "the model before bertfast.freeze"
            )
        hidden = hidden.to(self.low)
        if self.whole and few_tokens.serves(hidden):
            addresses = self._addresses[first:].data_ptr()
            out = few_tokens.run(addresses, last - first, self._sizes, hidden, packing, rows)
            return out.to(self.dtype)
        for i in range(first, last):
            wanted = rows if i == self.layers - 1 else None
            hidden = self._layers[i](
                hidden, packing.cu_seqlens, packing.seqlen, (None,) * 3, wanted
            )
        return hidden.to(self.dtype)
