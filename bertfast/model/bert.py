"""`BertModel`: transformers' interface and state-dict keys over the packed encoder."""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import BertConfig
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from .. import ops
from ..encoder import watch
from ..encoder.batch import PackedSequences, Packing, check_mask, lowered
from ..encoder.executors.whole_cpu import texts_fit
from ..encoder.packed_cpu import PackedCpu
from ..encoder.run import texts
from ..encoder.spec import DROPOUTS
from ..families.family import rate
from ..files import StrPath
from ..ops.declare import LENGTH, Below, Declaration, Offsets, Tensor
from ..ops.library import unwatched
from . import checkpoint
from .asked import default, finish, refuse
from .config import check
from .encoder import (
    BertEmbeddings,
    BertEncoder,
    BertPooler,
    attention_probabilities,
    looked_into,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class BertPreTrainedModel(nn.Module):
    """What all BERT models share: configuration, initialisation, checkpoints.

    A plain nn.Module: transformers' PreTrainedModel would bring its attention switch, generation
    and loading machinery, none of which reaches the packed path.
    """

    config_class = BertConfig
    base_model_prefix = "bert"
    tied: dict[str, str] = {}  # parameter name -> the name it shares  # noqa: RUF012

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        check(config)
        self.config = config

    def post_init(self) -> None:
        """BERT's initialisation: normal weights, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
                if getattr(module, "padding_idx", None) is not None:
                    with torch.no_grad():
                        module.weight[module.padding_idx].zero_()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recompute each layer in backward instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, BertEncoder):
                module.gradient_checkpointing = enabled

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Without this, peft puts a hook on the embeddings in any case."""
        return any(m.gradient_checkpointing for m in self.modules() if isinstance(m, BertEncoder))

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing_enable(False)

    @property
    def base_model(self) -> nn.Module:
        """The encoder of a model with a head; of one without, itself."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.word_embeddings

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: StrPath,
        *,
        allow_pickle: bool = False,
        dtype: torch.dtype | None = None,
        **config: Any,
    ) -> "Self":
        """A model from a local folder or a hub name, in eval mode.

        Weights may come with or without the "bert." prefix; a checkpoint of another task gives its
        encoder, and a warning names the weights that are new. Other keyword arguments override
        the configuration (num_labels, id2label, ...).

        Raises: checkpoint.CheckpointError for a missing, damaged or ill-fitting checkpoint, and
        for a pickled one unless `allow_pickle`.
        """
        return checkpoint.load(cls, name_or_folder, allow_pickle, dtype, config)

    def save_pretrained(self, folder: StrPath) -> None:
        """config.json and model.safetensors, each written whole or not at all, as transformers
        reads them. The configuration says what the modules are now, where those were changed.

        Raises: ValueError for a model that no configuration describes, or a frozen one.
        """
        checkpoint.save(self, folder)


class PackedInputs(NamedTuple):
    """A packed batch: a model takes it in place of input_ids, alone."""

    packing: Packing
    ids: torch.Tensor | None  # int64 [tokens], as positions and types
    positions: torch.Tensor
    types: torch.Tensor
    embeds: torch.Tensor | None = None  # [tokens, hidden] in place of ids


# The states of all layers and their attention maps, where they were asked for.
Encoded: TypeAlias = tuple[
    Packing, torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None
]

_PACKED = Declaration(
    "encode_packed(Tensor input_ids, Tensor cu_seqlens, SymInt max_seqlen, Tensor? position_ids, "
    "Tensor? token_type_ids, Tensor? rows) -> Tensor",
    input_ids=Tensor("tokens", torch.int64),
    cu_seqlens=Tensor("batch + 1", torch.int32, Offsets("tokens", "max_seqlen")),
    max_seqlen=LENGTH,
    position_ids=Tensor("tokens", torch.int64),
    token_type_ids=Tensor("tokens", torch.int64),
    rows=Tensor("n", torch.int64, Below("tokens")),
)


class BertModel(BertPreTrainedModel):
    """The encoder, as transformers' BertModel; padded positions of its outputs are zeros."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    @watch.outside_graphs
    def forward(
        self,
        input_ids: "torch.Tensor | PackedInputs | None" = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """
        Args:
            input_ids: int64 [batch, seqlen]; or inputs_embeds [batch, seqlen, hidden].
            attention_mask: [batch, seqlen], 0 at padding, in any pattern; None for no padding.
            token_type_ids, position_ids: int64 [batch or 1, seqlen]; zeros, and 0 to seqlen - 1.

        Returns: last_hidden_state [batch, seqlen, hidden], pooler_output [batch, hidden] (from
        column 0, which counts as zeros where it is padding), and on request hidden_states and
        attentions (the probabilities before dropout), zeros at padding.

        Raises: ValueError for arguments that don't fit, IndexError for ids out of range.
        """
        refuse(unused)
        output_attentions = default(output_attentions, self.config, "output_attentions")
        output_hidden_states = default(output_hidden_states, self.config, "output_hidden_states")
        last = states = attentions = None
        if (
            type(self).encode is BertModel.encode
            and type(input_ids) is torch.Tensor
            and input_ids.shape[-1] <= self._longest()
            and position_ids is None
            and inputs_embeds is None
            and not (output_attentions or output_hidden_states)
        ):
            last = self._texts(input_ids, attention_mask, token_type_ids)
        if last is not None:
            first = last[:, 0].contiguous()
        else:
            packing, hidden, states, attentions = self.encode(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
                output_attentions,
                output_hidden_states,
            )
            first, last = packing.first(hidden), packing.unpack(hidden)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self.pooler(first),
            hidden_states=states,
            attentions=attentions,
        )
        return finish(output, return_dict, self.config)

    def _texts(self, ids, mask, types):
        """Inference's states by one call, or None; see `whole_cpu.texts`."""
        tables = self.embeddings.tables() if type(self.embeddings) is BertEmbeddings else None
        modules = self.encoder, self.embeddings
        if tables is None or watch.global_hooks() or self.training:
            return None
        if watch.limit(modules, (BertEncoder, BertEmbeddings)) or rate(self.embeddings.dropout):
            return None
        if self.encoder.training or not texts_fit(tables, ids, mask, types):
            return None
        packed, given = self.encoder.packed, (self.embeddings.LayerNorm.eps, ids, mask, types)
        if packed is None:
            return texts(self.encoder.describe(), tables, *given)
        return packed.texts(tables, *given) if isinstance(packed, PackedCpu) else None

    @watch.outside_graphs
    def encode(
        self,
        input_ids: "torch.Tensor | PackedInputs | None" = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        first_only: bool = False,
    ) -> Encoded:
        """forward, but packed: (packing, hidden [tokens, hidden], hidden_states, attentions).

        first_only: hidden is column 0 alone [batch, hidden], zeros where that is padding; the last
        layer does no work for the other tokens unless their states are asked for.
        """
        if not isinstance(input_ids, PackedInputs):
            input_ids = self._inputs(
                input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
            )
        packing, ids, positions, types, embeds = input_ids
        seeds = self._seeds(positions.device)
        hidden = lowered(self.embeddings(ids, positions, types, seeds[0], embeds))
        states = [packing.unpack(hidden)] if output_hidden_states else None
        attentions = [] if output_attentions else None

        def collect(hidden, qkv):
            if output_hidden_states:
                states.append(packing.unpack(hidden))
            if output_attentions:
                attentions.append(attention_probabilities(qkv, packing))

        if output_attentions and getattr(self.encoder, "packed", None) is not None:
            raise ValueError("a frozen model has no attention maps; ask before bertfast.freeze")
        wanted = collect if output_hidden_states or output_attentions else None
        rows = None
        if first_only and wanted is None and (torch.compiler.is_compiling() or hidden.shape[0]):
            rows = packing.first_rows(hidden.shape[0])
        hidden = self._encoded(hidden, packing, seeds[1:], rows, wanted, bool(output_attentions))
        if first_only:
            hidden = packing.first(hidden) if rows is None else packing.zero_padded(hidden)
        return packing, hidden, states and tuple(states), attentions and tuple(attentions)

    @watch.outside_graphs
    def encode_packed(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode sequences that are already packed, without padding or unpacking.

        Args:
            input_ids: int64 [tokens], the sequences one after another.
            cu_seqlens: int32 [sequences + 1], where each starts, and the total.
            max_seqlen: the longest, or a bound above it.
            position_ids, token_type_ids: int64 [tokens]; each sequence's own 0, 1, ..., and zeros.
            rows: int64 [n], the tokens whose state is wanted; None for all. The last layer does no
                work for others but their attention's keys and values.

        Returns: [tokens or n, hidden].
        """
        if isinstance(max_seqlen, torch.Tensor | np.integer):
            max_seqlen = int(max_seqlen)
        limit = self._longest()
        if max_seqlen > limit and position_ids is None:
            raise ValueError(f"max_seqlen is {max_seqlen}, the model takes up to {limit} tokens")
        _PACKED.check(
            (input_ids, cu_seqlens, max_seqlen, position_ids, token_type_ids, rows),
            values=unwatched(),
        )
        if position_ids is None:
            starts = torch.repeat_interleave(
                cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=input_ids.shape[0]
            )
            position_ids = torch.arange(input_ids.shape[0], device=input_ids.device) - starts
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        seeds = self._seeds(input_ids.device)
        hidden = self.embeddings(input_ids, position_ids, token_type_ids, seeds[0])
        packing = PackedSequences(cu_seqlens, max_seqlen)
        return self._encoded(lowered(hidden), packing, seeds[1:], rows)

    def _encoded(self, hidden, packing, seeds, rows, collect=None, keep_qkv=False):
        """`rows` of the encoder's result, None for all. Whoever looks into it sees all tokens, with
        the dropout that the rows draw by themselves."""
        if rows is None or not looked_into(self.encoder):
            return self.encoder(hidden, packing, seeds, collect, rows, keep_qkv)
        own = torch.arange(len(rows) + len(hidden), device=hidden.device)
        number = own[len(rows) :].index_copy(0, rows, own[: len(rows)])
        return self.encoder(hidden, packing, seeds, collect, None, keep_qkv, number)[rows]

    def _seeds(self, device):
        """One of each dropout in training: int64 [1 + DROPOUTS * layers, 2]."""
        n = 1 + DROPOUTS * len(getattr(self.encoder, "layer", ()))
        return ops.draw_seeds(n, device) if self.training else [None] * n

    def _longest(self) -> int:
        """Tokens that there are positions for."""
        table = self.embeddings.position_embeddings
        return getattr(table, "num_embeddings", self.config.max_position_embeddings)

    def _sizes(self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds):
        """(batch, seqlen) of inputs that fit together; ValueError for others."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if given.dim() != (2 if inputs_embeds is None else 3):
            raise ValueError(
                f"the input has shape {list(given.shape)}, expected input_ids [batch, seqlen] or "
                "inputs_embeds [batch, seqlen, hidden]"
            )
        batch, seqlen = given.shape[:2]
        limit = self._longest()
        if position_ids is None and seqlen > limit:
            raise ValueError(
                f"the input has {seqlen} tokens, the model takes up to {limit}: truncate it "
                "(the tokenizer's max_length) or give position_ids"
            )
        check_mask(attention_mask, batch, seqlen)
        for name, ids in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
            if ids is not None and (
                ids.dim() != 2 or ids.shape[1] != seqlen or ids.shape[0] not in (1, batch)
            ):
                raise ValueError(
                    f"{name} has shape {list(ids.shape)}, expected [{batch}, {seqlen}]"
                )
        return batch, seqlen

    def _inputs(
        self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
    ) -> PackedInputs:
        batch, seqlen = self._sizes(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        device = (input_ids if inputs_embeds is None else inputs_embeds).device
        packing = Packing(batch, seqlen, attention_mask, device)

        def packed(ids, name):
            if ids.device != device:
                raise ValueError(f"{name} is on {ids.device}, expected {device} as the input")
            return packing.pack(ids.expand(batch, seqlen).long())

        if position_ids is None:
            positions = packing.columns()
        else:
            positions = packed(position_ids, "position_ids")
        if token_type_ids is None:
            types = torch.zeros_like(positions)
        else:
            types = packed(token_type_ids, "token_type_ids")
        ids = None if input_ids is None else packed(input_ids, "input_ids")
        embeds = None if inputs_embeds is None else packing.pack(inputs_embeds)
        return PackedInputs(packing, ids, positions, types, embeds)
