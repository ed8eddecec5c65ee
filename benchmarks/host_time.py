"""What a call costs the host: models so small that kernels take no time, graphs that do nothing.

    python benchmarks/host_time.py [--rounds 9] [--out FOLDER] [--beside PYTHON]

Milliseconds of one call at 1 x 32 tokens, 12 layers, one thread. "replayed" is what a GPU's host
does: CUDA graphs are recorded by a stand-in that runs the function once and replays nothing. Its
results are so those of the recording, held against the launched ones in the same run. --beside:
the interpreter of another checkout's environment, which takes turns with this one.
"""

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from gpu_results import write

LAYERS, TOKENS = 12, 32
TURNS, BURST = 6, 15
STOCK, PADDED = "transformers", 4


class Recorded:
    """`encoder.graph.CudaGraph` without a GPU."""

    bytes = 0

    def __init__(self, function, pool):
        self.result = function()

    def replay(self):
        pass

    pool, capturing = staticmethod(list), staticmethod(lambda: False)
    warm_up = staticmethod(lambda function: function())
    memory, empty = staticmethod(lambda: 2**40), staticmethod(lambda: None)

    class Turn(contextlib.nullcontext):
        def finish(self):
            pass


@contextlib.contextmanager
def recording():
    """Encoders on the CPU replay such recordings."""
    from bertfast.encoder import graph

    graph.RECORDERS["cpu"] = Recorded
    try:
        yield
    finally:
        del graph.RECORDERS["cpu"]


def step_of(model, batch):
    """A forward and a backward, gradients set to None before."""
    parameters = list(model.parameters())

    def run():
        for p in parameters:
            p.grad = None
        found = model(**batch)[0]
        found.sum().backward()
        return found.detach()

    return run


def inference_of(model, batch):
    def run():
        with torch.no_grad():
            return model(**batch)[0]

    return run


def models() -> dict:
    """{who: BertModel}, all of the same weights."""
    import bertfast

    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,  # so that results can be compared
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    stock = transformers.BertModel(config, add_pooling_layer=False).eval()
    faster = copy.deepcopy(stock)
    bertfast.accelerate(faster, strict=True)
    native = bertfast.BertModel(config, add_pooling_layer=False).eval()
    native.load_state_dict(stock.state_dict())
    return {STOCK: stock, "accelerated": faster, "native": native}


def calls_of(who, model, batches) -> dict:
    """{(what, who): a function that calls it}"""
    found = {(what, who): inference_of(model, batch) for what, batch in batches.items()}
    trained = copy.deepcopy(model).train()
    found["training step", who] = step_of(trained, batches["inference"])
    if who != "native":  # whose encoder takes packed tokens
        with torch.no_grad():
            states = model.embeddings(batches["inference"]["input_ids"])
        given = {"hidden_states": states, "attention_mask": None}
        found["encoder's inference", who] = inference_of(model.encoder, given)
        given = given | {"hidden_states": states.clone().requires_grad_()}
        found["encoder's training step", who] = step_of(trained.encoder, given)
    return found


