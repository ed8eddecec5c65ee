"""What a run costs: operations beside torch's own count, energy from a made-up machine's counters,
records that add up over a resumed run."""

import copy
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tiny_pretrain
import torch
import transformers
import translated
from helpers import refused
from torch.utils.flop_counter import FlopCounterMode

import bertfast
from bertfast.cli import main
from bertfast.train import (
    ClassifyConfig,
    ConfigError,
    InterruptedRunError,
    PretrainConfig,
    cost,
    energy,
    finetune,
    networks,
    pretrain,
)
from bertfast.train import checkpoint as state
from bertfast.train.flops import Products, Translation, pairs
from bertfast.train.tasks.classify import ClassificationTask

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 60}
SIZES |= {"intermediate_size": 40, "max_position_embeddings": 40, "pad_token_id": 0}
FAMILIES = {
    "Bert": {},
    "Roberta": {},
    "Electra": {"embedding_size": 16},
    "Albert": {"embedding_size": 16},
    "DistilBert": {"dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 40},
    "ModernBert": dict.fromkeys(
        ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0
    ),
}
LENGTHS = (17, 17, 17)  # alike, so that transformers computes no padding


def stock(family, head):
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    config._attn_implementation = "eager"  # plain products, which the counter knows
    return getattr(transformers, f"{family}For{head}")(config).train()


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("frozen", [None, 0, 2])
@pytest.mark.parametrize("head", ["TokenClassification", "SequenceClassification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_beside_torchs_counter(family, head, frozen):
    """Of transformers' model, whose last layer computes all tokens."""
    theirs = stock(family, head)
    ours = copy.deepcopy(theirs)
    bertfast.accelerate(ours)
    networks.freeze(ours, None if family == "Albert" else frozen)  # whose layers are one
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        a.requires_grad_(b.requires_grad)
    ids = torch.randint(5, 60, (len(LENGTHS), LENGTHS[0]))
    products, rows = Products.of(ours), sum(LENGTHS) if head[0] == "T" else len(LENGTHS)
    expected = counted(lambda: theirs(input_ids=ids).logits.sum().backward())
    assert products.whole and products.flops(LENGTHS, rows) == expected


def test_operations_of_an_unknown_model():
    """Its linear layers, and it says so."""
    theirs = stock("Bert", "TokenClassification")
    products = Products.of(theirs)  # not accelerated
    scores = 3 * 2 * 2 * 24 * SIZES["num_hidden_layers"] * pairs(LENGTHS)
    whole = copy.deepcopy(theirs)
    bertfast.accelerate(whole)
    assert not products.whole
    assert products.flops(LENGTHS, 51) == Products.of(whole).flops(LENGTHS, 51) - scores


@pytest.mark.parametrize("window", [None, 0, 2, 100])
def test_pairs(window):
    lengths = [0, 1, 2, 3, 7, 20]
    near = np.inf if window is None else window
    expected = sum(abs(i - j) <= near for n in lengths for i in range(n) for j in range(n))
    assert pairs(lengths, window) == expected


def test_operations_of_a_translation():
    """transformers computes the scores of the tokens behind, too."""
    theirs, ours = translated.pair(layers=2)
    for model in (theirs.encoder, theirs.decoder):
        model.set_attn_implementation("eager")
    s, t = 9, 6
    given = {"input_ids": torch.ones(4, s).long(), "decoder_input_ids": torch.ones(4, t).long()}
    c = ours.config.decoder
    behind = 6 * 2 * c.hidden_size * c.num_hidden_layers * 4 * t * (t - 1) / 2
    ours.encoder.pooler.requires_grad_(False)
    found = Translation(ours).flops([s] * 4, [t] * 4)
    theirs.train()
    embeddings = theirs.encoder.embeddings.word_embeddings.weight
    assert embeddings.requires_grad
    expected = counted(lambda: theirs(**given).logits.sum().backward())
    if theirs.encoder.pooler is not None:  # which nobody reads, but transformers computes
        expected -= 2 * 4 * ours.config.encoder.hidden_size**2
    assert found == expected - behind


def test_operations_of_pretraining_by_hand(tmp_path):
    """And what is planned is what is done."""
    task, model = tiny_pretrain.task(tmp_path)
    batches = task.batches(0)[:3]
    loaded = [task.load(batch) for batch in batches]
    batch, (h, inner, words) = loaded[0], (32, 48, model.config.vocab_size)
    n, masked, lengths = len(batch.input_ids), len(batch.labels), np.diff(batch.cu_seqlens)
    wanted = masked + len(lengths)
    forward = 2 * (2 * 3 * h * h * n + (h * h + 2 * h * inner) * (n + wanted))
    forward += 2 * (2 * 2 * h * (lengths.astype(int) ** 2).sum())
    forward += 2 * (masked * (h * h + h * words) + len(lengths) * (h * h + 2 * h))
    assert task.flops(batch) == 3 * forward
    assert task.work(batches) == (
        sum(map(task.tokens, loaded)),
        pytest.approx(sum(map(task.flops, loaded))),
    )
    few = cost.planned(task, 3, 1)
    assert few["tokens"] == sum(map(task.tokens, loaded)) and few["exact"]


class Machine:
    """/sys/class/powercap with counters that the test turns."""

    def __init__(self, root, names=("package-0", "core", "dram", "package-1", "psys")):
        self.zones = [root / f"intel-rapl:{i}" for i in range(len(names))]
        for zone, name in zip(self.zones, names, strict=True):
            zone.mkdir(parents=True)
            (zone / "name").write_text(name + "\n")
            (zone / "max_energy_range_uj").write_text("1000000000\n")
            self.turn(self.zones.index(zone), 990_000_000)

    def turn(self, i, microjoules):
        aside = self.zones[i] / "aside"  # at once: another thread reads it
        aside.write_text(f"{microjoules}\n")
        aside.replace(self.zones[i] / "energy_uj")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    return Machine(tmp_path / "powercap")


CPU = torch.device("cpu")


def test_processors_counters(machine):
    """Packages and memory; what is within a package, or around it, doesn't count twice. A counter
    that wrapped goes on."""
    meter = energy.Meter(CPU)
    assert meter.sources == ["RAPL (package-0, dram, package-1)"] and meter.why is None
    meter.begin()
    for i, end in enumerate((5_000_000, 999_000_000, 990_000_000, 993_000_000, 999_000_000)):
        machine.turn(i, end)  # 15 J with the wrap, 9, 0, 3, 9
    assert meter.take() == pytest.approx(15 + 0 + 3)
    machine.turn(2, 992_000_000)
    meter.end()
    assert meter.take() == pytest.approx(2) and meter.take() == 0


def test_counters_that_fail(machine, monkeypatch):
    meter = energy.Meter(CPU)
    meter.begin()
    (machine.zones[0] / "energy_uj").unlink()
    assert meter.take() is None and "energy_uj" in meter.why
    meter.end()
    monkeypatch.setattr(energy, "POWERCAP", machine.zones[0])
    meter = energy.Meter(CPU)
    assert "no counter of a processor's package" in meter.why and meter.sources == []
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process of the machine reads them
    assert energy.Meter(CPU).why is None and energy.Meter(CPU).sources == []


def test_a_gpus_power(machine, monkeypatch):
    """Between readings it is taken for straight; beside it the processors'. A GPU's work without
    its own counter has no energy."""
    watts, clock = iter([100e3, 100e3, 300e3, 300e3]), iter([0.0, 0.0, 10.0, 10.0])
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: next(watts))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "G")
    monkeypatch.setattr(energy, "EVERY", 1000)
    with monkeypatch.context() as m:
        m.setattr(energy.time, "perf_counter", lambda: next(clock))
        meter = energy.Meter(torch.device("cuda", 0))
        assert meter.sources == ["NVML power (G)", "RAPL (package-0, dram, package-1)"]
        meter.begin()
        machine.turn(2, 997_000_000)
        assert meter.take() == pytest.approx(2000 + 7)
        meter.end()

    def absent(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "power_draw", absent)
    meter = energy.Meter(torch.device("cuda", 0))
    assert meter.sources == [] and "nvidia-ml-py" in meter.why


def test_finetune_tells_and_records(tmp_path, machine, capfd):
    given = tiny.settings(tmp_path, epochs=4)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert finetune(ClassifyConfig(**given), dry_run=True) is None
    said = capfd.readouterr().err
    assert "cost: up to 32 steps, " in said and not (tmp_path / "out").exists()
    assert "cost: 20 steps: " in said and "the other 12 steps take about" in said
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    real = ClassificationTask.flops

    def turns(self, batch):
        machine.turn(0, 990_000_000 + 1000 * len(seen))
        seen.append((real(self, batch), len(batch.input_ids)))
        return seen[-1][0]

    seen = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ClassificationTask, "flops", turns)
        found = finetune(ClassifyConfig(**given))["train"]["cost"]
    said = capfd.readouterr().err
    flops, tokens = map(sum, zip(*seen, strict=True))
    assert found == json.loads((tmp_path / "out/eval_results.json").read_text())["train"]["cost"]
    assert found["tokens"] == found["planned"]["tokens"] == tokens
    assert found["flops"] == flops and found["planned"]["flops"] == pytest.approx(flops)
    assert found["steps"] == 32 and 0 < found["step_seconds"] < found["seconds"]
    assert found["tokens_per_second"] == pytest.approx(tokens / found["step_seconds"])
    share = flops / found["step_seconds"] / found["product_flops_per_second"]
    assert found["share_of_product_rate"] == pytest.approx(share)
    assert found["energy"]["joules"] == pytest.approx(31e-3)
    assert found["energy"]["sources"] == ["RAPL (package-0, dram, package-1)"]
    assert found["planned"]["hours"] > 0 and "kWh (RAPL" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Cost" in card and f"{tokens:,} tokens" in card and "RAPL" in card
    assert "CO2" not in card


