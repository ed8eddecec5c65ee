"""Weights laid out once, for inference alone: on a CPU in the order of the kernels, in fp32, bf16
or int8; on a GPU in bf16 or fp16."""

from itertools import chain, groupby

import torch

from ..ops import registry
from ..ops.extension import C
from ..ops.library import CPU_DTYPES, is_bf16, plain, ptr, unwatched
from . import watch
from .batch import Batch, Relative
from .executors import whole_cuda
from .executors.whole_cpu import c_spec, even_limit, forward, positions_limit, relative_tables
from .noise import NOISE_LIMIT, Sample, complaints
from .replay import Graphs
from .run import Choice, forced
from .run import run as run_layers
from .spec import Layer, Unfit
from .watch import Seen
from .weights import addresses

PRECISIONS = ("fp32", "bf16", "int8")
CUDA_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Freezable:
    """Mixed into an encoder's class: what was read off its layers, and their graphs.
    `bertfast.freeze` takes the layers and sets `packed`."""

    LAYERS = "layer"  # where they are
    packed = None  # a `Packed`: the encoder's layers are gone
    bertfast_graphs: Graphs | None = None  # None: it is never replayed
    bertfast_seen: Seen | None = None  # what was read off the layers

    def read(self) -> list[Layer | Unfit]:
        """What kernels take in the layers' places, or why they can't."""
        raise NotImplementedError

    def path(self, name: str, *layer) -> str:
        """Of its layers, or of one, where `name` is the encoder's."""
        return ".".join(map(str, [*filter(None, (name, self.LAYERS)), *layer]))

    def sizes(self):
        """What `read` depends on besides the layers."""

    def describe(self) -> list[Layer | Unfit]:
        """`read`, asked at every forward: a model can change between two."""
        if self.bertfast_seen is None or torch.compiler.is_compiling():
            return self.read()
        return self.bertfast_seen.get(self.get_submodule(self.LAYERS), self.sizes(), self.read)

    def _save_to_state_dict(self, *args):
        if self.packed is not None:
            raise ValueError(
                "a frozen model can't be saved, its layers' weights are gone: save it before "
                "bertfast.freeze"
            )
        super()._save_to_state_dict(*args)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.bertfast_graphs = replica.bertfast_seen = None  # those are of other weights
        return replica

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.bertfast_graphs is not None:
            self.bertfast_graphs.look()
        return self


class Packed:
    """An encoder's layers for inference.

    size, count: the hidden size, and of how many layers. dtype: of the results. config: the
    model's.
    """

    choice: Choice

    def __init__(self, layers: list[Layer], precision: str, dtype, config):
        self.precision, self.dtype, self.config = precision, dtype, config
        self.size, self.count = layers[0].spec.hidden, len(layers)

    def run(self, batch: Batch, training: bool, collect=None, graphs=None):
        """[tokens or rows, hidden]; `collect(hidden)` sees each layer's; graphs: see `run.run`.

        Raises: RuntimeError in training mode, or where gradients are wanted.
        """
        if training or (torch.is_grad_enabled() and batch.hidden.requires_grad):
            raise RuntimeError(
                "a frozen model is for inference: call it in eval mode under "
                "torch.inference_mode(), or train the model before bertfast.freeze"
            )
        batch.check(self.size)
        if collect is None:
            return self._run(0, self.count, batch, graphs)
        hidden, rows = batch.hidden, batch.rows
        for i in range(self.count):
            hidden = self._run(i, i + 1, batch._replace(hidden=hidden, rows=None))
            collect(hidden)
        return hidden if rows is None else hidden[rows]

    def __reduce__(self):
        raise TypeError(
            "a frozen encoder can't be copied or pickled: copy the model before bertfast.freeze"
        )

    def __str__(self):
        return f"{self.count} layers, {self.precision}"


