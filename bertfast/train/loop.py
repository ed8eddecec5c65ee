"""The training loop, for any task that gives batches, losses as sums, and what they count."""

import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .. import heap
from ..progress import Progress, Say
from . import checkpoint, networks
from .config import LOWER_IS_BETTER, RunConfig
from .cost import Cost
from .optimizer import learning_rate, make_optimizer
from .ranks import Ranks, join, like
from .speed import Speed, matmul_rate
from .task import Task
from .watch import Log, Stop, StoppedError, line

LAG = 2  # steps that a GPU may be behind the host, which then reads what they came to


class TrainingError(RuntimeError):
    """A run that can't go on: a loss that is not finite, a settings clash on resume, best weights
    that are damaged."""


class InterruptedRunError(RuntimeError):
    """The run was asked to stop (SIGTERM) and saved its state."""


class _Loss(nn.Module):
    """A task's loss as a module's forward, which is where FSDP acts."""

    def __init__(self, model, task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch, score=False):
        return (self.task.score if score else self.task.loss)(self.model, batch)


def train(
    model: nn.Module, task: Task, config: RunConfig, out: Path, fingerprint: dict, say: Say = print
) -> dict:
    """Train `model` in place; afterwards it holds the best evaluation's weights, or the last ones
    where config.metric is None or was a number in none.

    The loss of a step is the sum over all its micro-batches, of all ranks, divided by their total
    weight, so neither accumulation nor ranks change the gradient. `fingerprint` is what must not
    differ on resume. Returns {"step", "epoch", "best": the best evaluation, "last": the last one's
    metrics, "tokens", "stopped_early"; where steps are replayed "graphs": the counts of `Replay`}.
    Raises TrainingError, InterruptedRunError, OSError (a full disk; the checkpoint before stays).
    """
    return _Run(model, task, config, out, fingerprint, say).train()


