"""From sums of nats to one scalar: global means, running magnitudes, user weights (SPEC section 2, Weighting).

The scalar of one micro-batch is its share of the step's objective, so that micro-batches and ranks simply add up:

    J = sum_m  w_m / (D_m N_m) * S_m  +  w_mtp w_text / (D_text N_mtp) * S_mtp  +  routing losses

S: sum of nats here; N: targets of the whole step; D: running magnitude read before the step; w: user weight.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mtp import mtp_loss
from ernie5.objectives.next_codec import next_codec_loss
from ernie5.objectives.next_scale import next_scale_loss
from ernie5.objectives.next_token import TextLoss, next_token_loss
from ernie5.records import Batch, LossTerms, Modality, ModelOutput, RoutingStats, TargetCounts
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy

SMALLEST_MAGNITUDE = 1e-3


def losses(output: ModelOutput, batch: Batch, *, text_loss: TextLoss = linear_cross_entropy) -> LossTerms:
    """All objectives of one micro-batch as sums of nats (0-d fp32, differentiable); those whose heads are in another
    section of the model are zero, so that sections add up."""
    audio = next_codec_loss(output, batch=batch)
    if output.text_weight is None:
        elsewhere = torch.zeros((), dtype=torch.float32, device=audio.device)
        return LossTerms(text=elsewhere, image=elsewhere, video=elsewhere, audio=audio, mtp=elsewhere)
    bits = next_scale_loss(output, batch=batch)
    return LossTerms(
        text=next_token_loss(output, batch=batch, text_loss=text_loss),
        image=bits.image,
        video=bits.video,
        audio=audio,
        mtp=mtp_loss(output, batch=batch, text_loss=text_loss),
    )


def mean_losses(terms: LossTerms, *, counts: TargetCounts) -> LossTerms:
    """Nats per target, 0-d fp64; NaN where the step has no such target (absent is not zero)."""
    return LossTerms(
        **{
            f.name: getattr(terms, f.name).double() / torch.where(count > 0, count, torch.nan)
            for f in dataclasses.fields(LossTerms)
            for count in (getattr(counts, f.name).to(torch.float64),)
        }
    )


def modality_weights(config: ObjectivesConfig) -> tuple[float, float, float, float]:
    """User weights in the order of Modality."""
    return (config.text_weight, config.image_weight, config.video_weight, config.audio_weight)


def weighted_loss(means: LossTerms, *, counts: TargetCounts, config: ObjectivesConfig) -> torch.Tensor:
    """`loss` of the metrics: sum of user weight x raw mean where there are targets, 0-d fp64; a NaN there stays one."""
    raw = torch.stack([getattr(means, m.name.lower()) for m in Modality])
    present = torch.stack([getattr(counts, m.name.lower()) > 0 for m in Modality]).to(raw.device)
    weights = torch.tensor(modality_weights(config), dtype=raw.dtype, device=raw.device)
    return torch.where(present, raw * weights, torch.zeros_like(raw)).sum()


def uniform_magnitudes(*, vocab_size: int, audio_codes: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Magnitudes before the first step, [4] fp64: the loss in nats of a model that guesses evenly.

    text ln V, a bit ln 2, an audio code ln(C + 1). A start at 1 would weigh text eight times more than bits.
    """
    values = (math.log(vocab_size), math.log(2.0), math.log(2.0), math.log(audio_codes + 1))
    return torch.tensor(values, dtype=torch.float64, device=device)


def update_magnitudes(
    magnitudes: torch.Tensor, *, means: LossTerms, decay: float, floor: torch.Tensor
) -> torch.Tensor:
    """Magnitudes after a step, [4] fp64: EMA of the global mean losses, not below `floor` [4] fp64.

    An absent modality keeps its value.
    """
    current = torch.stack([getattr(means, m.name.lower()).detach().double() for m in Modality]).to(magnitudes.device)
    moved = decay * magnitudes + (1.0 - decay) * current
    return torch.where(current.isfinite(), moved, magnitudes).maximum(floor)


def combine(
    terms: LossTerms, *, counts: TargetCounts, divisors: torch.Tensor, config: ObjectivesConfig
) -> torch.Tensor:
    """This micro-batch's share of the optimised value, 0-d fp32.

    counts: targets of the whole step, over ranks and micro-batches; divisors [4] fp64 in the order of Modality.
    """
    divisors = divisors.clamp(min=SMALLEST_MAGNITUDE) if config.rescale else torch.ones_like(divisors)
    total = torch.zeros((), dtype=torch.float32, device=terms.text.device)
    for modality, weight in zip(Modality, modality_weights(config), strict=True):
        name = modality.name.lower()
        total = total + _share(getattr(terms, name), getattr(counts, name), weight / divisors[modality])
    return total + _share(terms.mtp, counts.mtp, config.mtp_weight * config.text_weight / divisors[Modality.TEXT])


def combine_routing(
    routing: RoutingStats, *, tokens: torch.Tensor, total_tokens: torch.Tensor, config: ObjectivesConfig
) -> torch.Tensor:
    """This micro-batch's share of the routing losses, weighted by its part of the step's tokens; 0-d, of the
    losses' dtype.

    Each is a mean over layers and over the micro-batch's tokens, so weighting by tokens makes the z-loss independent
    of how rows are split into micro-batches; switch and sequence losses are defined on what one pass sees.
    """
    value = (
        config.switch_weight * routing.switch_loss
        + config.sequence_weight * routing.sequence_loss
        + config.z_weight * routing.z_loss
    )
    return (value * (tokens / total_tokens.clamp(min=1))).to(value.dtype)


def _share(nats: torch.Tensor, count: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return nats * (weight / count.clamp(min=1)).float()
