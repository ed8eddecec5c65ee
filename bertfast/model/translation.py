"""A BERT encoder and a BERT decoder with cross-attention, as in Rothe et al., arXiv:1907.12461:
transformers' `EncoderDecoderModel` of the two, packed on both sides in training, with a cache in
decoding.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import EncoderDecoderConfig
from transformers.modeling_outputs import Seq2SeqLMOutput

from ..encoder.batch import Packing, check_mask
from ..files import StrPath
from . import decoding, translation_checkpoint
from .asked import finish
from .bert import BertModel, BertPreTrainedModel
from .decoder import IGNORED, BertDecoder, BertLMHeadModel, Sequences, summed_loss
from .encoder import BertEncoder
from .steps_cpu import steps_of

if TYPE_CHECKING:
    from typing_extensions import Self


class BertEncoderDecoder(BertPreTrainedModel):
    """config: an `EncoderDecoderConfig` of two BERTs; with its `tie_embeddings` (ours, which
    transformers ignores) encoder and decoder share the tables of their embeddings."""

    config_class = EncoderDecoderConfig
    base_model_prefix = "encoder"

    def __init__(self, config: EncoderDecoderConfig) -> None:
        nn.Module.__init__(self)
        translation_checkpoint.check(config)
        self.config = config
        self.encoder = BertModel(config.encoder)
        self.decoder = BertLMHeadModel(config.decoder)
        sizes = config.encoder.hidden_size, config.decoder.hidden_size
        if sizes[0] != sizes[1]:  # under transformers' name
            self.enc_to_dec_proj = nn.Linear(*sizes)
            nn.init.normal_(self.enc_to_dec_proj.weight, std=config.encoder.initializer_range)
            nn.init.zeros_(self.enc_to_dec_proj.bias)
        self.tie_weights()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: StrPath,
        *,
        allow_pickle: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "Self":
        """A model from a local folder or a hub name, in eval mode: one of `save_pretrained`, or of
        transformers' `EncoderDecoderModel`.

        Raises: CheckpointError for a missing, damaged or ill-fitting checkpoint, and for a pickled
        one unless `allow_pickle`.
        """
        return translation_checkpoint.load(cls, name_or_folder, allow_pickle, dtype)

    @classmethod
    def from_encoder(
        cls,
        name_or_folder: StrPath,
        *,
        decoder_start_token_id: int,
        eos_token_id: int,
        decoder_layers: int | None = None,
        fresh: bool = False,
        tie_embeddings: bool = True,
        allow_pickle: bool = False,
    ) -> "Self":
        """A model to be trained, of a BERT checkpoint; in eval mode.

        Args:
            decoder_start_token_id, eos_token_id: what a target begins and ends with, [CLS] and
                [SEP] say.
            decoder_layers: the encoder's number where it is None; fewer are taken spread evenly.
            fresh: a decoder with new weights. Otherwise it starts from the checkpoint's, its head's
                included where that has one; the cross-attention is new in any case.
            tie_embeddings: whether encoder and decoder share their embeddings' tables, which the
                decoder then has from the checkpoint.

        Raises: CheckpointError as `BertModel.from_pretrained`; ValueError for a token or a number
        of layers that isn't there.
        """
        return translation_checkpoint.from_encoder(
            *(cls, name_or_folder, decoder_start_token_id, eos_token_id),
            *(decoder_layers, fresh, tie_embeddings, allow_pickle),
        )

    def save_pretrained(self, folder: StrPath) -> None:
        """config.json, generation_config.json and model.safetensors, each written whole or not at
        all, as `transformers.EncoderDecoderModel` reads them.

        Raises: ValueError for a model that no configuration describes.
        """
        translation_checkpoint.save(self, folder)

    def tie_weights(self) -> None:
        if getattr(self.config, "tie_embeddings", False):
            theirs, own = self.encoder.embeddings, self.decoder.bert.embeddings
            for name in translation_checkpoint.TABLES:
                getattr(own, name).weight = getattr(theirs, name).weight
        self.decoder.tie_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder.cls.predictions.decoder

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recompute each layer in backward instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, BertEncoder | BertDecoder):
                module.gradient_checkpointing = enabled

    def _states(self, hidden):
        return self.enc_to_dec_proj(hidden) if "enc_to_dec_proj" in self._modules else hidden

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """
        Args:
            input_ids: int64 [batch, seqlen], the sources.
            attention_mask: [batch, seqlen], 0 at padding, in any pattern; None for no padding.
            decoder_input_ids: int64 [batch, length], the targets so far; None for the labels moved
                right, the start before them, with padding where there is none.
            decoder_attention_mask: [batch, length]; None for no padding, and for moved labels where
                these are padding.
            labels: int64 [batch, length], -100 where nothing is to predict.
            token_type_ids: int64 [batch, seqlen] of the sources; zeros.

        Returns: a `Seq2SeqLMOutput`: loss, the mean over the labels; logits [batch, length,
        vocabulary] and encoder_last_hidden_state [batch, seqlen, hidden], both zeros at padding.

        Raises: ValueError for arguments that don't fit, and for a label behind a token of padding;
        IndexError for ids out of range.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids or labels")
            decoder_input_ids = self.shifted(labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = decoder_input_ids != self.config.pad_token_id
        packing, hidden, *_ = self.encoder.encode(input_ids, attention_mask, token_type_ids)
        hidden = self._states(hidden)
        shape, device = decoder_input_ids.shape, decoder_input_ids.device
        if len(shape) != 2 or shape[0] != packing.batch:
            raise ValueError(
                f"decoder_input_ids has shape {list(shape)}, expected [{packing.batch}, length]"
            )
        self._check_length(shape[1])
        check_mask(decoder_attention_mask, *shape)
        decoded = Packing(*shape, decoder_attention_mask, device)
        targets = Sequences(
            decoded.pack(decoder_input_ids.long()), decoded.cu_seqlens, decoded.seqlen
        )
        sources = Sequences(hidden, packing.cu_seqlens, packing.seqlen)
        states = self.decoder.bert(targets, sources, decoded.columns())
        scores = self.decoder.cls(states)
        output = Seq2SeqLMOutput(
            loss=None if labels is None else self._padded_loss(scores, labels, decoded),
            logits=decoded.unpack(scores),
            encoder_last_hidden_state=packing.unpack(hidden),
        )
        return finish(output, return_dict, self.config)

    def shifted(self, labels: torch.Tensor) -> torch.Tensor:
        """int64 [batch, length] -> the decoder's inputs that go with such labels."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                f"decoder_start_token_id is {start} and pad_token_id {pad} in the configuration, "
                "expected a token's number each"
            )
        moved = F.pad(labels[:, :-1], (1, 0), value=start)
        return moved.masked_fill(moved == IGNORED, pad)

    def _padded_loss(self, scores, labels, packing):
        if labels.shape != (packing.batch, packing.seqlen):
            raise ValueError(
                f"labels has shape {list(labels.shape)}, expected "
                f"[{packing.batch}, {packing.seqlen}]"
            )
        given = labels != IGNORED
        if packing.mask is not None and bool((given & (packing.mask == 0)).any()):
            raise ValueError(
                "a label stands where the decoder's input is padding: give -100 there, and "
                "behind a sequence's end (not the tokenizer's padding)"
            )
        return F.cross_entropy(scores.float(), packing.pack(labels))

    def loss_packed(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        decoder_input_ids: torch.Tensor,
        decoder_cu_seqlens: torch.Tensor,
        decoder_max_seqlen: int,
        labels: torch.Tensor,
        label_smoothing: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of sequences that are packed on both sides: no padding is computed.

        Args:
            input_ids: int64 [tokens], the sources one after another.
            cu_seqlens: int32 [sequences + 1], where each starts, and the total.
            max_seqlen: the longest, or a bound above it.
            decoder_*: the same of the targets, each beginning with decoder_start_token_id.
            labels: int64 [target tokens], the token behind each; -100 where none is to predict.
            label_smoothing: the share e of the target that goes to all words alike (Szegedy et
                al., arXiv:1512.00567): -(1 - e) log p[label] - e mean(log p).

        Returns: the sum over the labels, fp32, and how many there are, int64: both scalars on the
        device. The mean is what transformers' Trainer makes with this label_smoothing_factor.
        """
        self._check_length(decoder_max_seqlen)
        hidden = self._states(self.encoder.encode_packed(input_ids, cu_seqlens, max_seqlen))
        sources = Sequences(hidden, cu_seqlens, max_seqlen)
        targets = Sequences(decoder_input_ids, decoder_cu_seqlens, decoder_max_seqlen)
        states = self.decoder.bert(targets, sources)
        return summed_loss(self.decoder.cls.predictions, states, labels, label_smoothing)

    def _check_length(self, length):
        limit = self.config.decoder.max_position_embeddings
        if length > limit:
            raise ValueError(f"a target has {length} tokens, the model takes up to {limit}")

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """The sequences of `decode`, int64 [batch, 1 + longest]."""
        return self.decode(input_ids, attention_mask, **options).sequences

    @torch.inference_mode()
    def decode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        eos_token_id: int | list[int] | None = None,
        scores: bool = False,
    ) -> decoding.Generated:
        """What `generate` of transformers makes with these arguments: greedy with one beam, beam
        search with more.

        Args:
            input_ids, attention_mask: as `forward`'s.
            max_new_tokens: tokens to make at most, the end included.
            eos_token_id: what ends a sequence; the configuration's where it is None.
            scores: whether greedy search returns them, which takes time.

        Raises: ValueError for arguments that don't fit, and for a model in training mode.
        """
        rules = self._rules(max_new_tokens, min_new_tokens, eos_token_id)
        if num_beams < 1 or early_stopping not in (True, False, "never"):
            raise ValueError(
                f"num_beams is {num_beams} and early_stopping {early_stopping!r}, expected 1 or "
                "more and True, False or 'never'"
            )
        if self.training:
            raise ValueError("the model is in training mode, which drops at random: call eval()")
        packing, hidden, *_ = self.encoder.encode(input_ids, attention_mask)
        sources = Sequences(self._states(hidden), packing.cu_seqlens, packing.seqlen)
        steps = steps_of(self.decoder, sources, num_beams, max_new_tokens)
        if num_beams == 1:
            return decoding.greedy(steps, rules, scores, length_penalty)
        search = decoding.Search(num_beams, length_penalty, early_stopping)
        return decoding.beam(steps, rules, search)

    def _rules(self, most, least, ends) -> decoding.Rules:
        ends = self.config.eos_token_id if ends is None else ends
        ends = () if ends is None else tuple([ends] if isinstance(ends, int) else ends)
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        words, limit = self.config.decoder.vocab_size, self.config.decoder.max_position_embeddings
        for name, i in (
            ("decoder_start_token_id", start),
            ("pad_token_id", pad),
            *[("eos_token_id", i) for i in ends],
        ):
            if type(i) is not int or not 0 <= i < words:
                raise ValueError(f"{name} is {i!r}, expected a token from 0 to {words - 1}")
        if not 1 <= most <= limit or not 0 <= least <= most:
            raise ValueError(
                f"max_new_tokens is {most} and min_new_tokens {least}, expected 1 to {limit}, the "
                "decoder's positions, and 0 to max_new_tokens"
            )
        return decoding.Rules(start, ends, pad, most, least)
