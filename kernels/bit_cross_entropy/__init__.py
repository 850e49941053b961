"""Cross-entropy of d independent binary targets per cell (Infinity, arXiv:2412.04431; SPEC section 2)."""

from __future__ import annotations

import torch

from ..checks import require, require_beside, require_float, require_fractions, require_shape
from ..dispatch import choose_backend
from .reference import bit_cross_entropy_reference

OFFERED = ("triton", "torch", "reference")
OP = "bit_cross_entropy"


def bit_cross_entropy(
    logits: torch.Tensor, *, bits: torch.Tensor, weights: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """Return weighted nats per cell [N] (at least fp32) for logits [N, d], bits [N, d] in {0, 1}, weights [N].

    Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    require(logits.ndim == 2, op=OP, name="logits", tensor=logits, rule="it must be [cells, bits]")
    require_fractions(logits, op=OP, name="logits")
    require_shape(bits, shape=logits.shape, op=OP, name="bits", meaning="one per logit")
    require_beside(bits, first=logits, op=OP, name="bits")
    require_shape(weights, shape=logits.shape[:1], op=OP, name="weights", meaning="one per row of logits")
    require_fractions(weights, op=OP, name="weights")
    require_beside(weights, first=logits, op=OP, name="weights")
    chosen = choose_backend(backend, op=OP, offered=OFFERED, device=logits.device, dtype=logits.dtype)
    if chosen == "reference":
        return bit_cross_entropy_reference(logits, bits=bits, weights=weights)
    if chosen == "triton":
        from .kernel import bit_cross_entropy_triton

        require_float(logits, op=OP, name="logits")
        return bit_cross_entropy_triton(logits, bits, weights)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = bits.to(wide.dtype)
    nats = torch.nn.functional.binary_cross_entropy_with_logits(wide, targets, reduction="none")
    return nats.sum(-1) * weights
