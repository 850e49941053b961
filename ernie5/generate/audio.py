"""Speaks: one frame of Q codes per step, level after level through the top layers (SPEC section 2, audio)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ernie5.data.document import Document
from ernie5.generate.guidance import Guidance
from ernie5.generate.sampling import Sampling, sample_ids
from ernie5.generate.session import Decoder, Session


@dataclasses.dataclass(frozen=True)
class CodeChoice:
    """How codes are drawn: sampling of every level, guidance scale (1 off), longest speech, seed."""

    sampling: Sampling
    max_frames: int
    guidance: float = 1.0
    seed: int = 0


def generate_speech(
    prompts: Sequence[Document], *, unconditional: Sequence[Document], decoder: Decoder, choice: CodeChoice
) -> list[torch.Tensor]:
    """Speak every prompt (each ends in BOA); returns one codes [n, Q] int64 per prompt, n frames before its end.

    A row ends with the first frame whose level-1 code is the end code; deeper levels never draw the end code before
    that, since a frame is either sound at all levels or the end at all levels.
    """
    guidance = Guidance(len(prompts), scale=choice.guidance)
    rows = [*prompts, *unconditional] if guidance.is_doubled else list(prompts)
    session = Session(decoder, prompts=rows)
    generator = torch.Generator(device=session.device).manual_seed(choice.seed)
    pending = session.read_prompt_but_last()
    frames: list[torch.Tensor] = []
    end_code = session.end_code
    lengths = torch.full((len(prompts),), choice.max_frames, device=session.device)

    def choose(level: int, logits: torch.Tensor) -> torch.Tensor:
        guided = guidance.combine(logits)
        if level > 0:
            guided = guided[:, :end_code]
        return guidance.spread(sample_ids(guided, sampling=choice.sampling, generator=generator))

    for step in range(choice.max_frames):
        codes = session.predict_frame(pending, choose=choose)[: len(prompts)]
        lengths = torch.where((codes[:, 0] == end_code) & (lengths > step), step, lengths)
        frames.append(codes.clamp(max=end_code - 1))
        if bool((lengths <= step).all()) or step + 1 == choice.max_frames:
            break
        pending = session.embed_frame(guidance.spread(frames[-1]))
    spoken = torch.stack(frames, dim=1)
    return [spoken[row, : int(length)] for row, length in enumerate(lengths)]
