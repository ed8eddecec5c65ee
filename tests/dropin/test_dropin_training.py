"""Training an accelerated model: PEFT, Trainer, DDP, FSDP2, optimizers, gradient checkpointing."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from families import build, close_gradients, gradients, inputs_for
from helpers import apart, close_to_truth

import bertfast
from bertfast.encoder import layer as arithmetic

HEAD = "ForSequenceClassification"
TRAINED = 1e-4  # relative error after steps that each start from the last one's rounding


def labelled():
    return inputs_for() | {"labels": torch.tensor([0, 1, 1, 0])}


def train(model, steps=3, lr=1e-2, **options):
    """Losses of a few steps, dropout as the model has it."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        eps=1e-3,  # else a gradient that is rounding alone makes a whole step
        **options,
    )
    losses = []
    for _ in range(steps):
        loss = model(**labelled()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@torch.no_grad()
def logits(model):
    return model.eval()(**inputs_for()).logits


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=8,
        target_modules=["query", "value", "dense"],
        layers_to_transform=[1],
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config).train()


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when):
    theirs = build("Bert", HEAD)
    ours = copy.deepcopy(theirs)
    theirs = adapted(theirs)
    wide = copy.deepcopy(theirs).double()
    if when == "before":
        bertfast.accelerate(ours)
        ours = adapted(ours)
    else:
        ours = adapted(ours)
    report = bertfast.accelerate(ours)
    assert report.fused == 2, report
    start = {n: p.clone() for n, p in ours.named_parameters() if p.requires_grad}
    close_to_truth(*map(train, (ours, wide, theirs)), floor=TRAINED)
    found, truth = dict(ours.named_parameters()), dict(wide.named_parameters())
    for name, expected in theirs.named_parameters():
        close_to_truth(found[name], truth[name], expected, TRAINED, name)
    moved = [n for n, p in start.items() if not torch.equal(p, found[n])]
    assert len(moved) == len(start) and any("lora_A" in n for n in moved)

    exact, stock = logits(wide), logits(theirs)
    close_to_truth(logits(ours), exact, stock, TRAINED)
    with ours.disable_adapter(), wide.disable_adapter(), theirs.disable_adapter():
        without = logits(wide)
        close_to_truth(logits(ours), without, logits(theirs), TRAINED)
    assert apart(exact, without) > 1e-3
    merged = ours.merge_and_unload()
    close_to_truth(logits(merged), exact, stock, TRAINED)
    assert bertfast.accelerate(merged).fused == 2


