"""The three shapes of the comparison, and what a layer or a step of each costs."""

from __future__ import annotations

import dataclasses

HEAD_WIDTH, ROW_TOKENS, VOCABULARY = 64, 1024, 4096


@dataclasses.dataclass(frozen=True)
class Shape:
    """A text-only model whose every layer has experts; tokens per step in rows of 1,024."""

    name: str
    width: int
    layers: int
    experts: int
    top_k: int
    expert_width: int
    query_heads: int
    kv_heads: int
    tokens: int

    @property
    def layer_flops(self) -> float:
        """Forward and backward of one layer's experts and router: three times two per weight used."""
        return 6.0 * self.tokens * self.width * (self.top_k * 3 * self.expert_width + self.experts)

    @property
    def step_flops(self) -> float:
        """Forward and backward of the whole model, causal attention counted once, not twice."""
        projections = 2 * (self.query_heads + self.kv_heads) * HEAD_WIDTH * self.width
        scores = 2 * self.query_heads * HEAD_WIDTH * (ROW_TOKENS + 1) / 2
        other = self.layers * (projections + scores) + VOCABULARY * self.width
        return self.layers * self.layer_flops + 6.0 * self.tokens * other


SHAPES = {
    "S": Shape("S", 256, 4, 64, 4, 128, 4, 2, 4096),
    "M": Shape("M", 512, 8, 64, 4, 256, 8, 2, 8192),
    "X": Shape("X", 512, 8, 384, 8, 128, 8, 2, 8192),
}
