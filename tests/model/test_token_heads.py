"""BERT's heads on every token beside transformers'."""

import pytest
import torch
import transformers
from helpers import refused

import bertfast

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 16, "initializer_range": 0.2}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEADS = ("TokenClassification", "QuestionAnswering")


def pair(head, folder):
    """(transformers' model, ours with its weights)"""
    config = transformers.BertConfig(**SIZES, num_labels=5 if head == HEADS[0] else 2)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"BertFor{head}")(config)
    theirs.save_pretrained(folder)
    return theirs, getattr(bertfast, f"BertFor{head}").from_pretrained(folder)


def inputs(head, lengths):
    g, longest = torch.Generator().manual_seed(1), max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 40, mask.shape, generator=g)
    given = {"input_ids": ids, "attention_mask": mask}
    if head == HEADS[0]:
        labels = torch.randint(0, 5, mask.shape, generator=g)
        return given | {"labels": torch.where((mask == 1) & (ids % 3 > 0), labels, -100)}
    places = torch.tensor([[3], [longest + 4], [0]])  # the second is beyond its row
    return given | {"start_positions": places[: len(ids)], "end_positions": places[: len(ids)]}


@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_transformers(head, tmp_path):
    theirs, ours = pair(head, tmp_path)
    # Their softmax of a question runs over padding, too.
    given = inputs(head, [9, 4, 1] if head == HEADS[0] else [9, 9, 9])
    truth = theirs.double()(**given)
    found = ours.train()(**given)
    assert found.keys() == truth.keys()
    torch.testing.assert_close(found.loss.double(), truth.loss, rtol=1e-5, atol=0)
    real = given["attention_mask"] == 1
    for name in truth.keys() - {"loss"}:
        torch.testing.assert_close(found[name][real].double(), truth[name][real], rtol=1e-4,
                                   atol=1e-5)  # fmt: skip
    found.loss.backward()
    truth.loss.backward()
    for name, p in theirs.named_parameters():
        error = (ours.get_parameter(name).grad.double() - p.grad).norm()
        assert error <= 1e-4 * p.grad.norm() + 1e-6, name
    ours.save_pretrained(tmp_path / "saved")
    again = type(theirs).from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], p) for name, p in ours.state_dict().items())


def test_a_questions_padding_has_no_share(tmp_path):
    _, ours = pair(HEADS[1], tmp_path)
    given = inputs(HEADS[1], [9, 4])
    given |= {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([8, 3])}
    alone = [
        ours(
            **{k: v[i : i + 1, :n] if v.dim() > 1 else v[i : i + 1] for k, v in given.items()}
        ).loss
        for i, n in enumerate((9, 4))
    ]
    torch.testing.assert_close(ours(**given).loss, sum(alone) / 2)


def test_labels_of_another_shape_are_refused(tmp_path):
    _, ours = pair(HEADS[0], tmp_path)
    given = inputs(HEADS[0], [9, 4, 1])
    text = r"labels has shape \[3, 8\], expected \[3, 9\]"
    refused(ValueError, text, ours, **given | {"labels": given["labels"][:, 1:]})
