"""Outputs of the backbone: one head per modality over one shared final norm; audio reads the top layers directly."""

from __future__ import annotations

import torch
from torch import nn

from ernie5.model.config import ModelConfig
from ernie5.model.linear import Linear
from ernie5.model.norm import RMSNorm


class AudioHead(nn.Module):
    """Level q (0-based) is read from RMSNorm_q(output of layer L-Q+q) by a matrix of C+1 rows (SPEC section 2).

    After that layer the embedding of the frame's level-q code is added to the hidden state, so that the next layer
    and with it level q+1 know it; the last level needs none. `targets` are tables apart from the input embedding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        audio, width = config.audio, config.width
        self.num_levels, self.num_classes = audio.levels, audio.codes + 1
        self.first_layer = config.layers - audio.levels
        self.norms = nn.ModuleList([RMSNorm(width, eps=config.norm_eps) for _ in range(audio.levels)])
        self.heads = nn.ModuleList([Linear(width, self.num_classes) for _ in range(audio.levels)])
        self.targets = nn.ModuleList([nn.Embedding(self.num_classes, width) for _ in range(audio.levels - 1)])

    def level_after(self, layer: int) -> int | None:
        """Level that is read after layer `layer` (0-based), None for the lower layers."""
        return layer - self.first_layer if layer >= self.first_layer else None

    def logits(self, hidden: torch.Tensor, *, level: int) -> torch.Tensor:
        """hidden [..., D], the output of layer first_layer + level -> [..., C+1]; class C ends the audio."""
        return self.heads[level](self.norms[level](hidden))

    def embed_target(self, codes: torch.Tensor, *, level: int) -> torch.Tensor:
        """codes [...] of level `level` (0 .. Q-2), C included -> [..., D] to add before the next layer."""
        return self.targets[level](codes)
