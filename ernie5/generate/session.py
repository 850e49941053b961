"""One decoding session: prompts of any lengths side by side, padded on the left, and what is generated behind them.

All rows grow by the same columns, so that a step is one call of the model. Padding stands in front, where the row
intervals hide it from every other position; without it, and as long as no frame has left a window, no intervals are
needed behind the prompt, since a new token and a new visual block see everything before them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ernie5.data.collate import Layout, collate_rows
from ernie5.data.document import Document, DocumentBuilder, Shapes
from ernie5.generate.cache import GrowingCache
from ernie5.model.backbone import UnifiedModel
from ernie5.records import AudioFrames, Batch, TokenKind, VisualCells
from ernie5.tokenizers.vocab import Vocab

# visible_until of positions that every later token may see.
FOREVER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What decoding needs beside the prompts: the model (in eval mode), the id space, record widths, and the two
    settings of data that change what a token sees: positions.visual_origin and video_attention.window_frames."""

    model: UnifiedModel
    vocab: Vocab
    shapes: Shapes
    visual_origin: str = "running"
    window_frames: int = 0


@dataclasses.dataclass(frozen=True)
class CellBlock:
    """Where a block of cells lies: coordinates [n, 2] (h, w) fp32, latent frame, and the scale index it predicts."""

    coordinates: torch.Tensor
    frame: int
    scale: int


