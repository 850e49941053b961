"""Residual vector quantiser: level q codes what levels 1..q-1 left over (Zeghidour et al. 2021, SoundStream).

Codebooks are learned by exponential moving averages of the residuals they win (van den Oord et al. 2017, appendix A.1),
start from k-means of real latents, and codes that win nothing are moved onto residuals of the current batch. What only
training needs is in `CodebookAverages`, apart from the quantiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ernie5.errors import TokenizerError

EMA_DECAY = 0.99
# A code is moved when it wins fewer than this many residuals per step on average; a uniform code of 1024 wins 0.16
# of the 160 frames of a training step.
DEAD_WINS_PER_STEP = 0.01
KMEANS_ROUNDS = 12
POINTS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """latents [B, T, d]: the sum of the chosen levels, with a straight-through gradient to the input; first [B, T, d]:
    level 1 alone, also straight-through; codes [B, T, Q] int64 of every level; commitment: 0-d fp32 loss."""

    latents: torch.Tensor
    first: torch.Tensor
    codes: torch.Tensor
    commitment: torch.Tensor


def nearest_codes(points: torch.Tensor, *, codebook: torch.Tensor) -> torch.Tensor:
    """Index [N] int64 of the Euclidean-nearest row of codebook [C, d] for points [N, d], ties to the lower index."""
    # |x - c|^2 without |x|^2, which is the same for every code. In pieces, so that the scores stay in the cache.
    norms = codebook.square().sum(1)
    pieces = [torch.addmm(norms, piece, codebook.T, alpha=-2.0).argmin(1) for piece in points.split(POINTS_AT_ONCE)]
    return torch.cat(pieces)


def kmeans(points: torch.Tensor, *, num_codes: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm from a random choice of points [N, d]; returns centres [num_codes, d]. Empty centres are drawn
    again from the points; with fewer points than codes, points repeat."""
    order = torch.randperm(points.shape[0], generator=generator)
    centres = points[order.repeat(-(-num_codes // points.shape[0]))[:num_codes]].clone()
    for _ in range(KMEANS_ROUNDS):
        owner = nearest_codes(points, codebook=centres)
        count = torch.bincount(owner, minlength=num_codes).to(points.dtype)
        total = torch.zeros_like(centres).index_add_(0, owner, points)
        centres = total / count.clamp(min=1.0)[:, None]
        empty = count == 0
        draws = torch.randint(points.shape[0], (int(empty.sum()),), generator=generator)
        centres[empty] = points[draws]
    return centres


class ResidualQuantizer(nn.Module):
    """Q codebooks [Q, C, d], used greedily one after another."""

    def __init__(self, width: int, *, levels: int, codes: int) -> None:
        super().__init__()
        self.levels = levels
        self.codes = codes
        self.register_buffer("codebooks", torch.randn(levels, codes, width) * 0.02)

    def quantize(self, latents: torch.Tensor, *, active_levels: torch.Tensor) -> Quantized:
        """Codes of latents [B, T, d]. active_levels [B] int64 in 1..Q: how many levels of each row reach `latents` of
        the result (quantiser dropout); codes and commitment are of every level."""
        batch, frames, width = latents.shape
        flat = latents.reshape(-1, width)
        rest = flat.detach()
        row_levels = active_levels.repeat_interleave(frames)[:, None]
        total = torch.zeros_like(rest)
        codes, values, commitment = [], [], flat.new_zeros(())
        for level in range(self.levels):
            chosen = nearest_codes(rest, codebook=self.codebooks[level])
            values.append(self.codebooks[level][chosen])
            codes.append(chosen)
            rest = rest - values[level]
            total = total + values[level] * (level < row_levels)
            commitment = commitment + functional.mse_loss(flat, flat.detach() - rest)
        straight = flat - flat.detach()
        return Quantized(
            latents=(total + straight).view(batch, frames, width),
            first=(values[0] + straight).view(batch, frames, width),
            codes=torch.stack(codes, dim=1).view(batch, frames, self.levels),
            commitment=commitment / self.levels,
        )

    def look_up(self, codes: torch.Tensor) -> torch.Tensor:
        """Latents [B, T, d] of the first q levels, codes [B, T, q] int64 with 1 <= q <= Q. Raises TokenizerError for
        another number of levels or a code outside [0, C)."""
        num_levels = codes.shape[2] if codes.dim() == 3 else 0
        if not 1 <= num_levels <= self.levels:
            raise TokenizerError(
                f"audio codes of shape {tuple(codes.shape)} do not fit a codec of {self.levels} levels. The rule is "
                f"[rows, frames, levels] with 1 to {self.levels} levels."
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            raise TokenizerError(
                f"audio codes span [{int(codes.min())}, {int(codes.max())}]; this codec has the codes 0 to "
                f"{self.codes - 1}. Remove end codes ({self.codes}) before decoding."
            )
        return sum(self.codebooks[level][codes[:, :, level]] for level in range(num_levels))


class CodebookAverages(nn.Module):
    """Moving averages that train the codebooks of a ResidualQuantizer: wins [Q, C] per step, sums [Q, C, d] of the
    residuals won. Buffers, so that a resumed run goes on exactly."""

    def __init__(self, width: int, *, levels: int, codes: int) -> None:
        super().__init__()
        self.register_buffer("wins", torch.ones(levels, codes))
        self.register_buffer("sums", torch.zeros(levels, codes, width))

    @torch.no_grad()
    def start(self, quantizer: ResidualQuantizer, *, latents: torch.Tensor, generator: torch.Generator) -> None:
        """Sets every level by k-means of what the levels before it leave of latents [N, d]."""
        residual = latents
        for level in range(quantizer.levels):
            centres = kmeans(residual, num_codes=quantizer.codes, generator=generator)
            quantizer.codebooks[level] = centres
            self.sums[level] = centres
            residual = residual - centres[nearest_codes(residual, codebook=centres)]
        self.wins.fill_(1.0)

    @torch.no_grad()
    def update(
        self,
        quantizer: ResidualQuantizer,
        *,
        latents: torch.Tensor,
        codes: torch.Tensor,
        generator: torch.Generator,
    ) -> int:
        """One step of the averages with the codes [B, T, Q] that latents [B, T, d] were given, then dead codes are
        moved onto residuals of this batch. Returns how many codes moved."""
        rest = latents.reshape(-1, latents.shape[-1])
        # A moved code starts with a uniform code's wins, so that it is not found dead again at once.
        fresh_wins = rest.shape[0] / quantizer.codes
        moved = 0
        for level in range(quantizer.levels):
            chosen = codes[:, :, level].reshape(-1)
            before = quantizer.codebooks[level][chosen]
            wins, sums = self.wins[level], self.sums[level]
            count = torch.bincount(chosen, minlength=quantizer.codes).to(rest.dtype)
            wins.mul_(EMA_DECAY).add_(count, alpha=1.0 - EMA_DECAY)
            sums.mul_(EMA_DECAY).add_(torch.zeros_like(sums).index_add_(0, chosen, rest), alpha=1.0 - EMA_DECAY)
            dead = wins < DEAD_WINS_PER_STEP
            num_dead = int(dead.sum())
            draws = torch.randint(rest.shape[0], (num_dead,), generator=generator)
            sums[dead] = rest[draws] * fresh_wins
            wins[dead] = fresh_wins
            quantizer.codebooks[level] = sums / wins[:, None]
            moved += num_dead
            rest = rest - before
        return moved
