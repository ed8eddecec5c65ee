"""A training step beside transformers': forward, backward and fused AdamW, dropout as configured.

In bf16 the weights stay fp32 and the forward runs under autocast, as people train.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

import bertfast

from ..progress import Say
from .encoder import first_line
from .measure import emulated, encoder_flop, product, take_turns
from .rivals import IMPLEMENTATIONS as RIVALS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TASKS = {"classify": "BertForSequenceClassification", "mlm": "BertForMaskedLM"}
PRECISIONS = ("fp32", "bf16")
IMPLEMENTATIONS = {  # as `--impl` calls them: the names in tables
    key: RIVALS[key].name for key in ("bertfast", "dropin", "sdpa", "eager", "compile")
}
# Least cosine of all gradients together to fp32's, dropout off.
COSINE = {"fp32": 0.99999, "bf16": 0.99}


def model_of(implementation: str, task: str, reference: nn.Module) -> nn.Module:
    """A model with the reference's weights."""
    import transformers

    if implementation == "bertfast":
        model = getattr(bertfast, TASKS[task])(reference.config)
    else:
        auto = getattr(transformers, "Auto" + TASKS[task].replace("BertFor", "ModelFor"))
        attention = "eager" if implementation == "eager" else "sdpa"
        model = auto.from_config(reference.config, attn_implementation=attention)
    model.load_state_dict(reference.state_dict())
    model = model.to(next(reference.parameters()).device)
    if implementation == "dropin":
        bertfast.accelerate(model, strict=True)
    return model


def labels_of(task: str, batch: dict, vocabulary: int) -> torch.Tensor:
    """A class for each row, or the words at 15% of the tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = batch["attention_mask"].cpu()
    if task == "classify":
        labels = torch.randint(2, (len(mask),), generator=generator)
    else:
        labels = torch.randint(vocabulary, mask.shape, generator=generator)
        chosen = (torch.rand(mask.shape, generator=generator) < 0.15) & mask.bool()
        chosen[0, 0] = True  # there is always one
        labels[~chosen] = -100
    return labels.to(batch["attention_mask"].device)


def loss_of(model: nn.Module, batch: Mapping[str, torch.Tensor], precision: str) -> torch.Tensor:
    device = batch["input_ids"].device.type
    cast = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
    with cast:
        return model(**batch).loss


def gradients(
    model: nn.Module, batch: Mapping[str, torch.Tensor], precision: str
) -> tuple[float, dict]:
    """The loss and every parameter's gradient, dropout off."""
    model.zero_grad()
    loss = loss_of(model.eval(), batch, precision)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def agreement(found: tuple[float, dict], expected: tuple[float, dict]) -> dict:
    """Of all gradients together; and the largest error of one, relative to the largest value."""
    (loss, ours), (exact_loss, exact) = found, expected
    dot = norm = exact_norm = error = largest = 0.0
    for name, e in exact.items():
        g = ours[name].float()
        dot += (g * e).sum(dtype=torch.float64).item()
        norm += g.square().sum(dtype=torch.float64).item()
        exact_norm += e.square().sum(dtype=torch.float64).item()
        error = max(error, (g - e).abs().max().item())
        largest = max(largest, e.abs().max().item())
    return {
        "loss_error": float(f"{abs(loss - exact_loss):.2e}"),
        "max_error": float(f"{error / largest:.2e}"),
        "cosine": round(dot / (norm * exact_norm) ** 0.5, 6),
    }


def step_of(
    model: nn.Module, batch: Mapping[str, torch.Tensor], precision: str
) -> Callable[[], None]:
    """A call that makes one optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, batch, precision).backward()
        optimizer.step()

    return step


def useful_flop(config: "PreTrainedConfig", batch: Mapping[str, torch.Tensor]) -> int:
    """Of the products of forward and backward over real tokens, and of the labelled ones' head."""
    flop = encoder_flop(config, batch["attention_mask"].sum(1).tolist())
    labels = batch["labels"]
    if labels.dim() == 2:
        head = config.hidden_size * (config.hidden_size + config.vocab_size)
        flop += 2 * int((labels >= 0).sum()) * head
    return 3 * flop


def cell(
    reference: nn.Module,
    task: str,
    implementations: Sequence[str],
    batch: Mapping[str, torch.Tensor],
    precision: str,
    rounds: int,
    say: Say = lambda text: None,
) -> dict:
    """Each implementation's gradients held against transformers' in fp32, then its step timed.

    reference: transformers' model in fp32 with the task's head. batch: with labels.
    Raises: RuntimeError where ours are wrong; a rival's row says so.
    """
    expected = gradients(reference, batch, "fp32")
    device = batch["input_ids"].device.type
    runs, found, rows = {}, {}, []
    for key in implementations:
        name = IMPLEMENTATIONS[key]
        if RIVALS[key].on_torch and device == "cpu" and (note := emulated(precision)):
            rows.append({"name": name, "note": note})
            continue
        say(f"checking {name}, {precision}")
        try:
            model = model_of(key, task, reference)
            if key == "compile":
                model.compile(dynamic=True)  # in place: its parameters keep their names
            found[name] = agreement(gradients(model, batch, precision), expected)
        except Exception as error:
            if name.startswith("bertfast"):
                raise
            rows.append({"name": name, "note": first_line(error)})
            continue
        if not found[name]["cosine"] >= COSINE[precision]:
            note = f"gradients' cosine {found[name]['cosine']}, less than {COSINE[precision]}"
            if name.startswith("bertfast"):
                raise RuntimeError(f"{name}, {precision}: {note}")
            rows.append({"name": name, "note": note, **found[name]})
            continue
        runs[name] = step_of(model, batch, precision)
    multiply, flop = product(precision, device)
    say(f"timing {len(runs)} implementations, {rounds} rounds")
    seconds = take_turns(runs | {"product": multiply}, rounds, device)
    peak, flop = flop / seconds.pop("product"), useful_flop(reference.config, batch)
    ours = [t for name, t in seconds.items() if name.startswith("bertfast")]
    tokens = int(batch["attention_mask"].sum())
    timed = [
        {
            "name": name,
            "milliseconds": round(1e3 * t, 4),
            "tokens_per_second": round(tokens / t),
            "useful_gflops": round(flop / t / 1e9, 1),
            "share_of_peak": round(flop / t / peak, 3),
            "bertfast_speedup": round(t / min(ours), 3) if ours else None,
            **found[name],
        }
        for name, t in sorted(seconds.items(), key=lambda pair: pair[1])
    ]
    return {
        "tokens": tokens,
        "padded_tokens": batch["input_ids"].numel(),
        "rounds": rounds,
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "rows": timed + rows,
    }
