"""How to explain."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.errors import ConfigError
from ..train.networks import EVAL_TOKENS
from .occlusion import WAYS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS = ("integrated_gradients", "occlusion", "gradient_attention", "attention_rollout")
BASELINES = ("mask", "pad")
_OTHER = {"baseline": "--baseline pad", "occlusion": "--occlusion delete"}


@dataclass(frozen=True)
class Settings:
    """
    Args:
        methods: some of `METHODS`.
        target: a class's name; None: of each text the class that is most probable.
        baseline: "mask" or "pad", the token of integrated gradients' baseline.
        occlusion: "mask", that a word is replaced by this token, or "delete".
        steps, max_steps: of integrated gradients, at first and at most.
        batch_tokens: tokens in a batch.

    Raises: ConfigError.
    """

    methods: tuple[str, ...] = METHODS[:1]
    target: str | None = None
    baseline: str = "mask"
    occlusion: str = "mask"
    steps: int = 32
    max_steps: int = 512
    batch_tokens: int = EVAL_TOKENS

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown or not self.methods or len({*self.methods}) < len(self.methods):
            raise ConfigError(
                f"methods is {', '.join(self.methods) or 'empty'}; expected some of "
                f"{', '.join(METHODS)}, each once"
            )
        for name, known in (("baseline", BASELINES), ("occlusion", WAYS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}"
                )
        for name in ("steps", "max_steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.steps > self.max_steps:
            raise ConfigError(f"steps is {self.steps}, above max_steps, {self.max_steps}")

    def token(self, setting: str, tokenizer: "PreTrainedTokenizerBase") -> int | None:
        """The id that stands in a word's place by `baseline` or `occlusion`; None where it is
        deleted."""
        name = getattr(self, setting)
        found = None if name == "delete" else getattr(tokenizer, f"{name}_token_id")
        if found is None and name != "delete":
            raise ConfigError(
                f"{setting} is {name!r}, but the tokenizer has no {name} token: give "
                f"{_OTHER[setting]}"
            )
        return found
