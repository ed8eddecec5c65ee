"""An accelerated model's padded positions in training and in transformers' and peft's tools."""

import copy

import numpy as np
import pytest
import torch
import transformers
from padded import LENGTH, assert_same, every, labels, observe, padded, stock, three
from sentences import TEXTS

import bertfast

SEQUENCE = "ForSequenceClassification"


def compare(models, *args, **options):
    assert_same(*(observe(m, *args, **options) for m in models))


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification"])
def test_distillation(head):
    """A loss from logits at every position, the labels' own as well: none is -100."""
    models, _ = three(stock("Bert", head).train())
    given = padded()

    def loss(output):
        return torch.nn.functional.kl_div(
            output.logits.log_softmax(-1), targets.to(output.logits), reduction="sum"
        )

    with torch.no_grad():
        targets = models[1](**given).logits.roll(1, 0).softmax(-1)
    compare(models, given, loss)
    one = labels(models[1], given)
    where = (given["attention_mask"] == 0).nonzero()[0].tolist()
    one["labels"][tuple(where)] = 1  # a single label at padding
    compare(models, given | one, lambda output: output.loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", ["ForQuestionAnswering", SEQUENCE, "ForMaskedLM"])
def test_gradient_checkpointing(head, reentrant):
    models, _ = three(stock("Bert", head).train())
    given = padded() | labels(models[1], padded())
    models[0].gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(models, given, lambda output: output.loss)


@pytest.mark.parametrize(
    "head, task",
    [
        (SEQUENCE, "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
        ("Model", "FEATURE_EXTRACTION"),
    ],
)
def test_lora(head, task):
    peft = pytest.importorskip("peft")
    theirs = stock("Bert", head)
    models = [theirs, copy.deepcopy(theirs), copy.deepcopy(theirs)]
    bertfast.accelerate(models[0])
    for i, model in enumerate(models):
        torch.manual_seed(6)
        config = peft.LoraConfig(
            task_type=task,
            r=2,
            target_modules=["query", "value"],
            layers_to_transform=[1],
            init_lora_weights=False,
        )
        models[i] = peft.get_peft_model(model, config).train()
    models[2].double()
    given = padded()
    if head != "Model":
        given = given | labels(theirs, given, everywhere=True)
    compare(models, given, every if head == "Model" else lambda output: output.loss)


@pytest.mark.parametrize(
    "task, head",
    [
        ("feature-extraction", "Model"),
        ("fill-mask", "ForMaskedLM"),
        ("token-classification", "ForTokenClassification"),
    ],
)
def test_pipelines(task, head, saved):
    texts = [t + " [MASK]" * (task == "fill-mask") for t in TEXTS[:8]]
    seen = []
    for dtype in torch.float32, torch.float32, torch.float64:
        pipe = transformers.pipeline(task, model=saved("Bert", head), device="cpu", dtype=dtype)
        if not seen:
            assert bertfast.accelerate(pipe.model).fused == 2
        leaves = torch.utils._pytree.tree_leaves(pipe(texts, batch_size=4))
        numbers = [float(x) for x in leaves if isinstance(x, float | np.floating)]
        seen.append([{"numbers": torch.tensor(numbers, dtype=torch.float64)}, len(leaves)])
        seen[-1] += [x for x in leaves if isinstance(x, str | int)]
    assert seen[0][1:] == seen[1][1:]
    assert_same(*(s[0] for s in seen))


def test_trainer_predicts_at_every_position(tmp_path):
    """Trainer.predict gathers a token head's logits, padding and all."""
    theirs = stock("Bert", "ForTokenClassification")
    given = padded() | labels(theirs, padded())
    rows = [{k: v[i] for k, v in given.items()} for i in range(4)]
    ours = copy.deepcopy(theirs)
    bertfast.accelerate(ours)
    found = {}
    for name, model in (
        ("ours", ours),
        ("theirs", theirs),
        ("exact", copy.deepcopy(theirs).double()),
    ):
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True
        )
        predictions = transformers.Trainer(model, arguments).predict(rows).predictions
        assert predictions.shape == (4, LENGTH, 2)
        found[name] = {"logits": torch.as_tensor(predictions)}
    assert_same(*found.values())


@pytest.mark.seconds
@pytest.mark.parametrize(
    "head, lora", [("ForMaskedLM", False), ("ForTokenClassification", False), ("ForMaskedLM", True)]
)
def test_trainer_trains_alike(head, lora, tmp_path):
    """Masked labels, of which the trainer takes the loss alone, peft's models between or not."""
    (*models,), report = three(stock("Bert", head))
    given = padded() | labels(models[1], padded())
    if lora:
        peft = pytest.importorskip("peft")
        for i, model in enumerate(models):
            config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
            torch.manual_seed(6)
            models[i] = peft.get_peft_model(model, config).to(model.dtype)
    rows = [{k: v[i] for k, v in given.items()} for i in range(4)]
    seen = []
    for model in models:
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2, save_strategy="no",
            logging_steps=1, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        seen.append(
            {"losses": torch.tensor(losses)} | {n: p.detach() for n, p in model.named_parameters()}
        )
    assert_same(*seen)
    assert [*report.padding.values()] == ["skipped: nobody reads them"]