def test_no_energy_is_made_up(tmp_path, monkeypatch):
    """Without a counter there is what was stated, and no other."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    given = tiny.settings(tmp_path, max_steps=2)
    found = finetune(ClassifyConfig(**given))["train"]["cost"]
    assert found["energy"] is None and "no --watts was stated" in found["no_energy"]
    assert "Energy: not known" in (tmp_path / "out" / "README.md").read_text()
    given |= {"watts": 40.0, "resume": "no"}
    found = finetune(ClassifyConfig(**given))["train"]["cost"]
    assert found["energy"]["joules"] == pytest.approx(40 * found["seconds"])
    assert found["energy"]["sources"] == ["stated, 40 W"] and "no_energy" not in found
    for watts in (0.0, -1.0, float("nan"), float("inf")):
        refused(ConfigError, "watts is .*, expected a finite number", ClassifyConfig, watts=watts)


def test_a_resumed_run_adds_up(tmp_path, monkeypatch):
    """Steps, tokens and operations as of an unbroken run, the time of both parts; also with other
    watts."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    given = tiny_pretrain.settings(tmp_path, max_steps=8, eval_steps=4, save_steps=None)
    whole = pretrain(PretrainConfig(**given | {"out": str(tmp_path / "whole")}))["train"]["cost"]
    module, calls = sys.modules["bertfast.train.pretrain"], []
    real = module.PretrainTask.loss

    def stopped(self, model, batch):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, model, batch)

    with monkeypatch.context() as m:
        m.setattr(module.PretrainTask, "loss", stopped)
        refused(KeyboardInterrupt, "^$", pretrain, PretrainConfig(**given, watts=10.0))
    kept = state.latest(tmp_path / "out" / "checkpoints", print)[1]["cost"]
    assert kept["steps"] == 4 and kept["joules"] == pytest.approx(10 * kept["seconds"])
    found = pretrain(PretrainConfig(**given, watts=20.0))["train"]["cost"]
    for key in ("steps", "tokens", "flops"):
        assert found[key] == whole[key] == found["planned"][key], key
    rest = found["seconds"] - kept["seconds"]
    assert rest > 0 and "from_step" not in found
    joules = 10 * kept["seconds"] + 20 * rest
    assert found["energy"]["joules"] == pytest.approx(joules)
    assert found["energy"]["sources"] == ["stated, 10 W", "stated, 20 W"]
    assert found["energy"]["seconds"] == pytest.approx(found["seconds"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pre-trained with bertfast" in card and "8 steps in" in card


def test_checkpoints_of_before_go_on(tmp_path, monkeypatch):
    """What they took isn't known: the record says from which step on it counts."""
    given = tiny.settings(tmp_path, max_steps=4, save_steps=2, eval_steps=4)
    real = state.save

    def older(folder, step, tensors, body, *rest):
        del body["cost"]
        found = real(folder, step, tensors, body, *rest)
        if step == 2:
            raise InterruptedRunError("stopped")
        return found

    with monkeypatch.context() as m:
        m.setattr(state, "save", older)
        refused(InterruptedRunError, "stopped", finetune, ClassifyConfig(**given))
    found = finetune(ClassifyConfig(**given))["train"]["cost"]
    assert found["from_step"] == 2 and found["steps"] == 2
    assert 0 < found["tokens"] < found["planned"]["tokens"]


def test_parts_that_are_alike():
    """A first part stands for others where counting them would take long, and the plan says so."""
    work = lambda batches: (sum(batches), 10.0 * sum(batches))
    task = SimpleNamespace(batches=lambda part: [1, 2, 3], work=work, alike=False, exact=True)
    expected = {"steps": 5, "tokens": 12, "flops": 120.0, "exact": True}  # 1 + 2, 3; twice 1 + 2, 3
    assert cost.planned(task, 4, 2) | {"steps": 5} == expected
    assert cost.planned(task, 3, 2)["tokens"] == 6 + 3
    task.alike = True
    found = cost.planned(task, 8, 2)
    assert found == {"steps": 8, "tokens": 24, "flops": 240.0, "exact": False}
    assert cost.planned(task, 1, 2) == {"steps": 1, "tokens": 3, "flops": 30.0, "exact": True}


def test_a_dry_run_of_the_command_line(tmp_path, capfd):
    values = tiny_pretrain.settings(tmp_path, max_steps=3)
    options = [t for k, v in values.items() for t in ("--" + k.replace("_", "-"), str(v))]
    assert main(["pretrain", *options, "--dry-run"]) == 0
    said = capfd.readouterr()
    assert "cost: 3 steps: " in said.err and "nothing is kept" in said.err and not said.out
    assert not (tmp_path / "out").exists()
    bad = ["pretrain", *options, "--lr", "1e30", "--clip", "0", "--dry-run"]
    assert main(bad) == 1 and "the loss is" in capfd.readouterr().err
