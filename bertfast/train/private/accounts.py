"""How much noise a budget needs, and what was spent, by Opacus' accountant."""

import warnings
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..tasks.classify import ClassifyConfig

ACCOUNTANT = "prv"  # Gopi et al., arXiv:2106.02848: tighter than Renyi's


def _opacus():
    try:
        import opacus
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError:
        raise RuntimeError(
            "--dp-epsilon takes Opacus' accountant: pip install 'bertfast[private]'"
        ) from None
    return opacus, get_noise_multiplier


class Budget(NamedTuple):
    """Of a run whose every step draws each of `examples` with probability `rate`."""

    epsilon: float
    delta: float
    clip: float
    examples: int
    batch: int  # expected
    steps: int
    sigma: float  # noise multiplier: the noise's standard deviation is sigma * clip

    @classmethod
    def of(cls, config: "ClassifyConfig", examples: int, steps: int) -> "Budget":
        """RuntimeError without Opacus."""
        batch, epsilon, delta = config.batch_size, config.dp_epsilon, config.dp_delta
        _, multiplier = _opacus()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the bounds that it starts from
            sigma = multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=batch / examples,
                steps=max(1, steps),
                accountant=ACCOUNTANT,
                epsilon_tolerance=min(0.01, epsilon / 100),
            )
        return cls(epsilon, delta, config.dp_clip, examples, batch, steps, sigma)

    @property
    def rate(self) -> float:
        return self.batch / self.examples

    def spent(self, steps: int) -> float:
        """Epsilon after so many steps, at `delta`."""
        if not steps:
            return 0.0
        accountant = _opacus()[0].accountants.create_accountant(ACCOUNTANT)
        accountant.history = [(self.sigma, self.rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(self.delta))

    def record(self, steps: int) -> dict:
        """For a run's results, after so many steps."""
        return {
            "epsilon": self.spent(steps),
            "delta": self.delta,
            "sigma": self.sigma,
            "clip": self.clip,
            "sampling_rate": self.rate,
            "expected_batch": self.batch,
            "steps": steps,
            "accountant": f"opacus {_opacus()[0].__version__} {ACCOUNTANT}",
            "neighbours": "one training row added or removed",
        }
