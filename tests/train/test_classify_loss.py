"""The loss of a classifier in training, beside PyTorch's."""

import pytest
import torch
from helpers import GPU, close_to_truth, exact
from tiny_classify import classification

from bertfast.data import collate


def test_class_weights_in_the_loss():
    """The mean as torch defines it: over the weights of the rows' classes."""
    model, task, _ = classification(dropout=0.0, class_weights={"a": 5.0, "c": 0.5})
    batch = task.load(range(16)).to(GPU)
    model = model.to(GPU)
    mean = task.loss(model, batch) / task.weight(task.load(range(16)))
    padded = collate([task.rows["train"][i] for i in range(16)], 0)
    labels = padded.pop("labels")
    logits = exact(model.cpu(), padded).logits
    weights = torch.tensor([5.0, 1.0, 0.5], dtype=torch.float64)
    close_to_truth(mean, torch.nn.functional.cross_entropy(logits, labels, weight=weights))


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_mean_of_flags_and_numbers(kind):
    model, task, _ = classification(task=kind, dropout=0.0)
    batch = task.load(range(16))
    mean = task.loss(model.to(GPU), batch.to(GPU)) / task.weight(batch)
    padded = collate([task.rows["train"][i] for i in range(16)], 0)
    labels = padded.pop("labels").double()
    logits = exact(model.cpu(), padded).logits
    if kind == "regression":
        truth = torch.nn.functional.mse_loss(logits[:, 0], labels)
    else:
        truth = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    close_to_truth(mean, truth)


def test_head_has_dropout_in_training_alone():
    model, task, _ = classification(dropout=0.0)
    model, batch = model.to(GPU), task.load(range(16)).to(GPU)
    model.dropout.p = 0.5
    draw = lambda seed: (torch.manual_seed(seed), task.loss(model, batch).item())[1]
    assert draw(0) == draw(0) != draw(1)
    model.eval()
    assert draw(0) == draw(1)
