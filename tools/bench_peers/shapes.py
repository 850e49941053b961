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
    def part_flops(self) -> dict[str, float]:
        """`step_flops` by the part of the step that spends them."""
        used = 6.0 * self.tokens * self.layers * self.width
        projections = used * 2 * (self.query_heads + self.kv_heads) * HEAD_WIDTH
        return {
            "experts": used * self.top_k * 3 * self.expert_width,
            "linear": projections + used * self.experts,
            "attention": 6.0 * self.tokens * self.layers * 2 * self.query_heads * HEAD_WIDTH * (ROW_TOKENS + 1) / 2,
            "text head and its loss": 6.0 * self.tokens * VOCABULARY * self.width,
        }

    @property
    def parameters(self) -> int:
        """Weights of the whole model, the embedding tied to the head."""
        attention = 2 * (self.query_heads + self.kv_heads) * HEAD_WIDTH
        layer = attention + self.experts * (1 + 3 * self.expert_width) + 2
        return self.width * (self.layers * layer + VOCABULARY + 1)

    @property
    def least_bytes(self) -> float:
        """What a step with fp32 masters and bf16 weights must move for its weights alone, 34 bytes each: weight read in
        both passes (4), gradient written and read (4), master and two moments read and written (24), weight
        written (2)."""
        return 34.0 * self.parameters

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
