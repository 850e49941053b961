"""Writes text: greedy, sampled or by beam search, one column per step through the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ernie5.data.document import Document
from ernie5.errors import ConfigError
from ernie5.generate.sampling import Sampling, sample_ids
from ernie5.generate.session import Decoder, Session


@dataclasses.dataclass(frozen=True)
class TextLimits:
    """Where a text ends. stop_ids: ids that end it and are not part of it; num_ids: ids that may be written."""

    max_tokens: int
    stop_ids: tuple[int, ...]
    num_ids: int


def generate_text(
    prompts: Sequence[Document], *, decoder: Decoder, limits: TextLimits, sampling: Sampling, seed: int = 0
) -> list[list[int]]:
    """Continue every prompt; returns the new ids of each row, without the id that ended it.

    Rows run side by side until all have ended; `sampling` with temperature 0 is greedy.
    """
    session = Session(decoder, prompts=prompts)
    generator = torch.Generator(device=session.device).manual_seed(seed)
    logits = _writable(session.text_logits(session.read_prompt()), limits=limits)
    written = torch.full((len(prompts), 0), -1, dtype=torch.int64, device=session.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=session.device)
    stops = torch.tensor(limits.stop_ids, device=session.device)
    for _ in range(limits.max_tokens):
        ids = sample_ids(logits, sampling=sampling, generator=generator, previous=written)
        ended = ended | torch.isin(ids, stops)
        written = torch.cat([written, torch.where(ended, -1, ids)[:, None]], dim=1)
        if bool(ended.all()) or written.shape[1] == limits.max_tokens:
            break
        logits = _writable(session.text_logits(session.read_text(ids)), limits=limits)
    return [[token for token in row if token >= 0] for row in written.tolist()]


def search_text(prompt: Document, *, decoder: Decoder, limits: TextLimits, beam: int) -> list[int]:
    """Beam search over one prompt: the text of the highest mean log-probability per id, its end included.

    Keeps the `beam` best open texts; a closed one competes by its mean, so that short texts have no head start. With
    beam = 1 this is the greedy text. Raises ConfigError for a beam below 1.
    """
    if beam < 1:
        raise ConfigError(f"beam = {beam} keeps no text at all. Use 1 (greedy) or more.")
    session = Session(decoder, prompts=[prompt] * beam)
    logits = _writable(session.text_logits(session.read_prompt()), limits=limits)
    texts: list[list[int]] = [[] for _ in range(beam)]
    # All rows are equal at first: only row 0 may open, or every beam would hold the same text.
    totals = torch.full((beam,), -torch.inf, device=session.device)
    totals[0] = 0.0
    closed: list[tuple[float, list[int]]] = []
    for length in range(1, limits.max_tokens + 1):
        scores = totals[:, None] + logits.float().log_softmax(dim=-1)
        best = scores.flatten().topk(min(2 * beam, scores.numel()))
        opened: list[tuple[float, int, int]] = []
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            row, token = divmod(place, scores.shape[1])
            if token not in limits.stop_ids:
                opened.append((total, row, token))
            elif rank < beam:
                closed.append((total / length, texts[row]))
        opened = opened[:beam]
        texts = [[*texts[row], token] for _, row, token in opened]
        totals = torch.tensor([total for total, _, _ in opened], device=session.device)
        # An open text that is per id below the best closed one can only overtake it by luck: stop.
        is_behind = len(closed) >= beam and opened[0][0] / length <= max(mean for mean, _ in closed)
        if is_behind or length == limits.max_tokens:
            break
        session.select([row for _, row, _ in opened])
        ids = torch.tensor([token for _, _, token in opened], device=session.device)
        logits = _writable(session.text_logits(session.read_text(ids)), limits=limits)
    closed += [(float(total) / max(len(text), 1), text) for total, text in zip(totals, texts, strict=True)]
    return max(closed, key=lambda entry: entry[0])[1]


def _writable(logits: torch.Tensor, *, limits: TextLimits) -> torch.Tensor:
    """Forbid specials other than the stop ids, and the padding rows of the head."""
    allowed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed[: limits.num_ids] = True
    allowed[list(limits.stop_ids)] = True
    return logits.masked_fill(~allowed, -torch.inf)
