"""Inference on a GPU: for a few tokens, all layers by one call into C++."""

import torch

from ..ops import registry
from ..ops.cuda.arguments import MAX_HIDDEN, dtype_code
from ..ops.cuda.attention import HEAD_DIMS
from ..ops.cuda.linear_act import FEW_TOKENS
from ..ops.extension import C
from ..ops.library import cuda_queue, ptr
from ..ops.linear_act import ACTIVATIONS as OPERATOR_ACTIVATIONS
from .frozen import Frozen
from .layer import ACTIVATIONS

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenCudaEncoder(Frozen):
    """What `freeze` puts in a BertEncoder's place on a GPU: everything in bf16 or fp16.

    Up to FEW_TOKENS tokens, where launches would take longer than kernels, csrc/cuda/encoder.cu
    queues all layers without returning to Python, and each kernel starts before the one ahead of it
    has ended (sm_90). More tokens, or another backend forced, take the operators one by one.
    """

    def __init__(self, encoder, config, precision: str):
        super().__init__(encoder, config, precision)
        self.few = PRECISIONS[precision]
        self.device = next(encoder.parameters()).device
        heads, hidden, inner = (
            config.num_attention_heads,
            config.hidden_size,
            config.intermediate_size,
        )
        activation = OPERATOR_ACTIVATIONS.index(ACTIVATIONS[config.hidden_act])
        self._sizes = heads, hidden, inner
        self._options = activation, config.layer_norm_eps
        # In a tuple, so that they are nobody's parameters: their pointers must stay.
        self._layers = tuple(layer.to(self.few).eval() for layer in encoder.layer)
        self._keep = [[p.detach().contiguous() for p in m.weights()] for m in self._layers]
        self._pointers = torch.tensor([[p.data_ptr() for p in row] for row in self._keep])
        self.whole = all(p.data_ptr() % 16 == 0 for row in self._keep for p in row)
        self.whole &= hidden // heads in HEAD_DIMS and hidden % 8 == 0 and inner % 8 == 0
        self.whole &= hidden <= MAX_HIDDEN

    def _run(self, first, last, hidden, packing, rows):
        if hidden.device != self.device:
            raise RuntimeError(
                f"the input is on {hidden.device}, a frozen encoder stays on {self.device}: move "
                "the model before bertfast.freeze"
            )
        hidden = hidden.to(self.few).contiguous()
        few = self.whole and len(hidden) <= FEW_TOKENS and hidden.data_ptr() % 16 == 0
        if not few or registry.forced() not in (None, "cuda"):
            for i in range(first, last):
                wanted = rows if i == self.layers - 1 else None
                hidden, _ = self._layers[i](
                    hidden, packing.cu_seqlens, packing.seqlen, (None,) * 3, wanted
                )
            return hidden.to(self.dtype)
        offsets, tokens = packing.cu_seqlens.contiguous(), len(hidden)
        rows = None if rows is None else rows.contiguous()
        count = tokens if rows is None else len(rows)
        out = torch.empty((count, self.hidden), dtype=self.few, device=hidden.device)
        size = C.cuda_encoder_workspace(tokens, count, *self._sizes)
        workspace = torch.empty(size, dtype=torch.uint8, device=hidden.device)
        C.cuda_encoder(
            *(dtype_code(hidden), ptr(self._pointers[first:]), last - first, *self._sizes),
            *(*self._options, ptr(hidden), ptr(offsets), len(offsets) - 1, tokens),
            *(packing.seqlen, ptr(rows), count, ptr(out), ptr(workspace), *cuda_queue(hidden)),
        )
        return out.to(self.dtype)
