"""Multi-token prediction: module d looks one token further than the one before (SPEC section 1; arXiv:2412.19437)."""

from __future__ import annotations

import torch
from torch import nn

from ernie5.model.block import DenseBlock
from ernie5.model.config import ModelConfig
from ernie5.model.interfaces import LayerInputs, LookAhead
from ernie5.model.linear import Linear
from ernie5.model.norm import RMSNorm


class MTPModule(nn.Module):
    """At position t, module d reads [norm(emb(token t+d+1)) ; norm(h)] and predicts token t+d+2, shared head.

    `look_ahead` is a seam.
    """

    def __init__(self, config: ModelConfig, *, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.look_ahead: LookAhead = _roll
        self.embedding_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.hidden_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.project = Linear(2 * config.width, config.width)
        self.block = DenseBlock(config, layer=config.layers + depth)

    def forward(self, hidden: torch.Tensor, *, embeddings: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """hidden [B, T, D] of the module before (or the backbone), embeddings [B, T, D] of the tokens -> [B, T, D].

        The last d+1 positions of a row have no such token; they read the row's first ones, and no term counts there.
        """
        ahead = self.look_ahead(embeddings, by=self.depth + 1)
        joined = torch.cat((self.embedding_norm(ahead), self.hidden_norm(hidden)), dim=-1)
        return self.block(self.project(joined), inputs=inputs)[0]


def _roll(x: torch.Tensor, *, by: int) -> torch.Tensor:
    return torch.roll(x, -by, dims=1)