def test_lora_on_every_layer_is_trained():
    peft = pytest.importorskip("peft")
    model = build("Bert", HEAD)
    bertfast.accelerate(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"])).train()
    model(**labelled()).loss.backward()
    b = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(b) == 4 and all(g.abs().max() > 0 for g in b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_gradient_checkpointing(family, reentrant, monkeypatch):
    rates = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    if family == "DistilBert":
        rates = ["dropout", "attention_dropout"]
    plain = build(family, **dict.fromkeys(rates, 0.2)).train()
    bertfast.accelerate(plain)
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    given = inputs_for()
    forward, calls, found = arithmetic.forward, [], []
    monkeypatch.setattr(arithmetic, "forward", lambda *a: calls.append(1) or forward(*a))
    for model, expected in ((plain, 2), (saving, 4)):  # each layer once more, in backward
        calls.clear()
        torch.manual_seed(5)
        found.append(gradients(model, given, given["attention_mask"]))
        assert len(calls) == expected
    close_gradients(found[1], found[0], found[0])  # the same dropout masks, too


@pytest.mark.parametrize("fused", [True, False])
def test_weights_are_fresh_after_the_optimizer(fused):
    """A fused optimizer doesn't bump the version counters of what it changes."""
    theirs = build("Bert", HEAD)
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    models = ours, copy.deepcopy(theirs).double(), theirs
    for model in models:
        logits(model)
        model.train()
    close_to_truth(*(train(model, fused=fused) for model in models), floor=TRAINED)
    close_to_truth(*map(logits, models), floor=TRAINED)
    assert not any(report.fallbacks.values())


class Rows(torch.utils.data.Dataset):
    """Two labels told by a token; padded by the collator."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        n = int(torch.randint(3, 12, (1,), generator=g))
        ids = torch.randint(10, 90, (n,), generator=g)
        ids[0] = 5 + i % 2
        return {"input_ids": ids.tolist(), "attention_mask": [1] * n, "labels": i % 2}


def collate(rows):
    longest = max(len(r["input_ids"]) for r in rows)
    pad = lambda values: values + [0] * (longest - len(values))
    return {
        "input_ids": torch.tensor([pad(r["input_ids"]) for r in rows]),
        "attention_mask": torch.tensor([pad(r["attention_mask"]) for r in rows]),
        "labels": torch.tensor([r["labels"] for r in rows]),
    }


@torch.no_grad()
def loss_of_rows(model):
    """Without dropout, whose noise hides in a step's loss what so few steps teach."""
    return model.eval()(**collate(list(map(Rows().__getitem__, range(len(Rows())))))).loss.item()


def trainer(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        num_train_epochs=2,
        save_steps=5,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(model, arguments, data_collator=collate, train_dataset=Rows())


@pytest.mark.slow
def test_trainer_and_resume(tmp_path):
    """The Trainer runs as on the stock model, and a resumed run ends as the whole one."""
    theirs = build("Bert", HEAD, hidden_dropout_prob=0.1)
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    again = copy.deepcopy(ours)
    start = copy.deepcopy(ours.state_dict())
    before = loss_of_rows(ours)
    run = trainer(ours, tmp_path / "ours", seed=3)
    run.train()
    assert run.state.global_step == 12 and not any(report.fallbacks.values())
    assert loss_of_rows(ours) < before
    resumed = trainer(again, tmp_path / "ours", seed=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-5"))
    for name, p in ours.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], p, rtol=0, atol=0)
    assert any(not torch.equal(p, start[n]) for n, p in ours.state_dict().items())
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours" / "checkpoint-12"
    )
    close_to_truth(logits(ours), logits(copy.deepcopy(loaded).double()), logits(loaded))

    # without dropout the two train alike, step by step
    theirs.config.hidden_dropout_prob = 0.0
    for m in theirs.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    ours = copy.deepcopy(theirs)
    bertfast.accelerate(ours)
    found = []
    for name, model in (("a", theirs), ("b", ours)):
        run = trainer(model, tmp_path / name, gradient_accumulation_steps=2)
        run.train()
        found.append([e["loss"] for e in run.state.log_history if "loss" in e])
    close_to_truth(*map(torch.tensor, found), floor=3e-4)  # the log rounds to 4 digits


def start(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)


def half(rank):
    return {name: t[2 * rank : 2 * rank + 2] for name, t in labelled().items()}


def close_to_one_process(found):
    """Gradients of the mean over both ranks' losses, as the stock model has them."""
    expected = []
    for dtype in (torch.float32, torch.float64):
        model = build("Bert", HEAD).to(dtype).train()
        loss = sum(model(**half(rank)).loss for rank in range(2)) / 2
        loss.backward()
        expected.append({n: p.grad for n, p in model.named_parameters()})
    close_gradients(found, *expected)


def ddp(rank, port):
    start(rank, port)
    model = build("Bert", HEAD).train()
    report = bertfast.accelerate(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(**half(rank)).loss.backward()
    close_to_one_process({n: p.grad for n, p in model.named_parameters()})
    assert not any(report.fallbacks.values()), report
    dist.destroy_process_group()


def fsdp2(rank, port):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, port)
    model = build("Bert", HEAD).train()
    report = bertfast.accelerate(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="before it is sharded"):
        bertfast.restore(model)
    for _ in range(2):
        model.zero_grad()
        model(**half(rank)).loss.backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    close_to_one_process(found)
    assert not any(report.fallbacks.values()), report.fallbacks
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("body", [ddp, fsdp2])
def test_two_ranks(body):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(body, (port,), nprocs=2)
