"""What people do to a model after (or before) `accelerate`: the result is as on the stock one."""

import copy
import warnings

import pytest
import torch
import transformers
from families import build, close_gradients, gradients, inputs_for, real, same_gradients
from helpers import close_to_truth, exact, wide
from torch import nn
from torch.nn.utils import prune

import bertfast.dropin  # registers the switch
from bertfast import ops

LAYER = "encoder.layer.1"


def pair(family="Bert", head="Model", **options):
    theirs = build(family, head, **options)
    ours = copy.deepcopy(theirs)
    return theirs, ours, bertfast.accelerate(ours)


@torch.no_grad()
def assert_same_outputs(ours, theirs, given=None):
    """Within the stock model's own error; it runs in fp64 in place, for not all of them can be copied."""
    given = given or inputs_for()
    found = [m(**given)[0] for m in (ours, theirs)]
    found.insert(1, theirs.double()(**wide(given))[0])
    theirs.float()
    close_to_truth(*(real(x, given["attention_mask"]) for x in found))


def both(change, theirs, ours):
    return [change(m) for m in (theirs, ours)]


@pytest.mark.parametrize(
    "path", [LAYER, "encoder.layer.0.intermediate", LAYER + ".output.dense", LAYER + ".attention"]
)
def test_hooks_see_and_change_what_they_always_did(path):
    theirs, ours, report = pair()
    given = inputs_for()
    seen = []

    def change(module, args, out):
        assert args[0].shape[:2] == given["attention_mask"].shape
        seen.append(real(out[0] if isinstance(out, tuple) else out, given["attention_mask"]))
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    hooks = both(lambda m: m.get_submodule(path).register_forward_hook(change), theirs, ours)
    assert_same_outputs(ours, theirs, given)
    close_to_truth(seen[0], seen[2], seen[1])
    for hook in hooks:
        hook.remove()
    assert_same_outputs(ours, theirs)
    assert not any(report.fallbacks.values())


def test_backward_hooks_see_what_they_always_saw():
    theirs, ours, report = pair()
    given, seen = inputs_for(), []
    mask = given["attention_mask"]
    for m in ours, copy.deepcopy(theirs).double(), theirs:
        for path in (LAYER, LAYER + ".intermediate.dense"):
            m.get_submodule(path).register_full_backward_hook(lambda _, gi, go: seen.append(go[0]))
        gradients(m, given, mask)
    for found in zip(seen[:2], seen[2:4], seen[4:], strict=True):
        close_to_truth(*(real(x, mask) for x in found))
    assert "intermediate.dense: it has a hook" in str(report)


def test_global_hooks_see_every_module():
    theirs, ours, report = pair()
    counts = []
    for m in theirs, ours:
        names = []
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, names=names: names.append(type(module).__name__)
        )
        m(**inputs_for())
        hook.remove()
        counts.append(names)
    assert counts[0] == counts[1] and "global" in str(report)


def test_a_forward_of_its_own():
    theirs, ours, report = pair()
    for m in theirs, ours:
        dense = m.get_submodule(LAYER + ".output.dense")
        dense.forward = lambda x, dense=dense: 3 * nn.functional.linear(x, dense.weight)
    assert_same_outputs(ours, theirs)
    assert report.fused == 1
    for m in theirs, ours:
        layer = m.get_submodule(LAYER)
        layer.forward = lambda hidden, *args, **kwargs: hidden - hidden.mean(1, keepdim=True)
    assert_same_outputs(ours, theirs)


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    theirs, ours, report = pair()
    accelerate.cpu_offload(ours, execution_device="cpu")
    assert_same_outputs(ours, theirs)
    assert report.fused == 0


