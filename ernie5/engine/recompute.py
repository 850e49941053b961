"""Activations that are not kept on the device until backward: computed again, or moved to the host's memory.

A *part* of the model (a layer, its attention with the norm before it, its experts, its feed-forward) keeps what its
inputs are and nothing else; when backward reaches it, it runs again. The graph is that of the first run, so gradients
are the same bit for bit, arrive in the same order, and nothing that the first run returned (losses, loads, choices) is
touched by the second. Random numbers are drawn again from the same state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ernie5.engine.config import EngineConfig
from ernie5.model.block import DenseBlock, MoEBlock
from ernie5.model.interfaces import Parcels
from ernie5.model.moe.layer import MoELayer

EXPERTS = "experts"


def install_recompute(model: torch.nn.Module, *, engine: EngineConfig, device: torch.device) -> None:
    """Exchange the parts that `engine` names for forms that repeat or move their activations. After the layout has been
    applied, so that the collectives of a part are repeated with it. Raises ConfigError for what cannot be done here.
    """
    engine.check_device(device.type)
    for name in engine.recomputed_parts:
        repeat_part(model, name=name)
    for name in engine.offload_activations:
        offload_part(model, name=name, is_moved=lambda tensor: tensor.device.type != "cpu")


def repeat_part(model: torch.nn.Module, *, name: str) -> None:
    """Let every part of `model` called `name` run again in backward."""
    made = RepeatedExperts if name == EXPERTS else Repeated
    for owner, attribute in find_parts(model, name=name):
        setattr(owner, attribute, made(getattr(owner, attribute)))


def offload_part(model: torch.nn.Module, *, name: str, is_moved: Callable[[torch.Tensor], bool]) -> None:
    """Let what every part called `name` keeps for backward wait in the host's memory; weights stay where they are."""
    for owner, attribute in find_parts(model, name=name):
        setattr(owner, attribute, Offloaded(getattr(owner, attribute), is_moved=is_moved))


def find_parts(model: torch.nn.Module, *, name: str) -> Iterator[tuple[torch.nn.Module, str]]:
    """(owner, attribute) of every callable of `model` that is a part of that name."""
    for module in model.modules():
        is_block = isinstance(module, DenseBlock | MoEBlock)
        if name == "layers" and is_block:
            yield module, "forward"
        elif name == "attention" and is_block:
            yield module, "attend"
        elif name == "feed_forward" and isinstance(module, DenseBlock):
            yield module, "feed_forward"
        elif name == "feed_forward" and isinstance(module, MoELayer) and module.shared is not None:
            yield module, "run_shared"
        elif name == EXPERTS and isinstance(module, MoELayer):
            yield module, "run_experts"


class Repeated:
    """A part that keeps its arguments alone.

    Its second run starts when backward reaches its result and ends at its last operation, on every rank: a rank
    whose experts got no token would else start later or stop earlier, and its collectives meet those of other ranks
    out of order.
    """

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args: object, **named: object) -> object:
        """As the part itself; without gradients nothing is kept anyway."""
        if not torch.is_grad_enabled():
            return self._function(*args, **named)
        return self._repeat(*args, **named)

    def _repeat(self, *args: object, **named: object) -> object:
        """Run now, and again in backward; tensors are found among `args`."""
        return checkpoint(self._run, *args, use_reentrant=False, **named)

    def _run(self, *args: object, **named: object) -> object:
        out = self._function(*args, **named)
        return (_Last.apply(out[0]), *out[1:]) if isinstance(out, tuple) else _Last.apply(out)


class RepeatedExperts(Repeated):
    """The experts of one rank; the tensors of the parcels are passed one by one, so that they are found and moved."""

    def _repeat(self, parcels: Parcels) -> torch.Tensor:
        """Parcels of this rank -> outputs [M, D]."""
        return super()._repeat(parcels.rows, parcels.ids, parcels.weights, parcels)

    def _run(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, parcels: Parcels) -> torch.Tensor:
        return super()._run(dataclasses.replace(parcels, rows=rows, ids=ids, weights=weights))


class Offloaded:
    """A part whose saved tensors wait in the host's memory; both copies are ordered by the device's stream."""

    def __init__(self, function: Callable, *, is_moved: Callable[[torch.Tensor], bool]) -> None:
        self._function, self._is_moved = function, is_moved

    def __call__(self, *args: object, **named: object) -> object:
        """As the part itself."""
        with saved_tensors_hooks(self._pack, _unpack):
            return self._function(*args, **named)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.device]:
        if isinstance(tensor, torch.nn.Parameter) or not self._is_moved(tensor):
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True), tensor.device


def _unpack(kept: torch.Tensor | tuple[torch.Tensor, torch.device]) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept[0].to(kept[1], non_blocking=True)


class _Last(torch.autograd.Function):
    """The last node of a part: first in backward, where it asks for what it saved and so starts the second run."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        _ = ctx.saved_tensors
        return grad
