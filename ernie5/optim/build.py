"""The optimizer that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ernie5.optim.adamw import AdamW
from ernie5.optim.compact import CompactAdamW
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.muon import Muon
from ernie5.optim.spread import Spread


def build_optimizer(
    groups: Sequence[ParameterGroup],
    *,
    config: OptimConfig,
    spreads: Mapping[str, Spread] | None = None,
    copies: Mapping[torch.nn.Parameter, torch.nn.Parameter] | None = None,
) -> AdamW | CompactAdamW | Muon:
    """AdamW or Muon over `groups` of fp32 parameters; `spreads`: how ranks share Muon's matrices, by name.

    copies: the bf16 weight of each master that has one, which steps write too. With `stochastic_rounding` parameters
    may be bf16 themselves.
    """
    if config.name == "muon":
        return Muon(groups, config=config, spreads=spreads, copies=copies)
    if config.is_compact:
        return CompactAdamW(groups, config=config, copies=copies)
    return AdamW(groups, config=config, copies=copies)
