"""Sizes of BERT: the two of the paper (Devlin et al., arXiv:1810.04805) and three smaller ones
(Turc et al., arXiv:1908.08962)."""

import json
from pathlib import Path

from transformers import BertConfig

PRESETS = {  # layers, hidden size, attention heads
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}


def bert_config(name_or_file: str, **overrides) -> BertConfig:
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
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"config is {name_or_file!r}, expected {', '.join(PRESETS)} or a config.json"
        ) from None
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} can't be read as a configuration: {e}") from None
    if values.get("model_type", "bert") != "bert":
        raise ValueError(f"{path} is of model_type {values['model_type']!r}, expected 'bert'")
    return BertConfig(**(values | overrides))
