"""Next-codec prediction: Q codes of one audio frame, level by level (SPEC section 2, audio)."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from ernie5.records import Batch, ModelOutput


def next_codec_loss(output: ModelOutput, *, batch: Batch) -> torch.Tensor:
    """Sum over frames and the levels that were read of -log p(code), in nats, 0-d, at least fp32; C is a class like
    others."""
    first, levels = output.first_audio_level, output.audio_logits.shape[1]
    codes_NQ = batch.audio_targets.codes[:, first : first + levels]
    wide = torch.promote_types(output.audio_logits.dtype, torch.float32)
    logits = output.audio_logits.to(wide).reshape(-1, output.audio_logits.shape[-1])
    return functional.cross_entropy(logits, codes_NQ.reshape(-1), reduction="sum")
