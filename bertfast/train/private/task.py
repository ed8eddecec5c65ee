"""Classification by DP-SGD: what of the task is otherwise."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import networks
from ..ranks import require_one_process
from ..tasks.classify import ClassificationTask
from . import gradients, settings
from .accounts import Budget
from .membership import membership_auc, spread
from .sampler import draw, parts
from .step import PrivateStep

PART = 64  # examples that go through the model at once, at most: memory is theirs


class PrivateClassification(ClassificationTask):
    """Batches are drawn by the operating system's entropy, of which nothing is kept: they are other
    ones each time, also when a run is resumed."""

    tells_losses = exact = False
    budget = privacy = None

    def read(self) -> None:
        require_one_process("private training")
        super().read()
        self.rng = np.random.default_rng()
        for note in settings.notes(self.config):
            self.say(f"note: {note}")

    def check(self, folder: Path) -> None:
        super().check(folder)
        gradients.check(self.model)
        examples, batch = len(self.parts["train"]), self.config.batch_size
        self.config._check("batch_size", batch <= examples, f"at most {examples}, all rows")
        budget = self.budget = Budget.of(self.config, examples, self.steps(self.config, 1))
        self.say(
            f"privacy: epsilon {budget.epsilon:g} at delta {budget.delta:g} takes a noise "
            f"multiplier of {budget.sigma:.4f} over {budget.steps:,} steps, each of which draws a "
            f"row with probability {budget.rate:.4g}"
        )
        if budget.delta * examples >= 1:
            self.say(f"warning: dp_delta is not below 1 / examples, {1 / examples:.2g}")

    def batches(self, part: int) -> list:
        examples, batch = len(self.parts["train"]), self.config.batch_size
        steps = -(-examples // batch)
        return [draw(examples, batch / examples, self.rng) for _ in range(steps)]

    def load(self, batch: Any) -> Any:
        """Parts, as each goes through the model; none where nobody was drawn."""
        most = min(PART, self.config.batch_size)
        return [super(PrivateClassification, self).load(own) for own in parts(batch, most)]

    def step(self, *arguments: Any) -> PrivateStep:
        return PrivateStep(self.budget, self.losses, *arguments)

    def weight(self, batch: Any) -> float:
        return float(self.config.batch_size)

    @cached_property
    def expected(self) -> tuple[float, float]:
        """Tokens and operations of a step: those of the rows that were drawn are private."""
        lengths = [len(row["input_ids"]) for row in self.rows["train"]]
        whole = sum(lengths), self._flops(lengths, len(lengths))
        return tuple(self.budget.rate * n for n in whole)

    def tokens(self, batch: Any) -> int:
        return round(self.expected[0])

    def flops(self, batch: Any) -> float:
        return self.expected[1]

    def work(self, batches: list) -> tuple[int, float]:
        tokens, flops = self.expected
        return round(len(batches) * tokens), len(batches) * flops

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of each example [n], the mean over its targets."""
        return self.summed_loss(logits, targets, reduction="none").view(len(logits), -1).mean(1)

    def results(self, outcome: dict) -> dict:
        found = {}
        for name in ("train", "valid"):
            rows = spread(self.rows[name])
            logits = np.stack(networks.outputs(self.model, rows, self.pad))
            targets = torch.tensor([row["labels"] for row in rows], device=self.device)
            logits = torch.from_numpy(logits).to(self.device)
            found[name] = self.losses(logits, targets).cpu().numpy()
        self.privacy = self.budget.record(outcome["step"])
        self.privacy["membership_auc"] = membership_auc(found["train"], found["valid"])
        return {"privacy": self.privacy}

    def card(self) -> str:
        p = self.privacy
        return f"""{super().card()}

## Privacy
The weights are ({p["epsilon"]:.3g}, {p["delta"]:g})-differentially private for {p["neighbours"]}:
DP-SGD, {p["steps"]} steps, gradients clipped to {p["clip"]:g}, noise multiplier {p["sigma"]:.4f},
Poisson sampling with probability {p["sampling_rate"]:.4g}; accountant: {p["accountant"]}. A loss
threshold tells training rows from validation rows with an AUC of {p["membership_auc"]:.3f} (0.5:
guessing). Figures, class names and the data report are of the data as they are, without noise: the
guarantee is the weights' alone."""
