"""When a kernel may take a module's place: everything that would make its result another one.

All return why not, or None; they run at every forward, since a model can change between two.
"""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..ops import registry

_GLOBAL_HOOKS = [
    table
    for name, table in vars(torch_module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(table, dict)
]
# What transformers uses to collect hidden states. Its hooks stay after the first call that asked
# for them and do nothing without such a request; with one, the encoder gives padded tensors.
_COLLECTOR = "transformers.utils.output_capturing"
_OPERATORS = ("attention", "qkv_linear", "linear_act", "add_layer_norm", "gather_rows")


def hooked(m: nn.Module) -> bool:
    """Whether anyone but transformers' collector has a hook on this module."""
    own = m.__dict__
    forward, before = own["_forward_hooks"], own["_forward_pre_hooks"]
    backward, before_backward = own["_backward_hooks"], own["_backward_pre_hooks"]
    if not (forward or before or backward or before_backward):
        return False
    return any(map(_foreign, (forward, before, backward, before_backward)))


def _foreign(hooks) -> bool:
    return any(getattr(hook, "__module__", None) != _COLLECTOR for hook in hooks.values())


def untouched(m: nn.Module, expected: type) -> str | None:
    """Whether calling m would run `expected`'s forward and nothing else."""
    if type(m) is not expected:
        return f"it is a {type(m).__name__}, not a plain {expected.__name__}"
    own = m.__dict__
    if hooked(m) or "forward" in own or "_hf_hook" in own:
        return "it has a hook or a forward of its own"
    return None


def plain(m: nn.Module, expected: type) -> str | None:
    """Whether m is an nn.Linear or nn.LayerNorm whose parameters a kernel can read."""
    why = untouched(m, expected)
    if why:
        return why
    parameters = m._parameters
    for name in ("weight", "bias"):
        p = parameters.get(name)
        # A Parameter over a tensor subclass (DTensor, torchao's) has that subclass as its type.
        if type(p) is not nn.Parameter:
            return f"its {name} is {'missing' if p is None else f'a {type(p).__name__}'}"
        if p.is_meta:
            return f"its {name} is on the meta device"
    return None


def call_limit(hidden_states) -> str | None:
    """What in torch's state or in the input keeps an encoder's kernels from running."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "the model is being exported"
    if torch.compiler.is_compiling():
        return "torch.compile takes the stock layers"
    if any(_GLOBAL_HOOKS):
        return "there are global module hooks"
    if type(hidden_states) not in (torch.Tensor, nn.Parameter):
        return f"the hidden states are a {type(hidden_states).__name__}"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if registry.forced() is None and not all(registry.fast(o, device, dtype) for o in _OPERATORS):
        return f"no kernel serves {dtype} on {device}"
    return None


def asked(config, kwargs, name) -> bool:
    """Whether the call, or else the configuration, asks for an output."""
    value = kwargs.get(name)
    value = getattr(config, name, False) if value is None else value
    return value is not False and value is not None  # a list of layers counts, too


def key_mask(attention_mask, hidden_states):
    """The 0/1 mask [batch, seqlen] that transformers made `attention_mask` from.

    Returns (None, mask or None for no padding), or (why not, None) for a mask that is none of
    keys alone.
    """
    batch, seqlen = hidden_states.shape[:2]
    if attention_mask is None:
        return None, None
    if not isinstance(attention_mask, torch.Tensor):
        return f"the attention mask is a {type(attention_mask).__name__}", None
    if attention_mask.shape == (batch, seqlen):
        return None, attention_mask
    if attention_mask.shape != (batch, 1, seqlen, seqlen):
        return f"the attention mask has shape {list(attention_mask.shape)}", None
    keys = attention_mask[:, 0, 0]
    # SDPA's masks are expanded over the queries, so that no value needs comparing.
    expanded = attention_mask.stride(2) == 0
    if not expanded and not bool((attention_mask[:, 0] == keys[:, None]).all()):
        return "the attention mask differs between queries", None
    if keys.dtype == torch.bool:
        return None, keys
    if not keys.is_floating_point():
        return f"the attention mask is {keys.dtype}", None
    seen = keys == 0
    if not bool((seen | (keys <= torch.finfo(keys.dtype).min)).all()):
        return "the attention mask holds values other than 0 and the lowest", None
    return None, seen
