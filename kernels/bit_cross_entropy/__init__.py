"""Cross-entropy of d independent binary targets per cell (Infinity, arXiv:2412.04431; SPEC section 2)."""

from __future__ import annotations

import torch

from ..checks import require_beside, require_float
from ..dispatch import choose_backend
from .reference import bit_cross_entropy_reference

OFFERED = ("triton", "torch", "reference")


def bit_cross_entropy(
    logits: torch.Tensor, *, bits: torch.Tensor, weights: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """Return weighted nats per cell [N] (at least fp32) for logits [N, d], bits [N, d] in {0, 1}, weights [N].

    Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    if bits.shape != logits.shape or weights.shape != logits.shape[:1]:
        raise ValueError(
            f"bit_cross_entropy: logits {tuple(logits.shape)}, bits {tuple(bits.shape)}, weights {tuple(weights.shape)}"
        )
    op = "bit_cross_entropy"
    chosen = choose_backend(backend, op=op, offered=OFFERED, device=logits.device, dtype=logits.dtype)
    if chosen == "reference":
        return bit_cross_entropy_reference(logits, bits=bits, weights=weights)
    if chosen == "triton":
        from .kernel import bit_cross_entropy_triton

        require_float(logits, op=op, name="logits")
        require_beside(bits, first=logits, op=op, name="bits")
        require_beside(weights, first=logits, op=op, name="weights")
        return bit_cross_entropy_triton(logits, bits, weights)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = bits.to(wide.dtype)
    nats = torch.nn.functional.binary_cross_entropy_with_logits(wide, targets, reduction="none")
    return nats.sum(-1) * weights
