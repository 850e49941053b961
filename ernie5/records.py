"""Dataclasses that cross folder borders: what a batch, a model output, a loss and a sub-network are.

Shape legend of the whole repository: B rows, T tokens, D width, H heads, C head width, F expert width, E experts,
e local experts, K chosen experts, N = T*K, R rows received, V vocabulary, S scales, Q codebooks, P position axes.

A batch is B packed rows of T positions. Everything that is not text is sparse: a small record holds `rows`, the flat
positions b*T + t that it belongs to, beside its values, so that a batch without images carries empty tensors and takes
the same code path (SPEC section 7: every rank takes part in everything whatever its data).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

import torch


class Modality(enum.IntEnum):
    """The four modalities whose losses are reported and weighted (SPEC section 2)."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


class TokenKind(enum.IntEnum):
    """What a position holds; kinds 1..6 are the six groups of the routing analyses (SPEC section 5)."""

    PADDING = 0
    TEXT = 1
    IMAGE_UNDERSTANDING = 2
    VIDEO_UNDERSTANDING = 3
    IMAGE_GENERATION = 4
    VIDEO_GENERATION = 5
    AUDIO = 6


class TensorRecord:
    """Base of records made of tensors, numbers and further records; `to` moves every tensor."""

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TensorRecord:
        """Return a copy with `function` applied to every tensor at any depth."""
        return dataclasses.replace(
            self, **{f.name: _map_value(getattr(self, f.name), function) for f in dataclasses.fields(self)}
        )

    def to(self, device: torch.device | str) -> TensorRecord:
        """Return a copy on `device` (asynchronous where the memory is pinned)."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))


def _map_value(value: object, function: Callable[[torch.Tensor], torch.Tensor]) -> object:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, TensorRecord):
        return value.map_tensors(function)
    if isinstance(value, tuple):
        return tuple(_map_value(item, function) for item in value)
    return value


@dataclasses.dataclass(frozen=True)
class TextTargets(TensorRecord):
    """Positions whose text head is trained. rows [N] int64; ids [N] int64, the global id to predict."""

    rows: torch.Tensor
    ids: torch.Tensor


@dataclasses.dataclass(frozen=True)
class VisualPatches(TensorRecord):
    """Understanding inputs: K patches per backbone position (image K=4, video K=16; SPEC section 2).

    rows [N] int64; pixels [N, K, 3*s*s] fp32 in [-1, 1], channel-major, s the tokenizer's stride; features
    [N, K, A] fp32, the frozen visual tokenizer's encoder output before quantisation; frame_ids [N, K] int64, one
    number per frame of the batch (the ViT attends within a frame); places [N, K, 2] int64, (y, x) of the patch.
    """

    rows: torch.Tensor
    pixels: torch.Tensor
    features: torch.Tensor
    frame_ids: torch.Tensor
    places: torch.Tensor


@dataclasses.dataclass(frozen=True)
class VisualCells(TensorRecord):
    """Generation inputs. rows [N] int64; latents [N, d] fp32, the accumulated (corrupted) reconstruction resized to
    the block's grid; scales [N] int64 in 0..S: index of the scale that the block predicts, S for a finished picture.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    scales: torch.Tensor


@dataclasses.dataclass(frozen=True)
class BitTargets(TensorRecord):
    """Positions whose bit head is trained. rows [N] int64; bits [N, d] fp32 in {0, 1}; weights [N] fp32 (mean 1 over
    one picture or clip); scales [N] int64 the predicted scale; is_video [N] bool.
    """

    rows: torch.Tensor
    bits: torch.Tensor
    weights: torch.Tensor
    scales: torch.Tensor
    is_video: torch.Tensor


@dataclasses.dataclass(frozen=True)
class AudioFrames(TensorRecord):
    """Audio inputs or targets. rows [N] int64; codes [N, Q] int64 in 0..C-1 (targets: C is the end code)."""

    rows: torch.Tensor
    codes: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SpeakerCells(TensorRecord):
    """Speaker embeddings in the context. rows [N] int64; features [N, 160] fp32."""

    rows: torch.Tensor
    features: torch.Tensor