class _Run:
    """One run of the loop."""

    def __init__(self, model, task, config, out, fingerprint, say):
        from accelerate import Accelerator

        cpu = config.device == "cpu" or not torch.cuda.is_available()
        if cpu:
            heap.keep_freed()
        join("cpu" if cpu else "cuda")
        self.accelerator = Accelerator(cpu=cpu)
        self.ranks = Ranks(config.parallel)
        self.main = self.ranks.rank == 0
        self.say = say if self.main else lambda text: None
        self.model, self.task, self.config = model, task, config
        self.out, self.fingerprint = out, fingerprint
        self.folder = out / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        device = self.accelerator.device
        self.low = torch.bfloat16 if config.precision == "bf16" else torch.float32
        layers = networks.layers(model)
        self.module = self.ranks.wrap(_Loss(model.to(device), task), layers)
        self.optimizer = make_optimizer(model, config)
        self.objectives = max(1, len(task.names))
        settings = self.objectives, config.clip, self._autocast, self.ranks, self.say
        self.work = task.step(self.module, self.optimizer, *settings)
        self.group = config.accumulation * self.ranks.world  # micro-batches in a step
        self.steps = task.steps(config, self.group)
        own = self.steps, self.group, self.ranks, device, self.say
        self.cost = Cost(task, config, *own)
        self.step = 0
        self.mine = set()  # names of the checkpoints that this run may go back to
        self.state = {
            "epoch": 0,
            "done": 0,  # steps of the epoch
            "evaluated": 0,  # the last step that was
            "last": None,  # its metrics
            "tokens": 0,
            "log_size": 0,
            "best": None,
            "best_weights": None,  # the checkpoint that holds them, and its checksum
            "bad_evaluations": 0,
            "stopped": False,
        }

    def train(self) -> dict:
        self._resume()
        self.cost.begin()
        bar = tqdm(
            total=self.steps, initial=self.step, unit="step", desc="train", dynamic_ncols=True,
            disable=None if self.main else True,  # None: where stderr is no terminal
        )  # fmt: skip
        self.log = Log(self.out, self.state["log_size"], self.main, self.say)
        self.speed = self.ahead = None
        self.reports = deque()  # of steps that are not logged yet
        self.said = time.monotonic()
        try:
            # The next step's batches are made in a thread while this step runs.
            with ThreadPoolExecutor(1) as self.loader, Stop() as self.stop, bar as self.bar:
                self._loop()
                self._flush()
        finally:
            self.log.close()
            self.cost.end()
            heap.release_freed()
        state = self.state
        if state["best"] and state["best"]["step"] != self.step:
            self._load_best()
        self.model.eval()
        found = {
            "step": self.step,
            "epoch": state["epoch"],
            "best": state["best"],
            "last": state["last"],
            "tokens": state["tokens"],
            "stopped_early": state["stopped"],
            "cost": self.cost.record(),
        }
        if self.work.replay:
            self.say(str(self.work.replay))
            found["graphs"] = dict(self.work.replay.counts)
        return found

    def _loop(self):
        state, batches, part = self.state, [], None
        while not self._over():
            if part != state["epoch"]:
                part, batches = state["epoch"], self.task.batches(state["epoch"])
                if not batches:
                    raise TrainingError(f"part {part} of the training data holds no batch")
            ended = state["done"] * self.group >= len(batches) or self.step >= self.steps
            due = self._due(ended)
            if due:
                self._evaluate()
            if ended:
                state["epoch"], state["done"] = state["epoch"] + 1, 0
            if due:
                self._save()
            if ended or state["stopped"]:
                continue
            at = state["done"] * self.group
            following = batches[at + self.group : at + 2 * self.group]
            self._train_step(batches[at : at + self.group], following)
            every = self.config.save_steps
            if every and self.step % every == 0 and not self._due(not following):
                self._save()

    def _over(self) -> bool:
        """Whether all is done, the last evaluation too: also where a resumed run begins."""
        return self.state["stopped"] or self.state["evaluated"] == self.step >= max(1, self.steps)

    def _due(self, ended: bool) -> bool:
        """Whether the weights are to be evaluated, which also saves them."""
        if self.state["evaluated"] == self.step:
            return False
        every = self.config.eval_steps
        if every is None:
            return ended
        return self.step % every == 0 or self.step >= self.steps

    def _load(self, group):
        """This rank's micro-batches: as the task loads them, as they run, whether they count."""
        mine = []
        for chosen, factor in self.ranks.share(group):
            if factor or self.ranks.sharded:
                batch = self.task.load(chosen)
                mine.append((batch, self.work.ready(batch), factor))
        return mine

    def _train_step(self, group, following):
        state, start = self.state, time.perf_counter()
        if not self.model.training:
            self.model.train()
        mine = self.ahead.result() if self.ahead else self._load(group)
        self.ahead = self.loader.submit(self._load, following) if following else None
        totals = self._totals([batch for batch, _, factor in mine if factor])
        if totals["stop"]:
            self._leave()
        rate = learning_rate(self.step, self.steps, self.config)
        self.work.begin([w or 1.0 for w in totals["weights"]], rate)
        try:
            self._accumulate(mine)
        except torch.OutOfMemoryError as e:
            if not self.work.give_up(e):
                raise
            self._accumulate(mine)
        report = self.work.update()
        self.step += 1
        state["done"] += 1
        state["tokens"] += int(totals["tokens"])
        record = {"lr": rate, "tokens_seen": state["tokens"]}
        self.reports.append((self.step, state["epoch"], report, record))
        lag = LAG if self.work.late else 0
        if len(self.reports) > lag:
            self.reports[0][2].read()  # the host gets no further ahead
        seconds = time.perf_counter() - start
        if self.speed is None:
            device = self.accelerator.device.type
            self.speed = Speed(matmul_rate(device, self.low) if totals["flops"] else None)
        self.speed.add(totals["tokens"], totals["flops"] / self.ranks.world, seconds)
        self.cost.add(totals, seconds, self.speed.peak)
        self._flush(lag)
        self.bar.update()

    def _accumulate(self, mine):
        # Not Accelerator's seeds: these are the same after a restart, and differ between ranks.
        _seed(self.config.seed, self.step, self.ranks.rank, self.accelerator.device)
        for i, (_, ready, factor) in enumerate(mine):
            if i and self.stop.asked and self.ranks.world == 1:  # the step is done over later
                self._leave()
            self.work.add(ready, factor, last=i == len(mine) - 1)

    def _flush(self, kept: int = 0):
        """Logs the steps that are done but the last `kept`. TrainingError where one's loss is not
        finite: the weights are still those before it."""
        while len(self.reports) > kept:
            step, epoch, report, rest = self.reports.popleft()
            losses, norm = report.read()
            loss = sum(losses)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {step}: lower --lr, or look for bad labels"
                )
            record = {"step": step, "epoch": epoch}
            if self.task.tells_losses:
                record |= {"loss": loss} | dict(zip(self.task.names, losses, strict=False))
            record |= {"gradient_norm": norm} | rest | self.speed.record(self.steps - step)
            self.log.write(**record)
            speed = record["tokens_per_second"]
            told = f"loss {loss:.4f}, " if self.task.tells_losses else ""
            self.bar.set_postfix_str(f"{told}{speed:,.0f} tokens/s", refresh=False)
            every, now = getattr(self.config, "log_steps", None), time.monotonic()
            if every:
                due = step % every == 0 or step == self.steps
            else:
                due = self.bar.disable and now - self.said >= Progress.EVERY
            if due:
                self.said = now
                self.say(line(record, self.steps))

    def _totals(self, batches) -> dict:
        """Over all ranks: weights (one or more), tokens, flops, and whether any is to stop."""
        weights = [self.task.weight(b) for b in batches]
        weights = np.asarray(weights, np.float64).reshape(len(weights), self.objectives).sum(0)
        others = [
            float(sum(self.task.tokens(b) for b in batches)),
            sum(self.task.flops(b) for b in batches),
            float(self.stop.asked),
        ]
        values = torch.tensor([*weights, *others], dtype=torch.float64)
        self.ranks.sum(values)  # on the host, which is not to wait for the device
        values, keys = values.tolist(), ("tokens", "flops", "stop")
        return {"weights": values[:-3]} | dict(zip(keys, values[-3:], strict=True))

    def _autocast(self):
        # Not Accelerator's mixed_precision: a process could then run in one precision only.
        kind = self.accelerator.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.low == torch.bfloat16)

    def _leave(self):
        self.work.clear()
        self._save()
        raise InterruptedRunError(f"stopped at step {self.step}; --resume auto goes on from there")

    def _evaluate(self):
        """Metrics of the weights as they are; kept if they are the best yet."""
        self._flush()
        asked = torch.tensor(float(self.stop.asked))
        self.ranks.sum(asked)
        if asked:
            self._leave()
        state, config = self.state, self.config
        self.model.eval()
        try:
            self.stop.at_once = self.ranks.world == 1
            with torch.no_grad(), self._autocast():
                metrics = self.task.evaluate(self.model, lambda b: self.module(b, score=True))
        except StoppedError:
            self._leave()
        finally:
            self.stop.at_once = False
        state["evaluated"], state["last"] = self.step, metrics
        self.log.write(
            step=self.step, epoch=state["epoch"], **{f"valid_{k}": v for k, v in metrics.items()}
        )
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
        self.say(f"epoch {state['epoch'] + 1}, step {self.step}: {shown}")
        if config.metric is None:
            return
        sign = -1 if config.metric in LOWER_IS_BETTER else 1
        best, value = state["best"], metrics[config.metric]
        if not math.isfinite(value):
            self.say(f"warning: {config.metric} is {value}: these weights don't count as the best")
        # "not <=", for a best that is NaN, from a checkpoint of an older version, gives way
        elif best is None or not sign * value <= sign * best["metrics"][config.metric]:
            state["best"] = {"epoch": state["epoch"], "step": self.step, "metrics": metrics}
            state["bad_evaluations"] = -1
        state["bad_evaluations"] += 1
        state["stopped"] = (
            config.patience is not None and state["bad_evaluations"] >= config.patience
        )

    def _save(self):
        self._flush()
        tensors, cost = checkpoint.gather(self.model, self.optimizer), self.cost.state()
        if not self.main:
            return
        self.state["log_size"] = self.log.size()
        state = self.state | {"fingerprint": self.fingerprint, "cost": cost}
        keep, mine = self.config.keep, self.mine
        state = checkpoint.save(self.folder, self.step, tensors, state, keep, mine)
        self.state["best_weights"] = state["best_weights"]

    def _load_best(self):
        best = self.ranks.agree(self.state["best_weights"])  # which rank 0 has written by now
        try:
            tensors = checkpoint.read_best(self.folder, best)
        except ValueError as e:
            raise TrainingError(
                f"the weights of the best evaluation are lost: {e}. The last step's are in "
                f"{self.folder}: --resume CHECKPOINT goes on from there without them"
            ) from None
        with torch.no_grad():
            for name, value in tensors.items():
                p = self.model.get_parameter(name)
                p.copy_(like(value, p))

    def _resume(self):
        found = None
        if self.config.resume == "auto":
            found = checkpoint.latest(self.folder, self.say) if self.main else None
            found = self.ranks.agree(found)
            if not found and checkpoint.checkpoints(self.folder):
                self.say(f"warning: no checkpoint in {self.folder} is whole: training starts anew")
        elif self.config.resume != "no":
            path = Path(self.config.resume)
            found = path, checkpoint.read_state(path)
            try:
                checkpoint.check_best(*found)
            except ValueError as e:
                self.say(f"warning: the best weights so far are lost ({e}); going on without them")
                found[1].update(best=None, best_weights=None)
        if not found:
            return
        path, saved = found
        if saved["fingerprint"] != self.fingerprint:
            old, new = saved["fingerprint"], self.fingerprint
            changed = [k for k in {**new, **old} if old.get(k) != new.get(k)]
            raise TrainingError(
                f"{path} was trained with other settings ({', '.join(changed)}); "
                "give the same ones, another --out, or --resume no"
            )
        checkpoint.restore(path, self.model, self.optimizer)
        checkpoint.set_rng_state(saved["rng"])
        self.step, self.state = saved["step"], {k: saved[k] for k in self.state}
        self.cost.go_on(saved.get("cost"), self.step)  # which older checkpoints don't have
        best = self.state["best_weights"]
        if path.parent.resolve() == self.folder.resolve():
            names = (c.name for c in checkpoint.checkpoints(self.folder))
            self.mine = {name for name in names if name <= path.name}
        elif best:  # into this folder: the other run may drop them, or be deleted
            if self.main:
                checkpoint.bring(path.parent / best["checkpoint"], self.folder)
            self.mine.add(best["checkpoint"])
        self.say(f"resumed from {path}")


def _seed(seed: int, step: int, rank: int, device: torch.device):
    """torch's generators for this step on this rank; torch.manual_seed would keep a stack trace of
    each call for every other kind of device."""
    value = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    value = int(value >> np.uint64(1))
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
