"""The clipped gradients of a batch's examples, summed: one forward and one backward through the
kernels that training uses, and for the norms two small products more a matrix and example."""

from collections.abc import Callable

import torch
from torch import nn

from ...encoder import Batch, Layer
from ...encoder import layer as arithmetic
from ...encoder.executors import node
from ...encoder.spec import of_layer
from ...encoder.weights import LayerWeights
from ...families.family import rate
from ...model import BertForSequenceClassification
from ...ops.library import call
from ..config import ConfigError
from ..packed import Packed
from .examples import Kernels, Lookup, Segments, Vector


def check(model: nn.Module) -> None:
    """ConfigError for a model whose examples' gradients aren't known here."""
    if type(model) is not BertForSequenceClassification:
        raise ConfigError(
            f"dp_epsilon is given, and the model is a {type(model).__name__}: private training "
            "takes BERT (model_type bert) alone"
        )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(names) < sum(p.requires_grad for _, p in model.named_parameters(remove_duplicate=False)):
        raise ConfigError("dp_epsilon is given, and the model has parameters that it shares")
    if model.bert.embeddings.tables() is None:
        raise ConfigError("dp_epsilon is given, and the embeddings are not as BERT's")
    for layer in model.bert.encoder.describe():
        if not isinstance(layer, Layer) or not layer.spec.like_bert or layer.adapters:
            raise ConfigError(f"dp_epsilon is given, and a layer is not as BERT's: {layer}")


@torch.no_grad()
def clipped(
    model: nn.Module, batch: Packed, losses: Callable[..., torch.Tensor], clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds to each trained parameter's `.grad` the sum of the examples' gradients, each over all
    trained parameters scaled to a norm of at most `clip`.

    Args:
        model: one that `check` lets pass.
        losses: `(logits [examples, outputs], targets) -> [examples]`, each of its own row alone.

    Returns: the losses [examples], and the gradients' norms before clipping, fp64 [examples].
    """
    walk = _Walk(model, batch)
    hidden = walk.embedded()
    for i in range(len(walk.layers)):
        hidden = walk.layer(i, hidden)
    grad, found = walk.head(hidden, losses)
    while walk.states:
        grad = walk.back(grad)
    if walk.tables[0].requires_grad:
        walk.embeddings_back(grad)
    norms = walk.kernels.squares.sqrt()
    weights = (clip / (norms + 1e-6)).clamp(max=1.0).to(hidden.dtype)  # Opacus' 1e-6
    own = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    seen = [id(p) for p, _ in walk.found]
    if sorted(seen) != sorted(own):
        lost = [name for key, name in own.items() if key not in seen] or ["some"]
        raise RuntimeError(f"no norms by example of {', '.join(lost)}: not trained privately")
    while walk.found:  # each frees its rows
        p, part = walk.found.pop()
        part.add_to(p, weights)
    return found, norms


class _Walk:
    """Forward through a model, and back."""

    def __init__(self, model, batch: Packed):
        self.model, self.batch, bert = model, batch, model.bert
        self.layers = bert.encoder.describe()
        self.trained = [layer.weights.query.weight.requires_grad for layer in self.layers]
        device = batch.input_ids.device
        self.seeds = bert._seeds(device)
        self.tables = bert.embeddings.tables()
        spec, dtype = self.layers[0].spec, self.tables[0].dtype
        sizes = spec.hidden, spec.head_dim
        self.k = node._kernels(device.type, dtype, node.registry.forced(), *sizes)
        self.tokens = Segments(batch.cu_seqlens)
        self.firsts = Segments(torch.arange(self.tokens.count + 1, device=device))
        self.kernels = Kernels(self.k, [self.tokens, self.firsts], spec.eps)
        self.states, self.found = [], []  # of layers; (parameter, its gradients)

    def embedded(self):
        ids = self.batch.input_ids, self.batch.position_ids, self.batch.token_type_ids
        embeddings, (word, *rest) = self.model.bert.embeddings, self.tables
        p = rate(embeddings.dropout)
        call_of = word, *ids, *rest, embeddings.LayerNorm.eps, p, self.seeds[0] if p else None
        return call("embedding_layer_norm", *call_of)[0]

    def layer(self, i: int, hidden):
        layer, own = self.layers[i], of_layer(self.seeds[1:], i)
        drops = arithmetic.seeds_of(layer, own, hidden.device)
        rows = self.batch.first if i + 1 == len(self.layers) else None
        call_of = self.k, layer, self._batch(hidden), hidden, drops, rows
        y, saved = arithmetic.forward(*call_of, save=self.trained[i])
        if self.trained[i]:
            self.states.append((i, hidden, saved, drops, rows))
        return y

    def _batch(self, hidden):
        return Batch(hidden, self.batch.cu_seqlens, self.batch.max_seqlen)

    def head(self, hidden, losses):
        """The gradient of hidden [examples, hidden], and the losses."""
        model, dense = self.model, self.model.bert.pooler.dense
        with torch.enable_grad():
            first = hidden.requires_grad_()
            z = dense(first)
            pooled = model.dropout(model.bert.pooler.activation(z))
            logits = model.classifier(pooled)
            found = losses(logits, self.batch.targets)
            dlogits, dz, grad = torch.autograd.grad(found.sum(), (logits, z, first))
        for linear, x, g in ((model.classifier, pooled, dlogits), (dense, first, dz)):
            self._take(linear.weight, self.kernels.product(x.detach(), g))
            self._take(linear.bias, Vector(g.clone()))  # a product's grad is overwritten
        return grad, found.detach()

    def _take(self, p, gradients):
        self.found.append((p, self.kernels.counted(gradients)))

    def back(self, grad):
        """Through the last layer that is left."""
        i, hidden, saved, drops, rows = self.states.pop()
        spec, weights, rates, *_ = self.layers[i]
        through = bool(self.states) or self.tables[0].requires_grad
        needs = LayerWeights.of([p is not None for p in weights.flat()])
        grad, _, *found = arithmetic.backward(
            *(self.kernels, spec, weights, self._batch(hidden), (rates, drops), rows, saved),
            *(hidden, grad, (through, False, needs), 0),
        )
        both = zip(weights.flat(), found, strict=True)
        self.found += [(p, g) for p, g in both if p is not None]
        return grad

    def embeddings_back(self, grad):
        embeddings, (*tables, weight, bias) = self.model.bert.embeddings, self.tables
        p, norm = rate(embeddings.dropout), self.k.add_layer_norm
        if p:  # dropout's own backward is dropout
            grad = norm(grad, None, None, None, 0.0, None, p, self.seeds[0], False)[0]
        ids = self.batch.input_ids, self.batch.position_ids, self.batch.token_type_ids
        total = sum(table[own] for table, own in zip(tables, ids, strict=True))
        own = total, None, weight, bias, embeddings.LayerNorm.eps
        _, mean, rstd = norm(*own, None, 0.0, None, False)
        ds, _, dweight, dbias, _ = self.kernels.add_layer_norm_backward(
            grad, total, None, weight, mean, rstd, None, 0.0, None, False
        )
        self.found += [(weight, dweight), (bias, dbias)]
        for table, own in zip(tables, ids, strict=True):
            self._take(table, Lookup(own, ds, self.tokens, len(table)))
