"""Attention by PyTorch's `scaled_dot_product_attention` under the whole mask, [B, T, S] booleans in memory."""

from __future__ import annotations

import torch

from .plan import AttentionPlan


def attention_sdpa(
    query: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """query [B, T, H, C], key and value [B, S, G, C] -> [B, T, H, C].

    Key heads are repeated, because PyTorch's memory-efficient kernel takes a mask but no groups. What PyTorch makes of
    a row that sees nothing differs by kernel and version, so such a row sees everything there and is zero here.
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    masks = plan.dense
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        attn_mask=None if masks is None else masks.visible.unsqueeze(1),
        scale=scale,
    ).transpose(1, 2)
    return out if masks is None or masks.blind is None else out.masked_fill(masks.blind[:, :, None, None], 0.0)
