"""The training loop, for any task that gives batches, losses as sums, and what they count."""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from . import checkpoint
from .config import LOWER_IS_BETTER


class TrainingError(RuntimeError):
    """A run that can't go on: a loss that is not finite, a settings clash on resume."""


class InterruptedRunError(RuntimeError):
    """The run was asked to stop (SIGTERM) and saved its state."""


class Task(Protocol):
    def batches(self, epoch: int) -> list:
        """The micro-batches of an epoch, the same for the same epoch."""

    def weight(self, batch) -> float:
        """What the batch's summed loss is to be divided by: its targets, or their weights."""

    def tokens(self, batch) -> int:
        """Real tokens in the batch."""

    def loss(self, model, batch) -> torch.Tensor:
        """The batch's loss, summed over its targets."""

    def evaluate(self, model) -> dict:
        """Metrics on the validation data."""


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """AdamW's groups: no decay on biases and LayerNorm, which are the vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int, config) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule's decay."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return config.lr * factor[config.schedule]


class _Stop:
    """SIGTERM as a flag, so that the step under way ends and is saved."""

    def __enter__(self):
        self.asked = False
        try:
            self.old = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread: no handler can be set
            self.old = None
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        if self.old is not None:
            signal.signal(signal.SIGTERM, self.old)


class _Log:
    """metrics.jsonl and TensorBoard; a resumed run cuts off what came after its checkpoint."""

    def __init__(self, out: Path, size: int):
        self.file = open(out / "metrics.jsonl", "ab")  # noqa: SIM115
        self.file.truncate(size)
        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), flush_secs=30)
        except ImportError:
            pass

    def write(self, **record):
        self.file.write((json.dumps(record) + "\n").encode())
        self.file.flush()
        for name, value in record.items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(name, value, record["step"])

    def size(self) -> int:
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def close(self):
        self.file.close()
        if self.board:
            self.board.close()


def train(model, task: Task, config, out: Path, fingerprint: dict, say: Callable = print) -> dict:
    """Train `model` in place; afterwards it holds the best epoch's weights.

    The loss of a step is the sum over all its micro-batches divided by their total weight, so
    accumulation doesn't change the gradient. `fingerprint` is what must not differ on resume.
    Returns {"step", "epoch", "best": the best epoch's metrics, "stopped_early"}.
    Raises TrainingError, InterruptedRunError, OSError (a full disk; the checkpoint before stays).
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=config.device == "cpu")
    # Not Accelerator's mixed_precision: a process could then run in one precision only.
    autocast = lambda: torch.autocast(
        accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16"
    )
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, fused=True
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    folder, best_file = out / "checkpoints", out / "checkpoints" / "best.safetensors"
    folder.mkdir(parents=True, exist_ok=True)

    per_epoch = math.ceil(len(task.batches(0)) / config.accumulation)
    steps = config.epochs * per_epoch
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    state = {"epoch": 0, "done": 0, "log_size": 0, "best": None, "bad_epochs": 0, "stopped": False}
    step = 0
    found = None
    if config.resume == "auto":
        found = checkpoint.latest(folder, say)
    elif config.resume != "no":
        found = Path(config.resume), checkpoint.read_state(Path(config.resume))
    if found:
        path, saved = found
        if saved["fingerprint"] != fingerprint:
            changed = [k for k in fingerprint if saved["fingerprint"].get(k) != fingerprint[k]]
            raise TrainingError(
                f"{path} was trained with other settings ({', '.join(changed)}); "
                "give the same ones, another --out, or --resume no"
            )
        checkpoint.restore(path, model, optimizer)
        checkpoint.set_rng_state(saved["rng"])
        step, state = saved["step"], {k: saved[k] for k in state}
        say(f"resumed from {path}")
    log = _Log(out, state["log_size"])

    def save():
        state["log_size"] = log.size()
        checkpoint.save(
            folder, step, model, optimizer, state | {"fingerprint": fingerprint}, config.keep
        )

    def run_step(group) -> tuple[float, float, int]:
        weight = sum(task.weight(b) for b in group)
        total = 0.0
        for b in group:
            with autocast():
                loss = task.loss(model, b) / weight
            accelerator.backward(loss)
            total += loss.item()
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is {total} at step {step + 1}: lower --lr, or look for bad labels"
            )
        norm = float("nan")
        if config.clip:
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip).item()
        for g in optimizer.param_groups:
            g["lr"] = learning_rate(step, steps, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, norm, sum(task.tokens(b) for b in group)

    def end_epoch():
        """Evaluate; keep the weights if they are the best yet."""
        model.eval()
        with torch.no_grad(), autocast():
            metrics = task.evaluate(model)
        log.write(step=step, epoch=state["epoch"], **{f"valid_{k}": v for k, v in metrics.items()})
        sign = -1 if config.metric in LOWER_IS_BETTER else 1
        best = state["best"]
        if best is None or sign * metrics[config.metric] > sign * best["metrics"][config.metric]:
            state["best"] = {"epoch": state["epoch"], "step": step, "metrics": metrics}
            state["bad_epochs"] = 0
            _write_best(best_file, model)
        else:
            state["bad_epochs"] += 1
        state["stopped"] = config.patience is not None and state["bad_epochs"] >= config.patience
        return metrics

    bar = tqdm(total=steps, initial=step, unit="step", desc="train", dynamic_ncols=True)
    start, tokens = time.perf_counter(), 0
    try:
        with _Stop() as stop, bar:
            while (step < steps or state["done"]) and not state["stopped"]:
                batches = task.batches(state["epoch"])
                model.train()
                while state["done"] < len(batches) and step < steps:
                    group = batches[state["done"] : state["done"] + config.accumulation]
                    loss, norm, count = run_step(group)
                    tokens += count
                    step += 1
                    state["done"] += len(group)
                    rate = tokens / (time.perf_counter() - start)
                    log.write(
                        step=step,
                        epoch=state["epoch"],
                        loss=loss,
                        gradient_norm=norm,
                        lr=optimizer.param_groups[0]["lr"],
                        tokens_per_second=round(rate, 1),
                    )
                    bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s")
                    bar.update()
                    ended = state["done"] >= len(batches) or step >= steps
                    due = config.save_steps and step % config.save_steps == 0 and not ended
                    if due or stop.asked:
                        save()
                    if stop.asked:
                        raise InterruptedRunError(
                            f"stopped at step {step}; --resume auto goes on from there"
                        )
                metrics = end_epoch()
                shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
                say(f"epoch {state['epoch'] + 1}: {shown}")
                state["epoch"], state["done"] = state["epoch"] + 1, 0
                save()
    finally:
        log.close()
    with torch.no_grad():
        for name, value in checkpoint.load_file(best_file).items():
            model.get_parameter(name).copy_(value)
    model.eval()
    return {
        "step": step,
        "epoch": state["epoch"],
        "best": state["best"],
        "stopped_early": state["stopped"],
    }


def _write_best(path: Path, model):
    from ..model.checkpoint import write_whole

    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    write_whole(path, lambda temporary: checkpoint.save_file(tensors, temporary))
