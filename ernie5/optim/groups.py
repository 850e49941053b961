"""Which parameters decay, and which of them Muon may orthogonalise.

Decided by what a parameter is, with the order of rules as documented in the README: vectors never decay; everything
of two or more dimensions does, embeddings included.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """A named set of parameters with one weight decay. names[i] belongs to parameters[i]."""

    name: str
    names: tuple[str, ...]
    parameters: tuple[torch.nn.Parameter, ...]
    weight_decay: float
    is_matrix: bool


def is_hidden_matrix(name: str, *, parameter: torch.nn.Parameter) -> bool:
    """True for what Muon handles: matrices (or stacks of them) between hidden layers, not embeddings or heads."""
    outside = any(word in name for word in ("embedding", "embed", "head", "router", "table"))
    return parameter.dim() in (2, 3) and not outside


def build_groups(model: torch.nn.Module, *, weight_decay: float, split_matrices: bool = False) -> list[ParameterGroup]:
    """Partition the trainable parameters of `model`; empty groups are left out.

    split_matrices: put hidden matrices into a group of their own, for Muon.
    """
    sorted_out: dict[str, list[tuple[str, torch.nn.Parameter]]] = {"matrix": [], "decay": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            sorted_out["plain"].append((name, parameter))
        elif split_matrices and is_hidden_matrix(name, parameter=parameter):
            sorted_out["matrix"].append((name, parameter))
        else:
            sorted_out["decay"].append((name, parameter))
    return [
        ParameterGroup(
            name=key,
            names=tuple(name for name, _ in members),
            parameters=tuple(parameter for _, parameter in members),
            weight_decay=0.0 if key == "plain" else weight_decay,
            is_matrix=key == "matrix",
        )
        for key, members in sorted_out.items()
        if members
    ]
