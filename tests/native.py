"""Small native models beside transformers' on the same weights, and batches for them."""

import torch
import transformers

import bertfast


def config(**options):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 100, "vocab_size": 200, "max_position_embeddings": 40}
    return transformers.BertConfig(**(sizes | {"initializer_range": 0.3} | options))


def pair(options=None, name="BertModel", **kwargs):
    """transformers' model and ours with the same random weights."""
    torch.manual_seed(0)
    c = config(**(options or {}))
    theirs = getattr(transformers, name)(c, **kwargs).eval()
    with torch.no_grad():  # biases and LayerNorms that matter
        for p in theirs.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
    ours = getattr(bertfast, name)(c, **kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def load(folder, name="BertModel", **options):
    return getattr(bertfast, name).from_pretrained(folder, **options)


def batch(lengths=(37, 3, 20, 1, 40), vocabulary=200):
    g = torch.Generator().manual_seed(1)
    size = len(lengths), max(lengths)
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(5, vocabulary, size, generator=g),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, size, generator=g),
    }