class Session:
    """Rows that are decoded together. Read the prompt first, then text, the blocks of one picture or clip, or sound.

    Prompts must end in a text token (BOI, BOV and BOA are text tokens).
    """

    def __init__(self, decoder: Decoder, *, prompts: Sequence[Document]) -> None:
        self._decoder = decoder
        self._model = decoder.model
        self._device = decoder.model.final_norm.weight.device
        self._cache = GrowingCache(decoder.model.config.layers)
        self._batch = _align_right(prompts, decoder=decoder).to(self._device)
        self._next = self._batch.positions[:, -1, 0] + 1
        is_padding = self._batch.kinds == TokenKind.PADDING
        self._intervals = self._batch.intervals.clone()
        self._intervals[..., 3] = torch.where(is_padding, self._intervals[..., 3], FOREVER)
        self._is_masked = bool(is_padding.any())
        self._blank = DocumentBuilder("", task="", vocab=decoder.vocab, shapes=decoder.shapes).build()
        self._frame_columns: list[tuple[int, int, int]] = []

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._device

    @property
    def end_code(self) -> int:
        """The code that ends audio."""
        return self._decoder.vocab.audio_codes

    @torch.no_grad()
    def read_prompt(self) -> torch.Tensor:
        """Run the whole prompt; returns the last token's hidden state [B, 1, D] behind the last layer."""
        hidden = self._model.embed(self._batch)
        return self._run(hidden, positions=self._batch.positions, intervals=self._intervals)[:, -1:]

    @torch.no_grad()
    def read_prompt_but_last(self) -> torch.Tensor:
        """Run all but the prompt's last token; returns that token's embedding [B, 1, D] for `predict_frame`."""
        hidden = self._model.embed(self._batch)
        if hidden.shape[1] > 1:
            self._run(hidden[:, :-1], positions=self._batch.positions[:, :-1], intervals=self._intervals[:, :-1])
        return hidden[:, -1:]

    @torch.no_grad()
    def read_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Append one text token per row, ids [B] int64; returns hidden [B, 1, D] behind the last layer."""
        batch = self._new_columns(ids[:, None], kind=TokenKind.TEXT)
        positions = self._next[:, None, None].expand(-1, 1, 3)
        self._next = self._next + 1
        return self._append(self._model.embed(batch), positions=positions, is_block=False)

    @torch.no_grad()
    def read_cells(self, latents: torch.Tensor, *, block: CellBlock, is_video: bool) -> torch.Tensor:
        """Append one visual block per row, latents [B, n, d]; returns hidden [B, n, D] behind the last layer.

        The running position stays at the picture's origin.
        """
        vocab, kind = self._decoder.vocab, TokenKind.VIDEO_GENERATION if is_video else TokenKind.IMAGE_GENERATION
        num_rows, num_cells = latents.shape[:2]
        ids = torch.full((num_rows, num_cells), vocab.video_gen if is_video else vocab.image_gen, device=self._device)
        every = torch.arange(num_rows * num_cells, device=self._device)
        cells = VisualCells(every, latents.flatten(0, 1), torch.full_like(every, block.scale))
        batch = dataclasses.replace(self._new_columns(ids, kind=kind), visual_cells=cells)
        self._forget_frames(block.frame)
        start = self._intervals_end()
        self._frame_columns.append((block.frame, start, start + num_cells))
        positions = self._cell_positions(block)
        return self._append(self._model.embed(batch), positions=positions, is_block=True)

    @torch.no_grad()
    def predict_frame(
        self, pending: torch.Tensor, *, choose: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Run the last embedding [B, 1, D] (BOA or a frame) level by level; returns the next frame's codes [B, Q].

        choose(level, logits [B, C+1]) draws the codes [B] of a level; their embedding enters the next layer.
        """
        model = self._model
        first = model.config.layers - model.config.audio.levels
        position, intervals = self._open_frame()
        hidden, codes, done = pending, [], 0
        for level in range(model.config.audio.levels):
            stop = first + level + 1
            hidden = model.run_layers(
                hidden, positions=position, intervals=intervals, cache=self._cache, start_layer=done, stop_layer=stop
            )
            codes.append(choose(level, model.audio_logits_level(hidden[:, 0], level=level)))
            done = stop
            if stop < model.config.layers:
                hidden = hidden + model.audio_code_embedding(codes[-1], level=level)[:, None]
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def embed_frame(self, codes: torch.Tensor) -> torch.Tensor:
        """Embedding [B, 1, D] of an audio frame, codes [B, Q] int64; `predict_frame` runs it."""
        ids = torch.full((len(codes), 1), self._decoder.vocab.audio_frame, device=self._device)
        frames = AudioFrames(torch.arange(len(codes), device=self._device), codes)
        batch = dataclasses.replace(self._new_columns(ids, kind=TokenKind.AUDIO), audio_frames=frames)
        return self._model.embed(batch)

    @torch.no_grad()
    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, 1, D] -> logits [B, V]."""
        return self._model.text_logits(hidden[:, -1])

    @torch.no_grad()
    def bit_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, n, D] -> logits [B, n, d]."""
        return self._model.bit_logits(hidden)

    def select(self, rows: Sequence[int]) -> None:
        """Keep `rows` in this order (beam search)."""
        self._cache.select(rows)
        self._next = self._next[list(rows)]
        self._intervals = self._intervals[list(rows)]

    def _run(self, hidden: torch.Tensor, *, positions: torch.Tensor, intervals: torch.Tensor | None) -> torch.Tensor:
        return self._model.run_layers(hidden, positions=positions, intervals=intervals, cache=self._cache)

    def _append(self, hidden: torch.Tensor, *, positions: torch.Tensor, is_block: bool) -> torch.Tensor:
        self._note_columns(hidden.shape[1], is_block=is_block)
        return self._run(hidden, positions=positions, intervals=self._intervals if self._is_masked else None)

    def _open_frame(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Position [B, 1, 3] and intervals of the next audio column; the prompt's last column exists already."""
        if self._cache.length(0) == self._intervals_end():
            self._note_columns(1, is_block=False)
            position = self._next
            self._next = self._next + 1
        else:
            position = self._next - 1
        return position[:, None, None].expand(-1, 1, 3), self._intervals if self._is_masked else None

    def _note_columns(self, count: int, *, is_block: bool) -> None:
        start = self._intervals_end()
        seen_from = torch.full((count,), start) if is_block else torch.arange(start, start + count)
        fresh = torch.zeros(len(self._intervals), count, 4, dtype=torch.int32, device=self._device)
        fresh[..., 0] = seen_from.to(self._device)
        fresh[..., 3] = FOREVER
        self._intervals = torch.cat([self._intervals, fresh], dim=1)

    def _intervals_end(self) -> int:
        return self._intervals.shape[1]

    def _cell_positions(self, block: CellBlock) -> torch.Tensor:
        """Equation 1 of data/README.md for every row: [B, n, 3]."""
        place = block.coordinates.to(self._device)[None]
        if self._decoder.visual_origin == "running":
            place = place + self._next[:, None, None]
        place = place.expand(len(self._next), -1, 2)
        time = (self._next + block.frame)[:, None, None].expand(-1, place.shape[1], 1)
        return torch.cat([time, place], dim=-1)

    def _forget_frames(self, frame: int) -> None:
        """Hide frames that left the window before `frame` opens (data.video_attention.window_frames)."""
        window, start = self._decoder.window_frames, self._intervals_end()
        if window <= 0:
            return
        for past, first, last in self._frame_columns:
            if past <= frame - window and not bool(self._intervals[0, first, 2]):
                self._intervals[:, first:last, 1] = start
                self._intervals[:, first:last, 2] = FOREVER
                self._is_masked = True

    def _new_columns(self, ids: torch.Tensor, *, kind: TokenKind) -> Batch:
        """A batch [B, n] of new columns with empty records; positions and intervals are the session's business."""
        blank = self._blank
        return Batch(
            token_ids=ids,
            kinds=torch.full_like(ids, int(kind)),
            positions=torch.zeros(*ids.shape, 3, device=ids.device),
            document_ids=torch.zeros_like(ids, dtype=torch.int32),
            intervals=torch.zeros(*ids.shape, 4, dtype=torch.int32, device=ids.device),
            text_targets=blank.text_targets,
            mtp_targets=(),
            image_patches=blank.image_patches,
            video_patches=blank.video_patches,
            visual_cells=blank.visual_cells,
            bit_targets=blank.bit_targets,
            audio_frames=blank.audio_frames,
            audio_targets=blank.audio_targets,
            speakers=blank.speakers,
            sample_keys=(),
        )


def _align_right(prompts: Sequence[Document], *, decoder: Decoder) -> Batch:
    """Collate prompts with their padding in front, so that all rows end in the same column."""
    longest = max(prompt.length for prompt in prompts)
    rows = [(_padding(longest - prompt.length, decoder=decoder), prompt) for prompt in prompts]
    return collate_rows(rows, layout=Layout(longest, decoder.vocab.pad, 0))


def _padding(length: int, *, decoder: Decoder) -> Document:
    """`length` positions that see and are seen by themselves alone."""
    blank = DocumentBuilder("", task="", vocab=decoder.vocab, shapes=decoder.shapes).build()
    intervals = torch.zeros(length, 4, dtype=torch.int32)
    intervals[:, 0] = torch.arange(length)
    intervals[:, 3] = intervals[:, 0] + 1
    return dataclasses.replace(
        blank,
        token_ids=torch.full((length,), decoder.vocab.pad),
        kinds=torch.full((length,), int(TokenKind.PADDING)),
        positions=torch.zeros(length, 3),
        intervals=intervals,
    )
