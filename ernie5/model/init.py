"""Every initialisation in one table: parameter-name pattern -> rule (SPEC section 1, ERNIE 4.5's).

std = sqrt(0.3333 / width) of the stream that the parameter belongs to (the backbone's or the ViT's); projections that
write into the residual stream are scaled by 1/sqrt(2 * layers) of that stream. Each parameter has its own random
stream, seeded by (seed, name), so that values depend neither on the order of construction nor on the layout.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import math

import torch
from torch import nn

from ernie5.model.config import ModelConfig

VARIANCE_WIDTH = 0.3333


@dataclasses.dataclass(frozen=True)
class InitRule:
    """pattern: fnmatch over names; kind: ones | normal | residual; stream: backbone | vit."""

    pattern: str
    kind: str
    stream: str


INIT_TABLE = (
    InitRule("*norm.weight", "ones", "backbone"),
    InitRule("*.norms.*.weight", "ones", "backbone"),
    InitRule("embedding.vision.vit.layers.*.attention.output.weight", "residual", "vit"),
    InitRule("embedding.vision.vit.layers.*.mlp.down.weight", "residual", "vit"),
    InitRule("embedding.vision.*_merger.output.weight", "normal", "backbone"),
    InitRule("embedding.vision.*", "normal", "vit"),
    InitRule("*.attention.output.weight", "residual", "backbone"),
    InitRule("*.down", "residual", "backbone"),
    InitRule("*.down.weight", "residual", "backbone"),
    InitRule("*", "normal", "backbone"),
)


def rule_of(name: str) -> InitRule:
    """The first rule of the table that matches `name`."""
    return next(rule for rule in INIT_TABLE if fnmatch.fnmatchcase(name, rule.pattern))


def std_of(name: str, *, config: ModelConfig) -> float | None:
    """Standard deviation of a parameter's initial values; None where it starts at one."""
    rule = rule_of(name)
    if rule.kind == "ones":
        return None
    vit = rule.stream == "vit"
    std = math.sqrt(VARIANCE_WIDTH / (config.visual.vit_width if vit else config.width))
    layers = config.visual.vit_layers if vit else config.layers
    return std / math.sqrt(2 * layers) if rule.kind == "residual" else std


@torch.no_grad()
def initialize(module: nn.Module, *, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `module` in place by the table, and set the balance biases to zero."""
    for name, parameter in module.named_parameters():
        std = std_of(name, config=config)
        if std is None:
            parameter.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(std=std, generator=generator)
        parameter.copy_(values)
    for name, buffer in module.named_buffers():
        if name.endswith("balance_bias"):
            buffer.zero_()
