"""Turns logits into choices: text ids, picture bits, audio codes. Every draw comes from the caller's generator."""

from __future__ import annotations

import dataclasses

import torch


# A logit divided by less would pass the largest fp32; the likeliest id has all of the mass long before.
LEAST_TEMPERATURE = 1e-30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How ids are drawn. temperature 0 takes the likeliest; top_k 0 and top_p 1 keep every id."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def guide(conditional: torch.Tensor, *, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance of logits: u + scale * (c - u) (arXiv:2207.12598); scale 1 returns `conditional`."""
    if scale == 1.0:
        return conditional
    return unconditional + scale * (conditional - unconditional)


def penalise_repetition(logits: torch.Tensor, *, previous: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make ids seen before less likely (arXiv:1909.05858, section 4.1).

    logits [B, V]; previous [B, N] int64, ids already in the row, -1 for none. Returns [B, V].
    """
    if penalty == 1.0 or previous.shape[1] == 0:
        return logits
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen.scatter_(1, previous.clamp(min=0), previous >= 0)
    # A later -1 (clamped to id 0) must not erase a true mark of id 0, so id 0 is decided on its own.
    seen[:, 0] = (previous == 0).any(dim=1)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: torch.Tensor, *, top_k: int) -> torch.Tensor:
    """Set all but the `top_k` largest logits of each row [.., V] to -inf; 0 keeps all."""
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return logits
    kept = logits.topk(top_k, dim=-1).indices
    return torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))


def keep_top_p(logits: torch.Tensor, *, top_p: float) -> torch.Tensor:
    """Keep the smallest set of ids whose probability reaches `top_p` (nucleus, arXiv:1904.09751); logits [.., V]."""
    if top_p >= 1.0:
        return logits
    ordered, places = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    # The id that crosses the border belongs to the nucleus, so the mass *before* each id decides.
    dropped = probability.cumsum(dim=-1) - probability >= top_p
    dropped[..., 0] = False
    return torch.empty_like(logits).scatter(-1, places, ordered.masked_fill(dropped, -torch.inf))


def sample_ids(
    logits: torch.Tensor, *, sampling: Sampling, generator: torch.Generator, previous: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw one id per row. logits [B, V]; previous [B, N] int64 for the repetition penalty. Returns [B] int64."""
    scores = logits.float()
    if previous is not None:
        scores = penalise_repetition(scores, previous=previous, penalty=sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return scores.argmax(dim=-1)
    scores = keep_top_k(scores / max(sampling.temperature, LEAST_TEMPERATURE), top_k=sampling.top_k)
    scores = keep_top_p(scores, top_p=sampling.top_p)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[:, 0]


def sample_bits(logits: torch.Tensor, *, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """Draw independent bits from sigmoid(logits / temperature); temperature 0 takes the sign. Returns {0, 1} fp32."""
    if temperature == 0.0:
        return (logits > 0).float()
    chance = torch.rand(logits.shape, generator=generator, device=logits.device)
    return (chance < torch.sigmoid(logits.float() / temperature)).float()
