"""Who runs an encoder's layers, and forcing one."""

import copy
import json

import pytest
import torch
from families import build as stock
from families import inputs_for
from helpers import apart, close_to_truth, exact, refused
from native import batch, pair

import bertfast
from bertfast.cli import main
from bertfast.encoder import EXECUTORS
from bertfast.encoder.batch import Batch
from bertfast.encoder.run import choose


def layers_and_batch(dtype=torch.float32):
    _, ours = pair()
    ours = ours.to(dtype)
    starts = torch.tensor([0, 5, 9], dtype=torch.int32)
    return ours.encoder.describe(), Batch(torch.randn(9, 48).to(dtype), starts, 5)


def test_the_first_that_can():
    layers, given = layers_and_batch()
    choice = choose(layers, given)
    assert choice.name == "node" and choice.declined["whole_cpu"] == "gradients are enabled"
    assert str(choice).startswith("node; whole_cpu: gradients are enabled")
    with torch.no_grad():
        assert choose(layers, given) == ("whole_cpu", {})
        mixed = [layers[0], layers[1]._replace(spec=layers[1].spec._replace(eps=1.0))]
        assert "differ" in choose(mixed, given).declined["whole_cpu"]
        with bertfast.backend("reference"):
            assert choose(layers, given).name == "operators"


@pytest.mark.parametrize("name", [n for n in EXECUTORS if n != "whole_cuda"])
def test_forced(name, monkeypatch):
    """The same answer by each, forced by a block or by the environment."""
    theirs, ours = pair()
    given = batch()
    truth, real = exact(theirs, given).last_hidden_state, given["attention_mask"] == 1
    with torch.no_grad():
        with bertfast.executor(name):
            close_to_truth(ours(**given).last_hidden_state[real], truth[real])
        monkeypatch.setenv("BERTFAST_EXECUTOR", name)
        accelerated = copy.deepcopy(theirs)
        report = bertfast.accelerate(accelerated, strict=True)
        close_to_truth(accelerated(**given).last_hidden_state[real], truth[real])
    assert report.executors == {"encoder": name}


def test_forced_and_can_not(monkeypatch):
    _, ours = pair()
    with bertfast.executor("whole_cpu"):
        refused(RuntimeError, "'whole_cpu' can't .*gradients are enabled", ours, **batch())
    with torch.no_grad(), bertfast.executor("whole_cuda"):
        refused(RuntimeError, "'whole_cuda' can't .*on a GPU", ours, **batch())
    enter = lambda: bertfast.executor("fast").__enter__()
    refused(ValueError, "unknown executor 'fast'; expected one of whole_cpu", enter)
    monkeypatch.setenv("BERTFAST_EXECUTOR", "slow")
    refused(ValueError, "unknown executor 'slow'", ours, **batch())


def test_report_and_info(capsys):
    model = stock("Bert")
    report = bertfast.accelerate(model)
    assert report.executors == {"encoder": None}
    model(**inputs_for())
    assert "run by: node; whole_cpu: gradients are enabled" in str(report)
    model.encoder.layer[0].register_forward_hook(lambda *_: None)
    model.encoder.layer[1].attention.self.query.register_forward_hook(lambda *_: None)
    model(**inputs_for())
    assert report.executors["encoder"].startswith("node")
    assert report.fallbacks["encoder"].startswith("attention.self.query: it has a hook")
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["executors"].keys() == EXECUTORS.keys()


def test_pruned_heads_and_no_tokens():
    layers, given = layers_and_batch()
    with torch.no_grad():
        empty = given._replace(
            hidden=given.hidden[:0], cu_seqlens=torch.zeros(1, dtype=torch.int32)
        )
        for executor in EXECUTORS.values():
            if executor.limit(layers, empty) is None:
                assert executor.run(layers, empty).shape == (0, 48)
        few = layers[0].spec._replace(heads=2)
        w = layers[0].weights
        narrow = [p._replace(weight=p.weight[: few.width], bias=p.bias[: few.width]) for p in w[:3]]
        out = w.out._replace(weight=w.out.weight[:, : few.width])
        query, key, value = narrow
        layer = layers[0]._replace(
            spec=few, weights=w._replace(query=query, key=key, value=value, out=out)
        )
        declined = choose([layer], given)
        assert declined.name == "node" and declined.declined["whole_cpu"] == "heads were pruned"
        runs = [EXECUTORS[n].run([layer], given) for n in ("node", "operators")]
    assert apart(*runs) == 0
