"""The optimizer that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ernie5.optim.adamw import build_adamw
from ernie5.optim.config import OptimConfig
from ernie5.optim.fused import FusedAdamW
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.muon import ALONE, Muon, Peers


def build_optimizer(
    groups: Sequence[ParameterGroup],
    *,
    config: OptimConfig,
    peers: Peers = ALONE,
    copies: Mapping[torch.nn.Parameter, torch.nn.Parameter] | None = None,
) -> torch.optim.Optimizer:
    """AdamW or Muon over `groups` of fp32 parameters; `peers`, which hold the same ones, share Muon's iterations.

    copies: the bf16 weight of each master, none for fp32 ones; with it AdamW is `FusedAdamW`, without it torch's, which
    DeepSpeed knows.
    """
    if config.name == "muon":
        return Muon(groups, config=config, peers=peers)
    return build_adamw(groups, config=config) if copies is None else FusedAdamW(groups, config=config, copies=copies)
