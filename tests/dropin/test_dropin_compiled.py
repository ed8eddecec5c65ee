"""torch.compile over an accelerated model: the encoder runs as it does without, the rest compiled."""

import pytest
import torch
from padded import assert_same, labels, observe, padded, stock, three

import bertfast

pytestmark = pytest.mark.seconds
HEADS = {  # what becomes of the padded rows
    "Model": "as in the stock model",
    "ForSequenceClassification": "skipped",
    "ForTokenClassification": "as in the stock model",
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def told(report, model):
    """What the report says of a call under torch.compile; without one, it says the same."""
    with torch.no_grad():
        model(**padded())
    return report.padding, report.executors, report.fallbacks


def trained_alike(compiled, others, given):
    found = [observe(m, given, lambda output: output.loss) for m in (compiled, *others)]
    found[0] = {name.replace("_orig_mod.", ""): t for name, t in found[0].items()}
    assert_same(*found)


@pytest.mark.parametrize("head", HEADS)
def test_runs_as_uncompiled(head):
    models, report = three(stock("Bert", head))
    expected = told(report, models[0])
    assert all(text.startswith(HEADS[head]) for text in expected[0].values())
    compiled = torch.compile(models[0], backend="aot_eager")
    _, executors, fallbacks = told(report, compiled)
    assert executors == expected[1] and not any(fallbacks.values())
    assert all(text.startswith(HEADS[head]) for text in report.padding.values())
    for kind in ("right", "left"):
        given = padded(kind=kind)
        assert_same(*(observe(m, given) for m in (compiled, *models[1:])))
        if head != "Model":
            given |= labels(models[1], given)
            trained_alike(compiled, models[1:], given)


def test_a_graph_that_may_not_break():
    """It has the stock layers, and the report says so."""
    models, report = three(stock("Bert", "ForSequenceClassification"))
    given = padded() | labels(models[1], padded())
    whole = torch.compile(models[0], backend="aot_eager", fullgraph=True)
    assert_same(*(observe(m, given) for m in (whole, *models[1:])))
    trained_alike(whole, models[1:], given)
    assert all("may not break" in why for why in report.fallbacks.values())
    if hasattr(torch._dynamo, "error_on_graph_break"):
        torch.compiler.reset()
        with torch._dynamo.error_on_graph_break(True):
            torch.compile(models[0], backend="aot_eager")(**padded())


@pytest.mark.parametrize("whole", [False, True])
def test_native(whole):
    """Our operators are in a graph that may not break."""
    theirs = stock("Bert", "ForSequenceClassification")
    ours = bertfast.BertForSequenceClassification(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    operators = []

    def backend(graph, inputs):
        operators.extend(str(n.target) for n in graph.graph.nodes if "bertfast" in str(n.target))
        return graph

    compiled = torch.compile(ours, backend=backend, fullgraph=whole)
    models = compiled, theirs, stock("Bert", "ForSequenceClassification").double()
    models[2].load_state_dict(theirs.state_dict())
    assert_same(*(observe(m, padded()) for m in models))
    assert bool(operators) == whole
