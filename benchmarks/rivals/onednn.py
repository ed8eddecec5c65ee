"""A packed BERT encoder on the oneDNN linears that torch exposes: the rival without our kernels.

Sequences are concatenated without padding, weights are reordered once, Q, K and V are one product
and GELU is the product's post-op; attention runs torch's kernel one sequence at a time.
"""

import torch
import torch.nn.functional as F

from bertfast.bench.rivals import Rival, Sdpa


class Linear:
    def __init__(self, weight, bias, tokens):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), tokens)
        self.bias = bias.detach()

    def __call__(self, x, activation="none"):
        algorithm = "none" if activation == "gelu" else ""
        return torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, activation, [], algorithm
        )


class Encoder:
    """Inference of a transformers `BertModel` with exact GELU, in its dtype."""

    def __init__(self, model, tokens: int):
        if model.config.hidden_act != "gelu":
            raise ValueError(f"hidden_act is {model.config.hidden_act!r}, expected 'gelu'")
        self.embeddings = model.embeddings
        self.heads, self.layers = model.config.num_attention_heads, []
        for layer in model.encoder.layer:
            attention = layer.attention.self
            three = (attention.query, attention.key, attention.value)
            self.layers.append(
                (
                    Linear(
                        torch.cat([m.weight for m in three]),
                        torch.cat([m.bias for m in three]),
                        tokens,
                    ),
                    Linear(
                        layer.attention.output.dense.weight,
                        layer.attention.output.dense.bias,
                        tokens,
                    ),
                    layer.attention.output.LayerNorm,
                    Linear(layer.intermediate.dense.weight, layer.intermediate.dense.bias, tokens),
                    Linear(layer.output.dense.weight, layer.output.dense.bias, tokens),
                    layer.output.LayerNorm,
                )
            )

    @torch.inference_mode()
    def __call__(self, input_ids, attention_mask):
        """ids and 0/1 mask [batch, seqlen], right-padded -> [batch, seqlen, hidden]"""
        real = attention_mask.bool()
        lengths = attention_mask.sum(1).tolist()
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)[real]
        x = self.embeddings(input_ids[real][None], position_ids=positions[None])[0]
        for qkv_linear, out_linear, first_norm, up, down, second_norm in self.layers:
            qkv = qkv_linear(x).view(len(x), 3, self.heads, -1)
            context = [
                F.scaled_dot_product_attention(*s.permute(1, 2, 0, 3)[:, None].unbind(0))[
                    0
                ].transpose(0, 1)
                for s in qkv.split(lengths)
            ]
            x = first_norm(x + out_linear(torch.cat(context).flatten(1)))
            x = second_norm(x + down(up(x, "gelu")))
        out = x.new_zeros(*input_ids.shape, x.shape[-1])
        out[real] = x
        return out


class OneDnn(Rival):
    name = "oneDNN packed"
    precisions = ("fp32", "bf16")
    encoder, tokens = None, 0

    def __init__(self, folder, precision, threads):
        self.model = Sdpa(folder, precision, threads).model

    def __call__(self, batch):
        tokens = int(batch["attention_mask"].sum())
        if not tokens / 4 < self.tokens < tokens * 4:  # the weights' order depends on it a bit
            self.encoder, self.tokens = Encoder(self.model, tokens), tokens
        return self.encoder(**batch)
