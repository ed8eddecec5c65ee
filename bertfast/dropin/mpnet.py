"""MPNet: one relative position bias shared by all layers."""

from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet as theirs

from . import readers
from .fused import FusedEncoder, FusedLayer, Parts, rate


class MPNetLayer(FusedLayer, theirs.MPNetLayer):
    stock = theirs.MPNetLayer
    in_tuple = True

    def parts(self) -> Parts:
        own = self._modules
        attention, up, down = own["attention"], own["intermediate"], own["output"]
        around, last = attention._modules, down._modules
        inner = around["attn"]._modules
        return Parts(
            (
                *(inner["q"], inner["k"], inner["v"], inner["o"], around["LayerNorm"]),
                *(up._modules["dense"], last["dense"], last["LayerNorm"]),
            ),
            activation=up.intermediate_act_fn,
            head_dim=around["attn"].attention_head_size,
            attention_dropout=rate(inner["dropout"]),
            projection_dropout=rate(around["dropout"]),
            output_dropout=rate(last["dropout"]),
            inside=(
                (attention, theirs.MPNetAttention),
                (around["attn"], theirs.MPNetSelfAttention),
                (up, theirs.MPNetIntermediate),
                (down, theirs.MPNetOutput),
                (inner["dropout"], nn.Dropout),
                (around["dropout"], nn.Dropout),
                (last["dropout"], nn.Dropout),
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

    def padding_limit(self, keys):
        # Padded rows come last, at the positions that they have.
        if bool((keys[:, 1:] != 0).logical_and(keys[:, :-1] == 0).any()):
            return "padded rows are read and are not on the right"
        return None

    def output(self, hidden, states, kwargs):
        all_states = tuple(states) if kwargs.get("output_hidden_states") else None
        if not kwargs.get("return_dict"):
            return (hidden,) if all_states is None else (hidden, all_states)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=all_states)


CLASSES = {c.stock: c for c in (MPNetLayer, MPNetEncoder)}
readers.register(
    theirs.MPNetModel,
    first={
        theirs.MPNetForSequenceClassification: ("classifier", theirs.MPNetClassificationHead),
        theirs.MPNetForMultipleChoice: ("mpnet.pooler", theirs.MPNetPooler),
    },
    tokens=(theirs.MPNetForMaskedLM, theirs.MPNetForTokenClassification),
)
