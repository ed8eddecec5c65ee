"""Small encoders and decoders beside transformers' on the same weights, and batches for them."""

import copy

import torch
import transformers
from native import config

import bertfast
from bertfast.model.translation_checkpoint import make_config

START, END = 2, 3


def ours(layers=3, tie=True, head=True, **options):
    """With random biases and norms; head: whether the output is tied to the embeddings."""
    torch.manual_seed(options.pop("seed", 0))
    given = make_config(
        config(**options),
        decoder_start_token_id=START,
        eos_token_id=END,
        decoder_layers=layers,
        tie_embeddings=tie,
    )
    given.decoder.tie_word_embeddings = head
    model = bertfast.BertEncoderDecoder(given).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
    return model


def theirs(model):
    """transformers' with the weights of ours, not tied to each other."""
    given = copy.deepcopy(model.config)
    found = transformers.EncoderDecoderModel(given).eval()
    found.load_state_dict(model.state_dict())
    return found


def pair(**options):
    model = ours(**options)
    return theirs(model), model


def batch(sources=(30, 3, 17, 1), targets=(9, 20, 1, 12), vocabulary=200, seed=1):
    """Padded: input_ids, attention_mask and labels."""
    g = torch.Generator().manual_seed(seed)

    def ids(lengths):
        lengths = torch.tensor(lengths)
        shape = len(lengths), int(lengths.max())
        found = torch.randint(5, vocabulary, shape, generator=g)
        return found, torch.arange(shape[1]) < lengths[:, None]

    (source, mask), (labels, real) = ids(sources), ids(targets)
    source, labels = source.masked_fill(~mask, 0), labels.masked_fill(~real, -100)
    return {"input_ids": source, "attention_mask": mask.long(), "labels": labels}


def packed(given):
    """The arguments of `loss_packed`."""
    mask, labels = given["attention_mask"] == 1, given["labels"]
    real = labels != -100
    inputs = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=START)

    def side(ids, mask):
        lengths = mask.sum(1)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return ids[mask], starts, int(lengths.max())

    return *side(given["input_ids"], mask), *side(inputs, real), labels[real]
