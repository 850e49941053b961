"""The optimizer that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ernie5.optim.adamw import build_adamw
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.muon import ALONE, Muon, Peers


def build_optimizer(
    groups: Sequence[ParameterGroup], *, config: OptimConfig, peers: Peers = ALONE
) -> torch.optim.Optimizer:
    """AdamW or Muon over `groups` of fp32 parameters; `peers`, which hold the same ones, share Muon's iterations."""
    return Muon(groups, config=config, peers=peers) if config.name == "muon" else build_adamw(groups, config=config)
