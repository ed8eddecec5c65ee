"""What every model card says: what the run cost, and what it read."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_text
from .cost import sentence

if TYPE_CHECKING:
    from .config import PretrainConfig

FINETUNED, PRETRAINED = "fine-tuned with bertfast", "pre-trained with bertfast"
_SHOWN = 20  # inputs in a card; manifest.json has all


def ours(path: Path) -> bool:
    """Whether bertfast wrote a card."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return FINETUNED in text or PRETRAINED in text


def put(path: Path, text: str) -> None:
    """Raises FileExistsError where somebody's own is there."""
    if path.exists() and not ours(path):
        raise FileExistsError("one that bertfast did not write is there, and is kept")
    write_text(path, text)


def ending(cost: dict, inputs: list[dict]) -> str:
    """inputs: see `verify.entry`."""
    cells = ((one["role"], Path(one["path"]).name, f"`{one['sha256']}`") for one in inputs)
    rows = "\n".join(f"| {' | '.join(row)} |" for row in [*cells][:_SHOWN])
    more = f"\n{len(inputs) - _SHOWN} more are in `manifest.json`.\n" * (len(inputs) > _SHOWN)
    return f"""
## Cost
{sentence(cost)}

## Files
What the run read. `manifest.json` has this and the sums of all that it wrote; `bertfast verify`
compares them.

| input | file | SHA-256 |
| --- | --- | --- |
{rows}
{more}"""


def pretrained(path: Path, config: "PretrainConfig", results: dict, inputs: list[dict]) -> None:
    """The card of a pre-trained model."""
    score = results["valid"]
    figures = "\n".join(f"| {k} | {v:.4f} |" for k, v in score.items() if isinstance(v, float))
    table = f"\n| validation | |\n| --- | --- |\n{figures}\n" * bool(figures)
    start = f"`{Path(config.model).name}`" if config.model else "random weights"
    objective = "masked words and next sentences" if config.nsp else "masked words"
    put(
        path,
        f"""---
library_name: transformers
---
# {path.resolve().parent.name}

A BERT {PRETRAINED} from {start} on {objective}, {results["train"]["step"]} steps of up to
{config.batch_tokens:,} tokens, sequences of up to {config.length}, learning rate {config.lr:g},
seed {config.seed}. Settings: `run_config.yaml`.
{table}{ending(results["train"]["cost"], inputs)}""",
    )
