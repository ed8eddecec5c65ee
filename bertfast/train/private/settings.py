"""What a private run may be asked for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..tasks.classify import ClassifyConfig

MOST = 20.0  # of epsilon: above it nothing is promised, and Opacus' search takes minutes
OFF = {"dp_epsilon": None, "dp_delta": None, "dp_clip": 0.1}  # Li et al., arXiv:2110.05679: 0.1


def check(config: "ClassifyConfig", metric: str | None) -> None:
    """ConfigError for what would break the guarantee. metric: as it was given, or None.

    Without a validation file nothing is chosen by the rows that are split off the private ones: the
    last weights are kept.
    """
    if config.dp_epsilon is None:
        for name in ("dp_delta", "dp_clip"):
            config._check(name, getattr(config, name) == OFF[name], "nothing without dp_epsilon")
        return
    epsilon, delta = config.dp_epsilon, config.dp_delta
    config._check("dp_epsilon", 0 < epsilon <= MOST, f"above 0, at most {MOST:g}")
    good = delta is not None and 0 < delta < 1
    config._check("dp_delta", good, "below 1 / examples, and above 0, beside dp_epsilon")
    config._check("dp_clip", config.dp_clip > 0, "above 0")
    own = f"{type(config).clip:g}: each example's gradient is clipped, to dp_clip"
    refused = (
        ("precision", config.precision == "fp32", "fp32: norms are to be exact"),
        ("batch_tokens", config.batch_tokens is None, "none: batch_size is the expected one"),
        ("accumulation", config.accumulation == 1, "1: give the expected batch as batch_size"),
        ("seeds", config.seeds == 1, "1: each run would spend the budget"),
        ("dedup", not config.dedup, "False: which of equal rows stays depends on other rows"),
        ("gradient_checkpointing", not config.gradient_checkpointing, "False"),
        ("clip", config.clip == type(config).clip, own),
    )
    for name, good, expected in refused:
        config._check(name, good, f"{expected} (dp_epsilon is given)")
    if config.valid:
        return
    public = "with dp_epsilon and without a public --valid file: it would look at private rows"
    config._check("metric", metric is None, f"none {public}")
    config._check("patience", config.patience is None, f"none {public}")
    config._check("thresholds", not config.thresholds, f"False {public}")
    config.metric = None


def notes(config: "ClassifyConfig") -> list[str]:
    """What the guarantee doesn't cover, for people."""
    found = [
        "privacy covers the weights; the data report, the classes' names, the number of rows and "
        "all figures are of the data as they are",
    ]
    if config.valid:
        found.append(f"{config.valid} chooses the weights: it is taken for public")
    else:
        found.append("validation rows are split off the private file: they choose nothing")
    return found
