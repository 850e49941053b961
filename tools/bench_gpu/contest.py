"""What is raced: ours, its truth, its peers, and the work that all of them do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Contest:
    """Functions without arguments on tensors that exist. truth gives what `ours` must give up to `tolerance` of the
    largest value; flops or moved_bytes (each input and output once) is the work."""

    ours: Run
    truth: Run | None
    tolerance: float
    peers: Mapping[str, Run]
    flops: float = 0.0
    moved_bytes: float = 0.0
    graph: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """A contest that is built, with its tensors, when its turn comes."""

    op: str
    name: str
    build: Callable[[], Contest]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report. peers_ms: milliseconds by name; share: of the device's own bf16 rate or copy bandwidth;
    errors: what went wrong, of ours first."""

    op: str
    name: str
    ours_ms: float | None
    rate: float | None
    unit: str
    share: float | None
    host_us: float | None
    graphed: bool
    difference: float | None
    peers_ms: Mapping[str, float]
    errors: tuple[str, ...]

    def ratios(self) -> Iterator[tuple[str, float]]:
        """Each peer's time over ours: above 1 ours is faster."""
        for name, ms in self.peers_ms.items():
            if self.ours_ms:
                yield name, ms / self.ours_ms


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normal numbers on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device="cuda").normal_(std=scale, generator=generator)


def with_gradients(function: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Run:
    """Forward and backward under a fixed upstream gradient; gives output and gradients."""
    wanting = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    upstream: list[torch.Tensor] = []  # made at the first call, which no graph records

    def run() -> tuple[torch.Tensor, ...]:
        out = function(*wanting)
        if not upstream:
            upstream.append(torch.ones_like(out) if out.ndim == 0 else normal(*out.shape, dtype=out.dtype, seed=9))
        return out.detach(), *torch.autograd.grad(out, wanting, upstream[0])

    return run


def without_gradients(function: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Run:
    """Forward alone."""

    def run() -> torch.Tensor:
        with torch.no_grad():
            return function(*leaves)

    return run
