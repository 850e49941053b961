"""Draws pictures scale by scale: every cell of a scale at once, bits drawn independently, twins for guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ernie5.data.document import Document
from ernie5.data.positions import grid_coordinates
from ernie5.generate.guidance import Guidance
from ernie5.generate.sampling import sample_bits
from ernie5.generate.session import CellBlock, Decoder, Session
from ernie5.tokenizers.visual.quantizer import accumulate
from ernie5.tokenizers.visual.scales import resize_to, scale_schedule


@dataclasses.dataclass(frozen=True)
class BitChoice:
    """How bits are drawn: temperature (0 takes the likelier bit), guidance scale (1 off), seed."""

    temperature: float = 0.5
    guidance: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What is drawn: the finest latent grid (h, w), latent frames f, and the scale index of a finished picture S."""

    grid: tuple[int, int]
    num_frames: int
    num_scales: int
    sizes: tuple[int, ...]
    is_video: bool

    @property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """Grids of the scales, coarse to fine."""
        return scale_schedule(*self.grid, sizes=self.sizes)


def generate_images(
    prompts: Sequence[Document],
    *,
    unconditional: Sequence[Document],
    decoder: Decoder,
    canvas: Canvas,
    choice: BitChoice,
) -> torch.Tensor:
    """Draw one picture per prompt (each ends in BOI); returns latents [B, d, h, w] fp32 for the visual tokenizer.

    unconditional: the same prompts without their condition; read only when guidance is not 1.
    """
    return draw_frames(prompts, unconditional=unconditional, decoder=decoder, canvas=canvas, choice=choice)[:, :, 0]


def draw_frames(
    prompts: Sequence[Document],
    *,
    unconditional: Sequence[Document],
    decoder: Decoder,
    canvas: Canvas,
    choice: BitChoice,
) -> torch.Tensor:
    """Draw `canvas.num_frames` latent frames per prompt, the finished one leading to the next: [B, d, f, h, w] fp32."""
    guidance = Guidance(len(prompts), scale=choice.guidance)
    rows = [*prompts, *unconditional] if guidance.is_doubled else list(prompts)
    session = Session(decoder, prompts=rows)
    generator = torch.Generator(device=session.device).manual_seed(choice.seed)
    hidden = session.read_prompt()
    frames = []
    for frame in range(canvas.num_frames):
        drawn = _draw_frame(hidden, session=session, guidance=guidance, canvas=canvas, frame=frame, choice=choice,
                            generator=generator)
        frames.append(drawn)
        if frame + 1 < canvas.num_frames:
            cells = guidance.spread(drawn).flatten(2).transpose(1, 2)
            block = CellBlock(grid_coordinates(canvas.grid, finest=canvas.grid), frame, canvas.num_scales)
            hidden = session.read_cells(cells, block=block, is_video=canvas.is_video)[:, -1:]
    return torch.stack(frames, dim=2)


def _draw_frame(
    hidden: torch.Tensor,
    *,
    session: Session,
    guidance: Guidance,
    canvas: Canvas,
    frame: int,
    choice: BitChoice,
    generator: torch.Generator,
) -> torch.Tensor:
    """One frame [B, d, h, w] from the hidden state [rows, 1, D] that predicts its first scale."""
    schedule = canvas.schedule
    drawn = None
    for scale, grid in enumerate(schedule):
        if scale:
            cells = guidance.spread(resize_to(drawn, grid)).flatten(2).transpose(1, 2)
            block = CellBlock(grid_coordinates(grid, finest=canvas.grid), frame, scale)
            hidden = session.read_cells(cells, block=block, is_video=canvas.is_video)
        logits = guidance.combine(session.bit_logits(hidden))
        bits = sample_bits(logits, temperature=choice.temperature, generator=generator)
        if drawn is None:
            drawn = bits.new_zeros(bits.shape[0], bits.shape[-1], *canvas.grid)
        drawn = accumulate(drawn, bits.unflatten(1, grid))
    return drawn