def calls() -> dict:
    import bertfast

    batch = {"input_ids": torch.arange(1, 1 + TOKENS)[None]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    short = batch | {"attention_mask": (batch["input_ids"] <= TOKENS - PADDED).long()}
    batches = {"inference": batch, "padded inference": short}
    found = {}
    for who, model in models().items():
        found |= calls_of(who, model, batches)
    frozen = bertfast.freeze(models()["native"])
    found["inference", "frozen"] = inference_of(frozen, batch)
    found[LOOP, STOCK] = stock_loop()
    with contextlib.suppress(ImportError):  # of an older checkout
        found[LOOP, "our loop"] = our_loop()
        found |= replayed(batches)
    return found


LOOP = "step of a training loop"
_RATE = 1e-9  # so that losses stay as they are


def classifiers() -> tuple:
    """transformers' and ours, of the same weights."""
    import bertfast

    torch.manual_seed(0)
    config = models()[STOCK].config
    stock = transformers.BertForSequenceClassification(config).train()
    ours = bertfast.BertForSequenceClassification(config).train()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def stock_loop():
    """Forward, backward, clipping, schedule, AdamW; nobody reads the loss."""
    model, _ = classifiers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    batch = {"input_ids": torch.arange(1, 1 + TOKENS)[None], "labels": torch.tensor([1])}

    def run():
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.detach().view(1, 1)

    return run


def our_loop():
    """The same by train/step.py, which also makes a report of loss and norm."""
    from bertfast.train import config, optimizer, packed, ranks, step
    from bertfast.train.tasks.classify import ClassificationTask

    _, model = classifiers()
    task = ClassificationTask(config.RunConfig(), torch.device("cpu"), print)
    task.config.task = "single_label"
    loss = partial(task.loss, model)
    made = optimizer.make_optimizer(model, config.RunConfig(lr=_RATE))
    work = step.Step(loss, made, 1, 1.0, contextlib.nullcontext, ranks.Ranks(), print)
    rows = [{"input_ids": list(range(1, 1 + TOKENS)), "labels": 1}]
    ready = work.ready(packed.Packed.of_rows(rows))  # the loader's thread does this in a run

    def run():
        work.begin([1.0], _RATE)
        work.add(ready)
        return work.update().values[:1].view(1, 1)

    return run


def replayed(batches) -> dict:
    """Ours on recordings."""
    import bertfast

    def on(call):
        def run():
            with recording():
                return call()

        return run

    ours, found = models(), {}
    for who in ("accelerated", "native"):
        made = calls_of(who, ours[who], batches)
        found |= {(what, f"{who}, replayed"): on(call) for (what, _), call in made.items()}
    with recording():
        found[LOOP, "our loop, replayed"] = on(our_loop())
        whole = bertfast.cuda_graphs(models()["native"])
    found["inference", "native, cuda_graphs"] = on(inference_of(whole, batches["inference"]))
    return found


def measure() -> dict[str, dict[str, float]]:
    """{what: {who: seconds}}, in turns; each result is held against that of transformers."""
    runs = calls()
    for (what, _), run in runs.items():
        for _ in range(5):
            found = run()
        real = slice(TOKENS - PADDED) if what.startswith("padded") else slice(None)
        expected = runs[what, STOCK]()
        torch.testing.assert_close(found[:, real], expected[:, real], rtol=1e-3, atol=1e-3)
    seconds = {key: [] for key in runs}
    for _ in range(TURNS):
        for key, run in runs.items():
            for _ in range(BURST):
                start = time.perf_counter()
                run()
                seconds[key].append(time.perf_counter() - start)
    found = {}
    for (what, who), times in seconds.items():
        found.setdefault(what, {})[who] = statistics.median(times)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", help="another checkout's python")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder for host_time.json")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.once:
        torch.set_num_threads(1)
        print(json.dumps(measure()))
        return
    pythons = [sys.executable] + ([args.beside] if args.beside else [])
    runs = {python: [] for python in pythons}
    for _ in range(args.rounds):
        for python in pythons:
            command = [python, __file__, "--once"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[python].append(json.loads(out.splitlines()[-1]))
    rows = []
    for what, all_who in runs[sys.executable][0].items():
        for who in all_who:
            both = [
                [r[what][who] for r in found if who in r.get(what, ())] for found in runs.values()
            ]
            medians = [1e3 * statistics.median(times) for times in both if times]
            ratio = f"  {medians[0] / medians[1]:.2f}x" if len(medians) > 1 else ""
            print(f"{what:24}{who:24}" + "".join(f"{m:10.3f}" for m in medians) + ratio)
            task = f"host time, {what}, 1 x {TOKENS}, {LAYERS} layers"
            if who == STOCK or "replayed" in who or "graphs" in who:  # the others run CPU kernels
                rows.append({"task": task, "name": who, "milliseconds": round(medians[0], 4)})
    if args.out:
        from bertfast.bench.measure import origin

        torch.set_num_threads(1)
        args.out.mkdir(parents=True, exist_ok=True)
        about = {"benchmark": "host_time", **origin()}
        write(args.out / "host_time.json", about, rows, lambda name: name != STOCK)


if __name__ == "__main__":
    main()
