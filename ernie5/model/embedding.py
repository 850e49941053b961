"""Inputs of the backbone: one embedding per modality over one sequence of placeholder tokens.

Every position first gets the embedding of its token id, which for media is a placeholder and so acts as a learned
embedding of the kind; what the modality's record says about the position is added.
"""

from __future__ import annotations

import torch
from torch import nn

from ernie5.model.config import ModelConfig
from ernie5.model.linear import Linear
from ernie5.model.norm import RMSNorm
from ernie5.model.vision import VisionEncoder
from ernie5.records import AudioFrames, Batch, SpeakerCells, VisualCells


class VisualCellEmbedding(nn.Module):
    """Generation inputs: a projection of the latents plus the embedding of the scale to predict (S = finished)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.latent = Linear(config.visual.bits, config.width)
        self.scale = nn.Embedding(config.visual.num_scales + 1, config.width)

    def forward(self, cells: VisualCells) -> torch.Tensor:
        """N cells -> [N, D]."""
        return self.latent(cells.latents.to(self.latent.weight.dtype)) + self.scale(cells.scales)


class AudioEmbedding(nn.Module):
    """Audio inputs: the sum of one embedding per codec level; and the projection of a speaker's features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.codes = config.audio.codes
        self.code = nn.Embedding(config.audio.levels * config.audio.codes, config.width)
        self.speaker = Linear(config.audio.speaker_features, config.width)
        self.speaker_norm = RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, frames: AudioFrames) -> torch.Tensor:
        """N frames -> [N, D]."""
        first = torch.arange(frames.codes.shape[1], device=frames.codes.device) * self.codes
        return self.code(frames.codes + first).sum(1)

    def embed_speaker(self, speakers: SpeakerCells) -> torch.Tensor:
        """N speakers -> [N, D]."""
        return self.speaker_norm(self.speaker(speakers.features.to(self.speaker.weight.dtype)))


class InputEmbedding(nn.Module):
    """A batch -> hidden states, and the modules that this batch left unused."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.text = nn.Embedding(config.vocab_size, config.width)
        self.vision = VisionEncoder(config) if config.has_visual else None
        self.cells = VisualCellEmbedding(config) if config.has_visual else None
        self.audio = AudioEmbedding(config) if config.has_audio else None

    def forward(self, batch: Batch) -> torch.Tensor:
        """Batch -> [B, T, D]. Records of modalities that the model lacks must be empty."""
        hidden = self.text(batch.token_ids)
        rows, values = [], []
        if self.vision is not None:
            for patches, merger in (
                (batch.image_patches, self.vision.image_merger),
                (batch.video_patches, self.vision.video_merger),
            ):
                if patches.rows.numel():
                    rows.append(patches.rows)
                    values.append(self.vision(patches, merger=merger))
            if batch.visual_cells.rows.numel():
                rows.append(batch.visual_cells.rows)
                values.append(self.cells(batch.visual_cells))
        if self.audio is not None:
            if batch.audio_frames.rows.numel():
                rows.append(batch.audio_frames.rows)
                values.append(self.audio(batch.audio_frames))
            if batch.speakers.rows.numel():
                rows.append(batch.speakers.rows)
                values.append(self.audio.embed_speaker(batch.speakers))
        if not rows:
            return hidden
        return hidden.flatten(0, 1).index_add(0, torch.cat(rows), torch.cat(values)).view_as(hidden)

    def idle_modules(self, batch: Batch) -> list[nn.Module]:
        """Those that this batch has no data for."""
        idle: list[nn.Module] = []
        if self.vision is not None:
            images, videos = batch.image_patches.rows.numel(), batch.video_patches.rows.numel()
            idle += [] if images else [self.vision.image_merger]
            idle += [] if videos else [self.vision.video_merger]
            idle += [] if images or videos else [self.vision.vit, self.vision.cnn]
            idle += [] if batch.visual_cells.rows.numel() else [self.cells]
        if self.audio is not None:
            idle += [] if batch.audio_frames.rows.numel() else [self.audio.code]
            idle += [] if batch.speakers.rows.numel() else [self.audio.speaker, self.audio.speaker_norm]
        return idle
