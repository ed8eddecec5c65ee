"""`ops.embedding_layer_norm` on csrc/cuda/embedding_layer_norm.cu."""

import torch

from ..dropout import dropout_arguments
from ..extension import C
from ..library import cuda_float_limit, cuda_queue, dense, ptr
from ..registry import register
from .arguments import dtype_code, hidden_limit, row_blocks


def _limit(device, dtype, arguments):
    return cuda_float_limit(device, dtype, arguments) or hidden_limit(arguments)


@register("embedding_layer_norm", "cuda", limit=_limit)
def _forward(word, ids, positions, types, position, token_type, weight, bias, eps, p, seed):
    word, ids, positions, types, position = map(dense, (word, ids, positions, types, position))
    token_type, weight, bias, seed = map(dense, (token_type, weight, bias, seed))
    tokens, hidden = ids.shape[0], word.shape[1]
    y = torch.empty((tokens, hidden), dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(tokens, device=word.device) for _ in range(2))
    C.cuda_embedding_layer_norm(
        *(dtype_code(word), ptr(ids), ptr(positions), ptr(types)),
        *(ptr(word), ptr(position), ptr(token_type), ptr(weight), ptr(bias)),
        *(
            *dropout_arguments(p, seed),
            eps,
            tokens,
            hidden,
            ptr(y),
            ptr(mean),
            ptr(rstd),
            *cuda_queue(word),
        ),
    )
    return y, mean, rstd


@register("embedding_layer_norm_backward", "cuda", limit=_limit)
def _backward(grad, ids, positions, types, word, position, token_type, weight, mean, rstd, p, seed):
    grad, ids, positions, types, word = map(dense, (grad, ids, positions, types, word))
    position, token_type, weight = map(dense, (position, token_type, weight))
    mean, rstd, seed = map(dense, (mean, rstd, seed))
    tokens, hidden = grad.shape
    blocks = row_blocks(tokens)
    ds = torch.empty((tokens, hidden), device=word.device)
    partial = torch.empty((blocks, 2, hidden), device=word.device)
    columns = torch.empty((2, hidden), device=word.device)
    C.cuda_embedding_layer_norm_backward(
        *(dtype_code(word), ptr(grad), ptr(ids), ptr(positions), ptr(types)),
        *(ptr(word), ptr(position), ptr(token_type), ptr(weight), *dropout_arguments(p, seed)),
        *(ptr(mean), ptr(rstd), tokens, hidden, ptr(ds), ptr(partial), blocks, ptr(columns)),
        *cuda_queue(word),
    )

    def scatter(table, rows):
        if table is None:
            return torch.empty(0, dtype=word.dtype, device=word.device)
        # torch's own sorts the ids: no float atomics, so its bits never change.
        total = torch.ops.aten.embedding_dense_backward(ds, rows, table.shape[0], -1, False)
        return total.to(table.dtype)

    return (
        scatter(word, ids),
        scatter(position, positions),
        scatter(token_type, types),
        *(c.to(weight.dtype, copy=True) for c in columns),
    )