class PackedCpu(Packed):
    """On a CPU, for `whole_cpu`'s kernels.

    fp32: every product in fp32. bf16: weights and activations of products in bf16, sums, softmax,
    layer norm and the residual stream in fp32. int8: weights per output channel, activations in
    uint8 between the least and the largest of a token as they come (no calibration; fp32 without
    AVX2), after a layer norm before its bias is added, attention and its queries, keys and values
    in bf16. Where the processor has no bf16 dot product, bf16 weights are widened as they are read
    and attention is in fp32; int8 with AVX2 then projects queries, keys and values in int8 too.
    Without VNNI int8 weights are scaled so that no sum in 16 bits overflows. A layer that int8 puts
    too much noise into, for its outliers, stays in bf16: `noise` has each layer's in int8 and
    `least_cosine` the whole's, see noise.py.

    layers: are taken out of the list, so that each can be freed. center: [hidden], the bias of the
    LayerNorm before the first, or None. sample: for int8. relative: [buckets, hidden], the
    embeddings of relative positions, whose projections are kept; a call's then aren't looked at.
    """

    def __init__(
        self, layers, precision: str, dtype, config, center, sample: Sample | None, relative=None
    ):
        super().__init__(layers, precision, dtype, config)
        self.noise: list[float] = []
        self.choice = Choice(f"whole_cpu, frozen in {precision}", {})
        chosen, made, before = [], {}, None
        self._specs = [layer.spec for layer in layers]
        relative = None if relative is None else relative.detach().float()
        self._buckets = 0 if relative is None else len(relative)
        center = None if center is None else center.detach().float().clone()

        def packed(precision):
            key = precision, before, *map(id, layer.weights.present())
            if key not in made:  # else it runs several times
                made[key] = _PackedLayer(layer, precision, center, relative)
            return made[key]

        while layers:
            layer = layers.pop(0)
            found, weights = precision, packed(precision)
            if sample is not None:
                sample, noise = sample.through(layer, weights.encoder())
                self.noise.append(noise)
                if not noise <= NOISE_LIMIT:  # or NaN
                    found, weights = "bf16", packed("bf16")
            chosen.append((found, weights))
            center, before = weights.norm2[1], id(layer.weights.norm2.bias)
        self._keep, self._runs, first = [w for _, w in chosen], [], 0
        for _, group in groupby(chosen, key=lambda c: c[0]):
            weights = [w for _, w in group]
            last = first + len(weights)
            self._runs.append((first, last, weights[0].encoder(weights[1:])))
            first = last
        if sample is not None:
            self.least_cosine = sample.least_cosine(lambda batch: self._run(0, self.count, batch))

    @property
    def kept(self) -> list[int]:
        """The layers that stayed in bf16 where int8 was asked for."""
        return [i for i, noise in enumerate(self.noise) if not noise <= NOISE_LIMIT]

    def complaints(self) -> list[str]:
        """What int8 does to this model that its user should know."""
        return [*complaints(self.noise, self.kept, self.least_cosine)] if self.noise else []

    def __str__(self):
        return super().__str__() + (f", {len(self.kept)} in bf16" if self.kept else "")

    def _run(self, first, last, batch, graphs=None):
        why = even_limit(batch)
        if why:
            raise RuntimeError(f"a frozen encoder can't serve this call: {why}")
        why = positions_limit(self._specs[first:last], batch)
        if why is None and self._buckets:
            low, high = (int(n) for n in torch.aminmax(batch.relative.index))
            if low < 0 or high >= self._buckets:
                why = f"relative.index has {low} to {high}, of {self._buckets} embeddings"
        if why:
            raise ValueError(f"the frozen encoder can't take this call: {why}")
        for start, end, encoder in self._runs:
            a, b = max(first, start), min(last, end)
            if a < b:
                done = b == last  # between runs the residual stream stays in fp32
                dtype, given = self.dtype, batch
                if not done:
                    dtype, given = torch.float32, batch._replace(rows=None)
                batch = batch._replace(hidden=forward(encoder, a - start, b - start, given, dtype))
        return batch.hidden

    def texts(self, tables, eps, ids, mask, types):
        """A padded batch from its ids to its states by one call, for which Python's own time for
        packing, embedding and unpacking is a third of a short text's.

        Args:
            tables: the words', positions' and types' embeddings, their LayerNorm's weight and bias.
            eps: of that LayerNorm.
            ids, mask, types: int64 [batch, seqlen]; the last two may be None.

        Returns: [batch, seqlen, hidden], zeros at the padding; None where somebody watches the
        operators or the arguments are others, for the modules to take or refuse.

        Raises: IndexError for ids out of range.
        """
        words, positions, kinds = tables[:3]
        given = [t for t in (ids, mask, types) if t is not None]
        if not (
            len(self._runs) == 1
            and unwatched()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and registry.forced() in (None, "cpu")
            and words.dtype in CPU_DTYPES
            and all(
                type(t) is torch.Tensor
                and plain(t)
                and t.dtype == torch.int64
                and t.device.type == "cpu"
                and t.dim() == 2
                and t.shape == ids.shape
                and t.is_contiguous()
                for t in given
            )
            and ids.numel()
            and ids.shape[1] <= len(positions)
            and all(
                t.dtype == words.dtype
                and plain(t)
                and t.dim() == rank
                and t.shape[-1] == self.size
                and t.is_contiguous()
                for t, rank in zip(tables, (2, 2, 2, 1, 1), strict=True)
            )
        ):
            return None
        shape = (*ids.shape, self.size)
        x = torch.empty(shape, dtype=words.dtype, device="cpu")
        packed, states = (torch.empty(shape, dtype=self.dtype, device="cpu") for _ in range(2))
        self._runs[0][2].texts(
            *([t.data_ptr() for t in tables], is_bf16(words), eps, len(words), len(kinds)),
            *(ids.data_ptr(), *(0 if t is None else t.data_ptr() for t in (mask, types))),
            *(*ids.shape, x.data_ptr(), packed.data_ptr(), states.data_ptr(), is_bf16(states)),
        )
        return states


