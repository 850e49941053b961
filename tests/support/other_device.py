"""A device that is not there: tensors that say they are on `meta` and hold values, which the CPU computes with.

It shows on any machine what only a GPU would: an operation that meets tensors of two devices raises, as it does there,
and what reads values of the device goes on. `meta` stands for the GPU because torch neither guards nor initialises it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
TRANSFERS = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
"""Operations to which a GPU's tensor may come with one of the CPU; of indexing only the indices may be there."""

AT_ONCE = {torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default,
           torch.ops.aten._neg_view.default: torch.ops.aten.neg.default}
"""Below a dispatch nobody looks at the bits by which torch puts these off."""


class There(torch.Tensor):
    """A tensor on the other device; `values` are on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=DEVICE,
        )
        made.values_ = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        return _run(function, args, kwargs or {})

    def numpy(self) -> None:
        """Refused, as a GPU's tensor refuses it."""
        raise TypeError("a tensor of another device has no numpy array")

    def tolist(self) -> object:
        """Reading values is allowed; it waits for a GPU."""
        return self.values_.tolist()


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        return _run(function, args, kwargs or {})


class _Generator(torch.Generator):
    """Draws on the CPU, whatever device it was asked for."""

    def __new__(cls, device: torch.device | str | None = None) -> _Generator:
        return super().__new__(cls)


@contextlib.contextmanager
def other_device() -> Iterator[None]:
    """Within it, `device=DEVICE` makes tensors there."""
    with pytest.MonkeyPatch.context() as patch, _Factories():
        for name in ("tensor", "as_tensor"):  # they fill what they make below any dispatch
            patch.setattr(torch, name, _filled(getattr(torch, name)))
        patch.setattr(torch, "Generator", _Generator)
        yield


def bring(module: torch.nn.Module) -> None:
    """Move the parameters and buffers of `module` there, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not isinstance(value.detach(), There):
                part._parameters[name] = torch.nn.Parameter(There(value.detach()), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None and not isinstance(value, There):
                part._buffers[name] = There(value)


def carry(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` there."""
    return tensor if isinstance(tensor, There) else There(tensor)


def _run(function: Callable, args: tuple, kwargs: dict) -> object:
    function = AT_ONCE.get(function, function)
    name = function._schema.name
    _refuse_mixture(name, args, kwargs)
    is_there = any(isinstance(value, There) for value in tree_flatten((args, kwargs))[0])
    if kwargs.get("device") is not None:
        is_there = torch.device(kwargs["device"]) == DEVICE
    here = tree_map(_here, kwargs) | ({"pin_memory": False} if kwargs.get("pin_memory") else {})
    out = function(*tree_map(_here, args), **here)
    if function._schema.is_mutable and out is not None:  # what was written in place is the caller's own tensor
        return kwargs.get("out", args[0])
    if name == "aten::_local_scalar_dense" or not is_there:
        return out
    return tree_map(lambda value: There(value) if type(value) is torch.Tensor else value, out)


def _refuse_mixture(name: str, args: tuple, kwargs: dict) -> None:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = [value for value in tensors if isinstance(value, There)]
    if not there or name in TRANSFERS:
        return
    joins = name in ("aten::cat", "aten::stack")
    here = [value for value in tensors if not isinstance(value, There) and (value.dim() or joins)]
    if name in INDEXING and isinstance(args[0], There):
        return
    if here:
        shapes = [tuple(value.shape) for value in here]
        raise RuntimeError(f"{name} meets tensors of two devices; on the CPU are {shapes}")


def _here(value: object) -> object:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.values_ if isinstance(value, There) else value


def _filled(make: Callable) -> Callable:
    def made(data: object, *args: object, device: torch.device | str | None = None, **named: object) -> torch.Tensor:
        if isinstance(data, There):
            return data if device is None or torch.device(device) == DEVICE else data.to(device)
        values = make(data, *args, **named)
        return There(values) if device is not None and torch.device(device) == DEVICE else values

    return made