@dataclasses.dataclass(frozen=True)
class TargetCounts(TensorRecord):
    """Targets per objective, 0-d fp64 tensors: text tokens, image bits, video bits, audio codes, MTP tokens (all
    depths), tokens that are not padding. Summed over micro-batches and ranks they are the divisors of the losses.
    """

    text: torch.Tensor
    image: torch.Tensor
    video: torch.Tensor
    audio: torch.Tensor
    mtp: torch.Tensor
    tokens: torch.Tensor

    def __add__(self, other: TargetCounts) -> TargetCounts:
        return TargetCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Batch(TensorRecord):
    """One micro-batch of packed rows.

    token_ids [B, T] int64: global ids (vocab.py); media positions hold their placeholder id. kinds [B, T] int64:
    TokenKind. positions [B, T, 3] fp32: (t, h, w) of Uni-RoPE, restarting at 0 per document. document_ids [B, T] int32:
    0.. per row, -1 for padding. intervals [B, T, 4] int32, per key column j: (visible_from, hidden_from, hidden_until,
    visible_until); query row i sees key j exactly when visible_from <= i < visible_until and not
    hidden_from <= i < hidden_until (FlashMask-style row intervals, O(T) memory). Padding columns are visible to
    themselves alone. mtp_targets holds one TextTargets per MTP depth. sample_keys names the samples, row by row.
    """

    token_ids: torch.Tensor
    kinds: torch.Tensor
    positions: torch.Tensor
    document_ids: torch.Tensor
    intervals: torch.Tensor
    text_targets: TextTargets
    mtp_targets: tuple[TextTargets, ...]
    image_patches: VisualPatches
    video_patches: VisualPatches
    visual_cells: VisualCells
    bit_targets: BitTargets
    audio_frames: AudioFrames
    audio_targets: AudioFrames
    speakers: SpeakerCells
    sample_keys: tuple[tuple[str, ...], ...]

    def counts(self) -> TargetCounts:
        """Number of targets of this micro-batch, per objective."""
        device, bits = self.token_ids.device, self.bit_targets.bits.shape[1]
        video = self.bit_targets.is_video.sum()
        return TargetCounts(
            *(
                torch.as_tensor(n, dtype=torch.float64, device=device)
                for n in (
                    self.text_targets.rows.numel(),
                    (self.bit_targets.rows.numel() - video) * bits,
                    video * bits,
                    self.audio_targets.codes.numel(),
                    sum(t.rows.numel() for t in self.mtp_targets),
                    (self.kinds != TokenKind.PADDING).sum(),
                )
            )
        )


@dataclasses.dataclass(frozen=True)
class SubNetwork:
    """The part of the model that one optimizer step trains (SPEC section 4). None means all.

    layers: indices of the layers that run, ascending; experts: indices of the experts that may be chosen; top_k:
    experts per token.
    """

    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    top_k: int | None = None


@dataclasses.dataclass(frozen=True)
class RoutingStats(TensorRecord):
    """What the routers did in one forward pass; padding never counts.

    loads [L, E] fp32: tokens per MoE layer and expert; group_loads [L, 6, E] fp32: the same by TokenKind 1..6;
    switch_loss, sequence_loss, z_loss: 0-d fp32, each the *mean over MoE layers*, already averaged over tokens of the
    micro-batch, 0 where switched off. A section of the model has zeros for foreign layers: sections add up.
    """

    loads: torch.Tensor
    group_loads: torch.Tensor
    switch_loss: torch.Tensor
    sequence_loss: torch.Tensor
    z_loss: torch.Tensor


@dataclasses.dataclass(frozen=True)
class ModelOutput(TensorRecord):
    """What the model hands to the objectives; logits exist only where a target exists.

    hidden [B, T, D]: output of the last layer that ran; text_hidden [N, D]: normed hidden states at
    `text_targets.rows`; text_weight [V, D]: the text head, applied by the objective in chunks so that whole logits
    never exist; mtp_hidden: one [N, D] per depth at `mtp_targets[d].rows`; bit_logits [N, d] at `bit_targets.rows`;
    audio_logits [N, q, C+1] at `audio_targets.rows`, of q levels from first_audio_level on (all Q, from 0, in a whole
    model); routing. `touched` is a 0-d zero that depends on every parameter which this batch's data left out, so that
    each gets a gradient. A section of the model without heads has None for what they give, and no mtp_hidden.
    """

    hidden: torch.Tensor
    text_hidden: torch.Tensor | None
    text_weight: torch.Tensor | None
    mtp_hidden: tuple[torch.Tensor, ...]
    bit_logits: torch.Tensor | None
    audio_logits: torch.Tensor
    first_audio_level: int
    routing: RoutingStats
    touched: torch.Tensor


@dataclasses.dataclass(frozen=True)
class LossTerms(TensorRecord):
    """Sums of nats of one micro-batch (0-d fp32, differentiable), to be divided by the global `TargetCounts`."""

    text: torch.Tensor
    image: torch.Tensor
    video: torch.Tensor
    audio: torch.Tensor
    mtp: torch.Tensor
