"""One process or many: what the loop needs to know of the others, under torchrun."""

import os
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import distributed, nn

from .config import ConfigError

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a torch built without distributed
    DTensor = distribute_tensor = None

V = TypeVar("V")


def require_one_process(command: str) -> None:
    """ConfigError under torchrun, where each rank would do all of `command` and write its files."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise ConfigError(
            f"WORLD_SIZE is {world}, but {command} runs in one process: start it without torchrun "
            "(pretrain and finetune take several)"
        )


def join(device_type: str) -> None:
    """Join the other processes of torchrun or `accelerate launch`, where there are any.

    Each attempt after a lost rank has keys of its own in torchrun's store; with the shared ones
    (torch 2.13, `--standalone`) Gloo would look for the ranks of the attempt before.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or distributed.is_initialized():
        return
    store, rank, world = next(distributed.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"bertfast/{attempt}/{world}", store)
    backend = "gloo"
    if device_type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def leave() -> None:
    """Leave the others after a success. Gloo's threads may still hold tensors of Python's when the
    interpreter ends, and abort (pytorch/pytorch#190489); after a failure this could wait for
    them."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class Ranks:
    """This process's rank among `world`, and collectives that do nothing where it is alone.

    parallel: "ddp": every rank has all weights, and gradients are summed after a step's last
    micro-batch; "fsdp": FSDP2 shares them out, and every forward and backward is a meeting.
    """

    def __init__(self, parallel: str | None = "ddp") -> None:
        self.on = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if self.on else 0
        self.world = distributed.get_world_size() if self.on else 1
        self.sharded = self.world > 1 and parallel == "fsdp"
        self.reduces = self.world > 1 and not self.sharded

    def sum(self, *values: torch.Tensor) -> None:
        """The sums over all ranks, in place. Of tensors on a GPU the host doesn't wait for them."""
        if self.world > 1:
            for work in [distributed.all_reduce(v, async_op=True) for v in values]:
                work.wait()

    def agree(self, value: V) -> V:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: V) -> list:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        found = [None] * self.world
        distributed.all_gather_object(found, value)
        return found

    def share(self, group: list) -> list[tuple]:
        """(batch, 1.0) for each of this rank's; every rank gets equally many, filled up with
        (batch, 0.0), whose loss counts for nothing."""
        count = -(-len(group) // self.world)
        mine = [(b, 1.0) for b in group[self.rank :: self.world]]
        return mine + [(group[0], 0.0)] * (count - len(mine))

    def wrap(self, module: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
        """`module` with rank 0's parameters on every rank, or sharded, with a unit each layer."""
        if self.reduces:
            for p in module.parameters():
                distributed.broadcast(p.detach(), src=0)
        if not self.sharded:
            return module
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = next(module.parameters()).device
        mesh = init_device_mesh(device.type, (self.world,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        # Also the root: checkpoints find sharded parameters between steps.
        return fully_shard(module, mesh=mesh, reshard_after_forward=True)


def full(value: torch.Tensor) -> torch.Tensor:
    """A plain tensor of a sharded one; all ranks must ask together."""
    return value.full_tensor() if DTensor is not None and isinstance(value, DTensor) else value


def like(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A full tensor laid out as `p` is: on its device, sharded where it is."""
    value = value.to(p.device)
    if DTensor is not None and isinstance(p, DTensor):
        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    return value
