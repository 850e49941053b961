"""Which parameters decay, and which of them Muon may orthogonalise.

Decided by what a parameter is, with the order of rules as documented in the README: vectors never decay; everything
of two or more dimensions does, embeddings included.
"""

from __future__ import annotations

import dataclasses
import fnmatch

import torch

NOT_HIDDEN = (
    ("embedding.text.weight", "a table of ids"),
    ("embedding.cells.*", "bits and scale ids enter here"),
    ("embedding.audio.*", "codes and speakers enter here"),
    ("embedding.vision.vit.patch.weight", "pixels enter here"),
    ("embedding.vision.cnn.weight", "tokenizer features enter here"),
    ("embedding.vision.*_merger.slots", "a table of slots"),
    ("layers.*.moe.router.weight", "scores of experts leave here"),
    ("text_head.weight", "logits leave here"),
    ("bit_head.weight", "logits leave here"),
    ("audio_head.*", "logits leave here, and a table of target codes"),
)
"""Matrices that are no map between hidden layers: pattern of the name, and why."""

FUSED = (("*.gate_up", 2), ("*.gate_up.weight", 2))
"""Matrices that stand on top of one another in a single parameter: pattern of the name, how many."""

GROUP_KINDS = ("matrix", "decay", "plain")
"""Names of groups: hidden matrices (for Muon), what else decays, vectors."""


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """A named set of parameters with one weight decay. names[i] belongs to parameters[i]; fused[i] matrices are
    stacked along its rows."""

    name: str
    names: tuple[str, ...]
    parameters: tuple[torch.nn.Parameter, ...]
    weight_decay: float
    is_matrix: bool

    @property
    def fused(self) -> tuple[int, ...]:
        """How many matrices each parameter holds, one above the other (experts not counted)."""
        return tuple(count_fused(name) for name in self.names)


def is_hidden_matrix(name: str, *, parameter: torch.nn.Parameter) -> bool:
    """True for what Muon handles: matrices (or stacks of them) between hidden layers, all but those of NOT_HIDDEN."""
    return parameter.dim() in (2, 3) and not any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in NOT_HIDDEN)


def count_fused(name: str) -> int:
    """Matrices that the parameter called `name` holds, one above the other."""
    return next((count for pattern, count in FUSED if fnmatch.fnmatchcase(name, pattern)), 1)


def build_groups(model: torch.nn.Module, *, weight_decay: float, split_matrices: bool = False) -> list[ParameterGroup]:
    """Partition the trainable parameters of `model`; empty groups are left out.

    split_matrices: put hidden matrices into a group of their own, for Muon.
    """
    sorted_out: dict[str, list[tuple[str, torch.nn.Parameter]]] = {kind: [] for kind in GROUP_KINDS}
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
