"""Metrics beside scikit-learn's own defaults, and logits in the order of their rows."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from bertfast.train import metrics
from bertfast.train.inference import compute_logits


def test_macro_is_over_the_classes_that_occur():
    targets, y = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 1, 0])
    logits = np.eye(6, dtype=np.float32)[y]  # classes 2, 4 and 5 are in neither
    found = metrics.full(logits, targets, "single_label", list("abcdef"), 0.5)
    macro, micro = (f1_score(targets, y, average=a, zero_division=0) for a in ("macro", "micro"))
    assert found["macro_f1"] == found["macro"]["f1"] == pytest.approx(macro)
    assert found["micro_f1"] == found["micro"]["f1"] == pytest.approx(micro) != macro
    assert found["per_class"]["c"]["support"] == 0 and found["loss"] == 0.5


def test_multi_label_takes_what_is_likelier_than_not():
    logits = np.array([[0.2, -0.2, 3.0], [-0.1, 0.4, -2.0]], np.float32)
    assert metrics.predicted(logits, "multi_label").tolist() == [[1, 0, 1], [0, 1, 0]]
    assert (metrics.probabilities(logits, "multi_label") > 0.5).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_logits_are_in_the_order_of_the_rows():
    """Whatever order of length they were computed in."""

    class Model:
        device, num_labels = torch.device("cpu"), 2

        def __call__(self, input_ids, attention_mask, token_type_ids):
            sums = (input_ids * attention_mask).sum(1).float()
            return type("Output", (), {"logits": torch.stack([sums, -sums], 1)})

    r = np.random.default_rng(0)
    rows = [{"input_ids": r.integers(1, 99, n).tolist()} for n in r.integers(1, 30, 50)]
    found = compute_logits(Model(), rows, pad=7, batch_size=8)
    assert found[:, 0].tolist() == [sum(row["input_ids"]) for row in rows]