def test_replaced_modules():
    class Attention(type(build("Bert").encoder.layer[0].attention.self)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return 2 * out[0], *out[1:]

    class Layer(nn.Module):
        def forward(self, hidden, *args, **kwargs):
            return hidden + 1

    theirs, ours, report = pair()
    for m in theirs, ours:
        m.encoder.layer[0].attention.self.__class__ = Attention
    assert_same_outputs(ours, theirs)
    assert report.fused == 1 and "Attention" in report.layers["encoder.layer.0"]
    for m in theirs, ours:
        m.encoder.layer[1] = Layer()
    assert_same_outputs(ours, theirs)
    assert "Layer is not a layer" in str(report)


def test_fewer_heads():
    theirs, ours, report = pair()
    for m in theirs, ours:
        torch.manual_seed(3)
        attention = m.encoder.layer[0].attention
        for name in ("query", "key", "value"):
            setattr(attention.self, name, nn.Linear(48, 32))
        attention.output.dense = nn.Linear(32, 48)
    assert_same_outputs(ours, theirs)
    assert not any(report.fallbacks.values())


def test_pruning():
    theirs, ours, report = pair()
    for name in ("weight", "bias"):
        both(
            lambda m, name=name: prune.l1_unstructured(
                m.get_submodule(LAYER + ".output.dense"), name, 0.5
            ),
            theirs,
            ours,
        )
    assert_same_outputs(ours, theirs)
    assert report.fused == 1
    for name in ("weight", "bias"):
        both(
            lambda m, name=name: prune.remove(m.get_submodule(LAYER + ".output.dense"), name),
            theirs,
            ours,
        )
    assert_same_outputs(ours, theirs)
    assert report.fused == 2 and not any(report.fallbacks.values())


def test_parametrized_weight():
    theirs, ours, report = pair()
    both(
        lambda m: nn.utils.parametrizations.weight_norm(m.get_submodule(LAYER + ".output.dense")),
        theirs,
        ours,
    )
    assert_same_outputs(ours, theirs)
    assert report.fused == 1


def test_dynamic_quantisation():
    theirs, ours, report = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = both(
            lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}), theirs, ours
        )
    given = inputs_for()
    found = [real(m(**given)[0], given["attention_mask"]) for m in quantised[::-1]]
    close_to_truth(*found)  # nothing of either is ours
    assert bertfast.accelerate(quantised[1]).fused == 0
    assert report.fused == 2  # the quantised one is a copy


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_without_a_kernel(dtype):
    theirs, ours, report = pair()
    both(lambda m: m.to(dtype), theirs, ours)
    given = inputs_for()

    def found():
        with torch.no_grad():
            return [real(m(**given)[0], given["attention_mask"]) for m in (ours, theirs)]

    close_to_truth(*found(), floor=0)
    assert f"no kernel serves {dtype}" in str(report)
    bertfast.accelerate(ours, backend="reference")
    if dtype == torch.float64:
        close_to_truth(*found(), floor=1e-13)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_bfloat16(how):
    theirs, ours, report = pair()
    given = inputs_for()
    mask = given["attention_mask"]
    truth = real(copy.deepcopy(theirs).double()(**given)[0], mask)
    if how == "bfloat16":
        both(lambda m: m.bfloat16(), theirs, ours)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = [m(**given)[0] for m in (theirs, ours)]
    assert found[0].dtype == found[1].dtype
    errors = [(real(t, mask).double() - truth).norm() / truth.norm() for t in found]
    assert errors[1] <= 2 * errors[0], errors
    assert not any(report.fallbacks.values())


def test_moved_weights_are_read_where_they_are():
    theirs, ours, report = pair()
    given = inputs_for()
    both(lambda m: m.bfloat16().float(), theirs, ours)
    assert_same_outputs(ours, theirs, given)
    for m in theirs, ours:
        for i, p in enumerate(m.parameters()):
            p.data = p.data.flip(0) if i % 2 else p.data.clone()
    assert_same_outputs(ours, theirs, given)
    state = {n: 0.5 * t for n, t in theirs.state_dict().items()}
    both(lambda m: m.load_state_dict(state, assign=True), theirs, ours)
    assert_same_outputs(ours, theirs, given)
    assert not any(report.fallbacks.values())
    assert "meta" in bertfast.accelerate(ours.to("meta")).layers["encoder.layer.0"]


def test_functional_call_and_transforms():
    theirs, ours, _ = pair()
    given = inputs_for()
    other = {n: 0.5 * p.detach() for n, p in theirs.named_parameters()}

    def loss(parameters, m):
        found = torch.func.functional_call(m, parameters, (), {**given})[0]
        return found.square().mean()

    other64 = {n: p.double() for n, p in other.items()}
    cases = (other, ours), (other64, copy.deepcopy(theirs).double()), (other, theirs)
    close_to_truth(*(loss(*case) for case in cases))
    given["attention_mask"] = None
    found, truth, stock = (torch.func.grad(loss)(*case) for case in cases)
    close_gradients(found, stock, truth)
    rows = torch.randn(3, 17, 48)
    close_to_truth(
        *(
            torch.func.vmap(lambda row, m=m: m(inputs_embeds=row[None])[0])(rows.to(m.dtype))
            for _, m in cases
        )
    )


