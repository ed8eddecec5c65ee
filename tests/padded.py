"""Padded batches, everything that can be read of a call on one, and its comparison with stock's."""

import copy
import inspect

import torch
import torch.utils._pytree as pytree
from families import build, inputs_for

import bertfast

KINDS = ("right", "left", "holes")  # of padding: column 0 is padded on the left alone
LENGTH = 17


def padded(head="Model", kind="right"):
    """Four sequences, the first without padding; behind the holes stand ids like any other."""
    given = inputs_for(kind=kind)
    if kind == "holes":
        given["attention_mask"][0] = 1
        g = torch.Generator().manual_seed(2)
        given["input_ids"] = torch.randint(5, 90, (4, LENGTH), generator=g)
    if head == "ForMultipleChoice":
        given = {k: v.view(2, 2, LENGTH) for k, v in given.items()}
    return given


def stock(family, head="Model", **options):
    """A model without any dropout, heads' own rates included."""
    model = build(family, head, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def labels(model, given, everywhere=False):
    """Labels under the names that the head has, -100 at padding unless `everywhere`."""
    g = torch.Generator().manual_seed(3)
    mask = given["attention_mask"].flatten(0, -2)
    with torch.no_grad():
        logits = model(**given)[0]
    if logits.dim() == 3:  # a class for each token
        tokens = torch.randint(logits.shape[2], mask.shape, generator=g)
        classes = tokens if everywhere else torch.where(mask == 1, tokens, -100)
    elif logits.shape == mask.shape:  # ELECTRA's discriminator masks its loss itself
        classes = torch.randint(2, mask.shape, generator=g)
    else:
        classes = torch.randint(logits.shape[1], logits.shape[:1], generator=g)
    places = torch.ones_like(mask) if everywhere else mask
    known = {
        "labels": classes,
        "next_sentence_label": torch.randint(2, (len(mask),), generator=g),
        "sentence_order_label": torch.randint(2, (len(mask),), generator=g),
        "start_positions": torch.multinomial(places.float(), 1, generator=g).squeeze(1),
        "end_positions": torch.multinomial(places.float(), 1, generator=g).squeeze(1),
    }
    wanted = [
        n for n in inspect.signature(model.forward).parameters if "label" in n or "positions" in n
    ]
    assert set(wanted) <= known.keys(), f"{type(model).__name__} takes {wanted}: add them here"
    return {name: known[name] for name in wanted}


def embedded(model, given):
    """The same with embeddings in place of ids."""
    ids = given["input_ids"]
    g = torch.Generator().manual_seed(4)
    width = model.get_input_embeddings().embedding_dim
    rest = {k: v for k, v in given.items() if k != "input_ids"}
    return rest | {"inputs_embeds": torch.randn(*ids.shape, width, generator=g)}


def flat(name, value):
    """name -> tensor, of nested outputs."""
    if isinstance(value, torch.Tensor):
        return {name: value.detach().clone()}
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {}
    return {k: t for part, v in parts for k, t in flat(f"{name}.{part}".lstrip("."), v).items()}


def every(output):
    """A loss that reads every value at every position."""
    tensors = [t for t in pytree.tree_leaves(dict(output)) if isinstance(t, torch.Tensor)]
    return sum(
        (t.tanh().square() * (1 + torch.arange(t.numel()) % 7).view_as(t)).sum() for t in tensors
    )


def gradients(model, loss, **more):
    """The loss and its gradients of the model's parameters and `more` leaves, by name."""
    model.zero_grad()
    loss.backward()
    leaves = dict(model.named_parameters()) | more
    grads = {f"gradient of {n}": p.grad for n, p in leaves.items() if p.grad is not None}
    return {"the loss": loss.detach()} | grads


def observe(model, given, loss=None):
    """What a call gives: outputs by name; with `loss`, of the output, also gradients."""
    given, more = dict(given), {}
    if "inputs_embeds" in given:
        wide = given["inputs_embeds"].to(next(model.parameters()).dtype).detach().clone()
        given["inputs_embeds"] = more["inputs_embeds"] = wide.requires_grad_(loss is not None)
    with torch.set_grad_enabled(loss is not None):
        output = model(**given)
    seen = flat("", dict(output))
    return seen if loss is None else seen | gradients(model, loss(output), **more)


def assert_same(ours, theirs, exact):
    """Each tensor within 4 times the rounding of stock in fp32, and a floor of 1e-5 relative.

    A gradient that is rounding alone (cancelling parts) is held to the size of all of them.
    """
    assert ours.keys() == theirs.keys() == exact.keys(), ours.keys() ^ theirs.keys()
    grads = [t.norm() for name, t in exact.items() if name.startswith("gradient")]
    whole = torch.stack(grads).norm().item() if grads else 0.0
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        if not truth.is_floating_point():
            assert torch.equal(ours[name], truth), name
            continue
        error = (ours[name].double() - truth).norm().item()
        rounding = (theirs[name].double() - truth).norm().item()
        floor = 1e-5 * truth.norm().item() + 1e-6 * whole * name.startswith("gradient")
        assert error <= 4 * rounding + floor, f"{name}: error {error:.2e}, stock's {rounding:.2e}"


def three(theirs, **options):
    """An accelerated copy, the stock model, its copy in fp64; and the report."""
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours, **options)
    return (ours, theirs, copy.deepcopy(theirs).double()), report


def assert_told(report):
    """The report says of each encoder what became of its padded rows."""
    assert report.padding and all(isinstance(w, str) and w for w in report.padding.values())
