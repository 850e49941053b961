"""One decoder layer: attention, then experts or a dense feed-forward, each behind a pre-norm."""

from __future__ import annotations

import torch
from torch import nn

from ernie5.model.attention import Attention
from ernie5.model.config import ModelConfig
from ernie5.model.interfaces import LayerInputs
from ernie5.model.mlp import SwiGLU
from ernie5.model.moe.balance import LayerRouting
from ernie5.model.moe.layer import MoELayer
from ernie5.model.norm import RMSNorm


class DenseBlock(nn.Module):
    """x + attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, layer=layer)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config.width, hidden_width=config.dense_width)

    def forward(self, hidden: torch.Tensor, *, inputs: LayerInputs) -> tuple[torch.Tensor, LayerRouting | None]:
        """[B, T, D] -> [B, T, D]; a dense layer routes nothing."""
        hidden = hidden + self.attend(hidden, inputs=inputs)
        return hidden + self.feed_forward(hidden), None

    def attend(self, hidden: torch.Tensor, *, inputs: LayerInputs) -> torch.Tensor:
        """[B, T, D] -> what attention adds."""
        return self.attention(self.attention_norm(hidden), inputs=inputs)

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> what the feed-forward adds."""
        return self.mlp(self.mlp_norm(hidden))


class MoEBlock(nn.Module):
    """x + attention(norm x), then x + experts(norm x)."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, layer=layer)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.moe = MoELayer(config)

    def forward(self, hidden: torch.Tensor, *, inputs: LayerInputs) -> tuple[torch.Tensor, LayerRouting | None]:
        """[B, T, D] -> [B, T, D] and the routing's statistics."""
        hidden = hidden + self.attend(hidden, inputs=inputs)
        out, routing = self.moe(self.mlp_norm(hidden), inputs=inputs)
        return hidden + out, routing

    def attend(self, hidden: torch.Tensor, *, inputs: LayerInputs) -> torch.Tensor:
        """[B, T, D] -> what attention adds."""
        return self.attention(self.attention_norm(hidden), inputs=inputs)