def test_second_derivatives_raise():
    model = build("Bert")
    bertfast.accelerate(model)
    embedded = model.embeddings.word_embeddings(inputs_for()["input_ids"])
    out = model(inputs_embeds=embedded)[0].sum()
    (first,) = torch.autograd.grad(out, embedded, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.square().sum().backward()


@pytest.mark.seconds
def test_export():
    theirs, ours, _ = pair()
    given = inputs_for()
    order = (given["input_ids"], given["attention_mask"])
    program = torch.export.export(ours, (), given).module()
    assert_same_outputs(program, theirs, given)
    ours.config.return_dict = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, order, check_trace=False)
    with torch.no_grad():
        close_to_truth(traced(*order)[0], theirs(*order)[0])


VARIANTS = [
    (family, name)
    for family in ("Bert", "DistilBert", "MPNet")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
]


@pytest.mark.parametrize("family, name", VARIANTS)
def test_dropout_spreads_as_much_as_the_stock_models(family, name):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, name: 0.3}
    if family == "DistilBert":
        options = {"dropout": options["hidden_dropout_prob"],
                   "attention_dropout": options["attention_probs_dropout_prob"]}  # fmt: skip
    theirs, ours, report = pair(family, num_hidden_layers=1, **options)
    ids = inputs_for()["input_ids"][:1].repeat(400, 1)  # 400 draws of one sentence's masks
    spread = []
    for m in theirs, ours:
        torch.manual_seed(0)
        m.train().embeddings.dropout.p = 0.0
        with torch.no_grad():
            out = [m(input_ids=ids)[0] for _ in range(2)]
        assert not torch.equal(*out)
        spread.append(out[0].std(0).mean())
    assert 0.97 < spread[1] / spread[0] < 1.03, spread
    assert not any(report.fallbacks.values())


def test_monte_carlo_dropout():
    """Dropout modules in training mode inside a model in eval mode."""
    _, ours, report = pair(hidden_dropout_prob=0.3)
    for m in ours.modules():
        if isinstance(m, nn.Dropout):
            m.train()
    given = inputs_for()
    with torch.no_grad():
        assert not torch.equal(ours(**given)[0], ours(**given)[0])
    assert not any(report.fallbacks.values())


def test_attention_switch():
    for family in ("Bert", "Roberta", "DistilBert"):
        theirs = build(family)
        switched = build(family, attention="bertfast")
        for kind in ("right", "left", "holes", "row", "none"):
            given = inputs_for(kind=kind)
            assert_same_outputs(switched, theirs, given)
            mask = given["attention_mask"]
            same_gradients(gradients(switched, given, mask), theirs, given, mask)
    report = bertfast.accelerate(switched)
    assert_same_outputs(switched, theirs)
    assert not any(report.fallbacks.values())


def test_attention_switch_leaves_decoders_to_sdpa():
    decoder = {"is_decoder": True, "add_cross_attention": True}
    theirs, ours = (build("Bert", "LMHeadModel", a, **decoder) for a in ("sdpa", "bertfast"))
    given = inputs_for()
    torch.manual_seed(0)
    for length in (17, 9):  # as many keys as queries, and fewer
        given |= {
            "encoder_hidden_states": torch.randn(4, length, 48),
            "encoder_attention_mask": inputs_for(kind="left")["attention_mask"][:, -length:],
        }
        given["encoder_attention_mask"][:, -1] = 1
        assert_same_outputs(ours, theirs, given)


def test_attention_switch_by_from_pretrained(tmp_path):
    theirs = build("Bert")
    theirs.save_pretrained(tmp_path)
    ours = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="bertfast")
    assert ours.config._attn_implementation == "bertfast"
    assert_same_outputs(ours.eval(), theirs)


@pytest.mark.parametrize("family", ["ModernBert", "NomicBert", "Gte", "EuroBert"])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "none"])
def test_attention_switch_with_windows_and_shared_keys(family, kind, monkeypatch):
    theirs, ours = (build(family, attention=a) for a in ("sdpa", "bertfast"))
    given, seen, attention = inputs_for(kind=kind), [], ops.attention

    def spied(*args, **options):
        seen.append(options["window"])
        return attention(*args, **options)

    monkeypatch.setattr(ops, "attention", spied)
    with torch.no_grad():
        found = [m(**given)[0] for m in (ours, theirs)]
    close_to_truth(
        *(real(t, given["attention_mask"]) for t in (found[0], exact(theirs, given)[0], found[1]))
    )
    assert seen == [None, 3 if family == "ModernBert" else None]
