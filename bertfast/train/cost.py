"""What a run costs: told before it starts, counted as it goes, kept in its checkpoints."""

import math
import time
from typing import TYPE_CHECKING

import torch

from ..progress import Say
from .energy import Meter
from .task import Task

if TYPE_CHECKING:
    from .config import RunConfig
    from .ranks import Ranks

PROBE, SETTLING = 20, 5  # steps that tell how long all take; of them those at first don't count
_LONGEST = 60.0  # seconds that a dry run spends on them
COUNTED = "matrix products of forward and backward over real tokens; evaluations not counted"


class EnoughError(Exception):
    """Ends a dry run's steps."""


def planned(task: Task, steps: int, group: int) -> dict | None:
    """Tokens and operations of optimizer steps of `group` micro-batches; None where the task has no
    `work`. "exact": whether all were counted, or parts of the data taken to be alike."""
    left, part, tokens, flops = steps, 0, 0, 0.0
    while left > 0:
        batches = task.batches(part)
        work = task.work(batches[: left * group]) if batches else None
        if work is None:
            return None
        own = min(left, math.ceil(len(batches) / group))
        tokens, flops = tokens + work[0], flops + work[1]
        left, part = left - own, part + 1
        if task.alike and left:
            share = steps / own
            return {"steps": steps, "tokens": round(tokens * share), "flops": flops * share,
                    "exact": False}  # fmt: skip
    return {"steps": steps, "tokens": tokens, "flops": flops, "exact": task.exact}


