"""Sizes of BERT: the two of the paper (Devlin et al., arXiv:1810.04805) and three smaller ones
(Turc et al., arXiv:1908.08962)."""

from pathlib import Path
from typing import Any

from transformers import BertConfig

from .config import CONFIG, read

PRESETS = {  # layers, hidden size, attention heads
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}


def bert_config(name_or_file: str, **overrides: Any) -> BertConfig:
    """The configuration of a preset, or of a config.json (or its folder), with `overrides`.

    Raises: ValueError for what is neither.
    """
    if name_or_file in PRESETS:
        layers, hidden, heads = PRESETS[name_or_file]
        return BertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            **overrides,
        )
    path = Path(name_or_file)
    path = path / CONFIG if path.is_dir() else path
    if not path.exists():
        raise ValueError(
            f"config is {name_or_file!r}, expected {', '.join(PRESETS)} or a config.json"
        )
    return read(path, **overrides)
