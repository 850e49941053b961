"""A model that is first names and shapes alone, and then gets its parameters one by one: all of them, or the parts of
one rank."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from ernie5.model.config import ModelConfig
from ernie5.model.init import SeededValues
from ernie5.model.interfaces import InitialValues


class OutlinedModel(nn.Module):
    """The abstract base of a model made from a ModelConfig. initial: what parameters on the meta device are given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.initial: InitialValues | None = None

    @classmethod
    def outline(cls, config: ModelConfig, *, seed: int) -> Self:
        """The model with its parameters on the meta device, for an engine that will hold a part of it
        (`parallel.apply`) or for a checkpoint to fill. Buffers are on the CPU, zero."""
        with torch.device("meta"):
            model = cls(config)
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))
        model.initial = SeededValues(config, seed=seed)
        return model

    def draw(self) -> Self:
        """Draw every parameter, whole, in fp32 on the CPU."""
        for name, parameter in list(self.named_parameters()):
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            self.initial.fill(values, name=name, shape=tuple(parameter.shape), kept=(None,) * parameter.dim())
            self.hold(name, values=values)
        return self

    def hold(self, name: str, *, values: torch.Tensor) -> None:
        """Make `values`, whole or a rank's part, the parameter called `name`."""
        path, _, attribute = name.rpartition(".")
        setattr(self.get_submodule(path), attribute, nn.Parameter(values))