class Cost:
    """Of one run, on every rank: `begin`, `add` at each step, `state` for a checkpoint, `end` and
    then `record`. Energy that is read is the whole machine's."""

    def __init__(
        self,
        task: Task,
        config: "RunConfig",
        steps: int,
        group: int,
        ranks: "Ranks",
        device: torch.device,
        say: Say,
    ) -> None:
        self.ranks, self.watts, self.say = ranks, config.watts, say
        self.device, self.precision = device, config.precision
        self.plan = planned(task, steps, group)
        self.steps, self.whole = steps, task.counts_whole
        self.dry = False  # whether to raise EnoughError when the probe is over
        self.seen, self.rate, self.meter = [], None, Meter(device)
        self.mark = time.perf_counter()
        # from_step: the first that is counted, 0 but for checkpoints of before there were costs
        self.total = dict.fromkeys(("steps", "tokens", "flops", "seconds", "step_seconds"), 0)
        self.total |= {"from_step": 0, "hours": None, "joules": 0.0, "joule_seconds": 0.0}
        self.total |= {"sources": [], "devices": []}

    def begin(self) -> None:
        """Tells what is planned."""
        self.meter.begin()
        self.mark = time.perf_counter()
        if self.plan:
            about = "" if self.plan["exact"] else "about "
            self.say(
                f"cost: up to {self.plan['steps']:,} steps, {about}{self.plan['tokens']:,} tokens, "
                f"{self.plan['flops']:.3g} FLOP, on {self.ranks.world} x {name_of(self.device)}"
            )

    def end(self) -> None:
        self.meter.end()

    def go_on(self, saved: dict | None, step: int) -> None:
        """From a checkpoint's; None of one that has none."""
        self.total |= {"from_step": step} if saved is None else saved

    def add(self, totals: dict, seconds: float, rate: float | None) -> None:
        """A step. totals: "tokens" and "flops", of all ranks. rate: FLOP/s of a large product."""
        total, self.rate = self.total, rate
        total["steps"] += 1
        total["tokens"] += int(totals["tokens"])
        total["flops"] += totals["flops"]
        total["step_seconds"] += seconds
        if len(self.seen) >= PROBE:
            return
        self.seen.append((totals["tokens"], totals["flops"], seconds))
        spent = sum(s for *_, s in self.seen)
        short = self.dry and self.ranks.world == 1 and spent > _LONGEST
        if len(self.seen) == PROBE or (self.dry and (short or total["steps"] >= self.steps)):
            self._probed()
            if self.dry:
                raise EnoughError

    def _probed(self):
        """Tells the hours of the whole run."""
        seen = self.seen[min(SETTLING, len(self.seen) - 1) :]
        tokens, flops, seconds = map(sum, zip(*seen, strict=True))
        total, plan = self.total, self.plan
        self._advance()
        text = f"cost: {len(self.seen)} steps: {tokens / seconds:,.0f} tokens/s"
        if flops and self.rate:
            share = flops / seconds / self.rate / self.ranks.world
            text += f", {share:.0%} of a large matrix product's rate"
        if plan:
            left = self.steps - total["from_step"] - total["steps"]
            hours = left * plan["tokens"] / self.steps * seconds / tokens / 3600
            text += f"; the other {left:,} steps take about {hours:.2g} hours without evaluations"
            if total["joule_seconds"]:
                watts = total["joules"] / total["joule_seconds"]
                text += f" and {hours * watts / 1e3:.2g} kWh ({'; '.join(total['sources'])})"
            if total["hours"] is None and total["from_step"] == 0:
                total["hours"] = hours + total["step_seconds"] / 3600
        self.say(text)

    def _advance(self):
        """Brings time and energy up to now; all ranks together."""
        total, now = self.total, time.perf_counter()
        seconds, self.mark = now - self.mark, now
        total["seconds"] += seconds
        found = self.ranks.gather((self.meter.take(), self.meter.sources, name_of(self.device)))
        joules, sources, devices = zip(*found, strict=True)
        sources = list(dict.fromkeys(source for own in sources for source in own))
        energy = sum(joules) if sources and None not in joules else None
        if energy is None and self.watts:
            energy, sources = self.watts * seconds, [f"stated, {self.watts:g} W"]
        if energy is not None:
            total["joules"] += energy
            total["joule_seconds"] += seconds
            total["sources"] = list(dict.fromkeys([*total["sources"], *sources]))
        total["devices"] = list(dict.fromkeys([*total["devices"], *devices]))

    def state(self) -> dict:
        """JSON values for a checkpoint; all ranks together."""
        self._advance()
        return dict(self.total)

    def record(self) -> dict:
        """JSON values of what was spent; all ranks together."""
        self._advance()
        total = self.total
        found = {k: total[k] for k in ("devices", "steps", "tokens", "seconds", "step_seconds")}
        found |= {"ranks": self.ranks.world, "precision": self.precision}
        found |= {"from_step": total["from_step"]} if total["from_step"] else {}
        seconds = total["step_seconds"]
        if seconds:
            found["tokens_per_second"] = total["tokens"] / seconds
        if total["flops"]:
            why = "" if self.whole else "; without the scores of layers that bertfast doesn't know"
            found |= {"flops": total["flops"], "counted": COUNTED + why}
            if self.rate and seconds and len(total["devices"]) == 1:
                share = total["flops"] / seconds / self.rate / self.ranks.world
                found |= {"product_flops_per_second": self.rate, "share_of_product_rate": share}
        energy = None
        if total["joule_seconds"]:
            energy = {"joules": total["joules"], "kwh": total["joules"] / 3.6e6}
            energy |= {"sources": total["sources"], "seconds": total["joule_seconds"]}
        found["energy"] = energy
        if energy is None:
            found["no_energy"] = f"{self.meter.why or 'no counter'}; no --watts was stated"
        if self.plan:
            found["planned"] = self.plan | {"hours": total["hours"]}
        return found


def together(costs: list[dict]) -> dict:
    """What several runs took."""
    return {
        name: sum(one[name] for one in costs)
        for name in ("steps", "tokens", "flops", "seconds", "step_seconds")
        if all(name in one for one in costs)
    }


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from ..bench.measure import cpu_name

    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def sentence(cost: dict) -> str:
    """For a model card."""
    text = f"{cost['steps']:,} steps in {cost['seconds']:,.1f} s with evaluations, "
    text += f"{cost['step_seconds']:,.1f} s without, on {cost['ranks']} x "
    text += f"{'; '.join(cost['devices'])}, {cost['precision']}: {cost['tokens']:,} tokens"
    if "tokens_per_second" in cost:
        text += f", {cost['tokens_per_second']:,.0f} a second"
    if "flops" in cost:
        text += f"; {cost['flops']:.3g} FLOP ({cost['counted']})"
    if "share_of_product_rate" in cost:
        text += f", {cost['share_of_product_rate']:.0%} of a large matrix product's rate"
    energy = cost["energy"]
    if energy is None:
        return f"{text}. Energy: not known ({cost['no_energy']})."
    whole = energy["seconds"] > 0.99 * cost["seconds"]
    of = "" if whole else f" over {energy['seconds']:,.0f} of the {cost['seconds']:,.0f} s"
    return f"{text}. Energy: {energy['kwh']:.3g} kWh{of}, by {'; '.join(energy['sources'])}."
