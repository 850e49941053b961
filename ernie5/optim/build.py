"""The optimizer that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ernie5.optim.adamw import build_adamw
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.muon import Muon


def build_optimizer(groups: Sequence[ParameterGroup], *, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or Muon over `groups` of fp32 parameters."""
    return Muon(groups, config=config) if config.name == "muon" else build_adamw(groups, config=config)