class _PackedLayer:
    """A layer's weights; `center` is the bias of the LayerNorm before it, `relative` the embeddings
    of relative positions."""

    def __init__(self, layer: Layer, precision: str, center, relative):
        spec, w, code = layer.spec, layer.apart(), PRECISIONS.index(precision)
        self.spec, self.precision = spec, code
        self.norm1, self.norm2 = (
            [None if p is None else p.detach().float().clone() for p in norm]
            for norm in (w.norm1, w.norm2)
        )
        self.tables = relative_tables(layer, relative) if spec.relative else []
        self.center = self.norm1[1] if spec.pre_norm else center
        behind = (self.norm2 if spec.pre_norm else self.norm1)[1]
        gate = (w.gate,) if spec.gated else ()
        self.matrices = {
            "qkv": _Matrices((w.query, w.key, w.value), C.qkv_precision(code), self.center),
            "out": _Matrices((w.out,), code),
            "up": _Matrices((w.up, *gate), code, behind, gated=spec.gated),
            "down": _Matrices((w.down,), code),
        }

    def encoder(self, others=()):
        """Of this layer and those behind it; whoever holds it must hold them."""
        layers = []
        for w in (self, *others):
            norm1, norm2 = (tuple(map(ptr, norm)) for norm in (w.norm1, w.norm2))
            pointers = {name: m.pointer for name, m in w.matrices.items()}
            layers.append(C.PackedLayer(**pointers, norm1=norm1, norm2=norm2))
        specs = [c_spec(w.spec) for w in (self, *others)]
        tables = [list(map(ptr, w.tables)) for w in (self, *others) if w.tables]
        return C.Encoder(specs, layers, self.precision, ptr(self.center), tables)


class _Matrices:
    """Linear layers side by side, or one and its gate; `pointer` is what C++ takes. In int8 they
    take their input less `center`, [in_features] or None."""

    def __init__(self, linears, precision: int, center=None, gated=False):
        parts = []
        for weight, bias in linears:
            weight = weight.detach().float().contiguous()
            bias = None if bias is None else bias.detach().float().contiguous()
            if center is not None and PRECISIONS[precision] == "int8":
                moved = weight @ center
                bias = moved if bias is None else bias + moved
            parts.append((weight, bias))
        given = [(ptr(w), ptr(b), len(w)) for w, b in parts], parts[0][0].shape[1], gated, precision
        self.storage = torch.empty(C.packed_bytes(*given) + 64, dtype=torch.uint8, device="cpu")
        self.pointer = -(-self.storage.data_ptr() // 64) * 64
        C.pack_weights(*given, self.pointer)


class PackedCuda(Packed):
    """Everything in bf16 or fp16. A few tokens take one call, more the layers one by one."""

    def __init__(self, layers, precision: str, dtype, config):
        super().__init__(layers, precision, dtype, config)
        self.low, self.device = CUDA_PRECISIONS[precision], layers[0].weights.query.weight.device
        flat = [layer.weights.present() for layer in layers]
        low = {p: p.detach().to(self.low).contiguous() for p in chain.from_iterable(flat)}
        self.layers = [
            layer._replace(weights=layer.weights.filled(map(low.get, own)))
            for layer, own in zip(layers, flat, strict=True)
        ]
        self.choice = Choice(f"frozen in {precision}", {})
        self._why_not_whole = whole_cuda.weights_limit(self.layers, self.low, self.device)
        self._addresses = addresses([layer.weights for layer in self.layers])

    def complaints(self) -> list[str]:
        return []

    def _run(self, first, last, batch, graphs=None):
        hidden = batch.hidden
        if hidden.device != self.device:
            raise RuntimeError(
                f"the input is on {hidden.device}, a frozen encoder stays on {self.device}: move "
                "the model before bertfast.freeze"
            )
        batch, spec = batch._replace(hidden=hidden.to(self.low)), self.layers[0].spec
        if batch.relative is not None:
            relative = batch.relative.embeddings.to(self.low), batch.relative.index
            batch = batch._replace(relative=Relative(*relative))
        found = None if graphs is None else graphs.run(self.layers, batch)
        if isinstance(found, tuple):
            hidden, self.choice = found
            return hidden.to(self.dtype)
        why = self._why_not_whole or watch.dispatch_limit(batch.hidden)
        why = why or whole_cuda.call_limit(spec, batch)
        if why is None and forced() in (None, "whole_cuda"):
            at = self._addresses.buffer_info()[0] + first * C.LAYER_BYTES
            hidden = whole_cuda.forward(spec, at, last - first, batch)
            self.choice = Choice("whole_cuda", {})
        else:
            hidden, self.choice = run_layers(self.layers[first:last], batch)
        return hidden.to(self.dtype)
