"""Grouped-query attention with rotary positions, optional QK-norm and no bias."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ernie5.model.config import ModelConfig
from ernie5.model.interfaces import AttentionOp, LayerInputs
from ernie5.model.linear import Linear
from ernie5.model.norm import RMSNorm
from ernie5_kernels.attention import attention
from ernie5_kernels.rope3d import rope3d


class Attention(nn.Module):
    """Attention of one layer. `op` is the AttentionOp seam; the number of heads is read off the weights."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.layer, self.head_width = layer, config.head_width
        query_width, key_width = config.query_heads * config.head_width, config.kv_heads * config.head_width
        self.query = Linear(config.width, query_width)
        self.key = Linear(config.width, key_width)
        self.value = Linear(config.width, key_width)
        self.output = Linear(query_width, config.width)
        self.query_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.op: AttentionOp = functools.partial(attention, backend=config.attention_backend)

    def forward(self, hidden: torch.Tensor, *, inputs: LayerInputs) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        query = self.query(hidden).unflatten(-1, (-1, self.head_width))
        key = self.key(hidden).unflatten(-1, (-1, self.head_width))
        value = self.value(hidden).unflatten(-1, (-1, self.head_width))
        query = rope3d(self.query_norm(query), rotation=inputs.rotation)
        key = rope3d(self.key_norm(key), rotation=inputs.rotation)
        if inputs.cache is not None:
            key, value = inputs.cache.extend(self.layer, key=key, value=value)
        return self.output(self.op(query, key=key, value=value, plan=inputs.plan).flatten(2))
