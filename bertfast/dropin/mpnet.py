"""MPNet: one relative position bias shared by all layers."""

from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet as theirs

from .fused import FusedEncoder, FusedLayer, Parts, rate


class MPNetLayer(FusedLayer, theirs.MPNetLayer):
    stock = theirs.MPNetLayer
    in_tuple = True

    def parts(self) -> Parts:
        attention, up, down = self.attention.attn, self.intermediate, self.output
        return Parts(
            *(attention.q, attention.k, attention.v, attention.o, self.attention.LayerNorm),
            *(up.dense, down.dense, down.LayerNorm),
            activation=up.intermediate_act_fn,
            head_dim=attention.attention_head_size,
            attention_dropout=rate(attention.dropout),
            projection_dropout=rate(self.attention.dropout),
            output_dropout=rate(down.dropout),
            inside=(
                (self.attention, theirs.MPNetAttention),
                (attention, theirs.MPNetSelfAttention),
                (up, theirs.MPNetIntermediate),
                (down, theirs.MPNetOutput),
                (attention.dropout, nn.Dropout),
                (self.attention.dropout, nn.Dropout),
                (down.dropout, nn.Dropout),
            ),
        )

    def bias(self, position_bias=None, *_):
        return position_bias


class MPNetEncoder(FusedEncoder, theirs.MPNetEncoder):
    stock = theirs.MPNetEncoder

    def layer_arguments(self, hidden_states):
        return (self.compute_position_bias(hidden_states[:1]),)

    def mask_limit(self, keys):
        # The kernel's positions are those among a sequence's real tokens.
        real = keys != 0
        starts = real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(1)
        return "the attention mask has holes" if bool((starts > 1).any()) else None

    def output(self, hidden, states, kwargs):
        all_states = tuple(states) if kwargs.get("output_hidden_states") else None
        if not kwargs.get("return_dict"):
            return (hidden,) if all_states is None else (hidden, all_states)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=all_states)


CLASSES = {c.stock: c for c in (MPNetLayer, MPNetEncoder)}
