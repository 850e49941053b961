"""One document as flat columns: what packing moves around and collating joins.

A document is a row of n positions with the sparse records of records.py; their `rows` count from the document's start
and its attention intervals as well. The builder appends text, patches, cells and audio frames in order and keeps the
rules of SPEC section 2 about who predicts what.
"""

from __future__ import annotations

import dataclasses

import torch

from ernie5.data.positions import PositionCursor
from ernie5.records import (
    AudioFrames,
    BitTargets,
    SpeakerCells,
    TextTargets,
    TokenKind,
    VisualCells,
    VisualPatches,
)
from ernie5.tokenizers.vocab import Vocab

SPEAKER_FEATURES = 160


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Widths of the media records, needed where a record is empty: bits d, feature_channels A, patch_pixels s, codec
    levels Q, merges K of images and clips, num_scales S (a finished picture has scale index S)."""

    bits: int
    feature_channels: int
    patch_pixels: int
    audio_levels: int
    audio_codes: int
    num_scales: int
    image_merge: int = 4
    video_merge: int = 16


@dataclasses.dataclass(frozen=True)
class Patches:
    """Understanding input of one picture or clip: one block per frame group.

    pixels [n, K, 3*s*s], features [n, K, A], frames [n, K] (0.. within the medium), places [n, K, 2],
    coordinates [n, 2] (h, w) fp32, groups [n] (latent frame of each position; equal groups see each other).
    """

    pixels: torch.Tensor
    features: torch.Tensor
    frames: torch.Tensor
    places: torch.Tensor
    coordinates: torch.Tensor
    groups: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of a medium to be drawn: the cells that predict scale `scale`, or the finished picture (scale S).

    latents [n, d]; coordinates [n, 2]; frame: latent frame; bits [n, d] or None for a finished picture; weight:
    loss weight of its cells.
    """

    latents: torch.Tensor
    coordinates: torch.Tensor
    frame: int
    scale: int
    bits: torch.Tensor | None
    weight: float


@dataclasses.dataclass(frozen=True)
class Document:
    """n positions, see Batch of records.py for every field; `intervals` [n, 4] counts rows from the document's start.

    key names the sample; task the key of the mixture; is_text: nothing but text, may be cut anywhere; num_frames:
    frames of the ViT in this document.
    """

    key: str
    task: str
    token_ids: torch.Tensor
    kinds: torch.Tensor
    positions: torch.Tensor
    intervals: torch.Tensor
    text_targets: TextTargets
    image_patches: VisualPatches
    video_patches: VisualPatches
    visual_cells: VisualCells
    bit_targets: BitTargets
    audio_frames: AudioFrames
    audio_targets: AudioFrames
    speakers: SpeakerCells
    num_frames: int
    is_text: bool

    @property
    def length(self) -> int:
        """Number of positions n."""
        return len(self.token_ids)


class DocumentBuilder:
    """Appends the parts of one document in order; `build` closes it."""

    def __init__(self, key: str, *, task: str, vocab: Vocab, shapes: Shapes, visual_origin: str = "running") -> None:
        self._key, self._task, self._vocab, self._shapes = key, task, vocab, shapes
        self._cursor = PositionCursor(visual_origin=visual_origin)
        self._ids: list[int] = []
        self._kinds: list[int] = []
        self._starts: list[int] = []
        self._hidden: dict[int, int] = {}
        self._positions: list[torch.Tensor] = []
        self._silent: set[int] = set()
        self._forced: dict[int, int] = {}
        self._patches: dict[TokenKind, list[tuple[torch.Tensor, Patches, int]]] = {
            TokenKind.IMAGE_UNDERSTANDING: [],
            TokenKind.VIDEO_UNDERSTANDING: [],
        }
        self._cells: list[tuple[torch.Tensor, Block]] = []
        self._bits: list[tuple[torch.Tensor, Block, bool]] = []
        self._audio: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._audio_targets: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._speakers: list[tuple[int, torch.Tensor]] = []
        self._num_frames = 0

    @property
    def length(self) -> int:
        """Positions so far."""
        return len(self._ids)

    def text(self, ids: list[int]) -> None:
        """Append text ids and specials; each predicts the next one where that is text too."""
        self._positions.append(self._cursor.text(len(ids)))
        self._append(ids, kind=TokenKind.TEXT)

    def speaker(self, features: torch.Tensor) -> None:
        """Append SPK with a speaker embedding [160]; it predicts nothing."""
        self._speakers.append((self.length, features))
        self._silent.add(self.length)
        self.text([self._vocab.spk])

    def patches(self, patches: Patches, *, is_video: bool) -> None:
        """Append the positions of a picture or clip to be understood; frames count on within the document."""
        kind = TokenKind.VIDEO_UNDERSTANDING if is_video else TokenKind.IMAGE_UNDERSTANDING
        placeholder = self._vocab.video_und if is_video else self._vocab.image_und
        start, placed = self.length, []
        for group in patches.groups.unique().tolist():
            chosen = patches.coordinates[patches.groups == group]
            placed.append(self._cursor.cells(chosen, frame=group))
            self._append([placeholder] * len(chosen), kind=kind, block=True)
        self._positions += placed
        self._cursor.leave(torch.cat(placed) if placed else torch.zeros(0, 3))
        self._patches[kind].append((torch.arange(start, self.length), patches, self._num_frames))
        self._num_frames += int(patches.frames.max()) + 1 if patches.frames.numel() else 0

    def blocks(self, blocks: list[Block], *, first: Block, is_video: bool, hide_after: dict[int, int]) -> None:
        """Append BOI or BOV, which predicts the cells of `first` (scale 1 of frame 0), then `blocks` in order.

        A finished picture's last cell predicts scale 1 of the next frame: the block that follows it with scale 0 is
        a target only and takes no positions. hide_after: past frame -> first frame that does not see it; what follows
        the clip does not see it either, just as generation forgets it for good.
        """
        vocab, kind = self._vocab, TokenKind.VIDEO_GENERATION if is_video else TokenKind.IMAGE_GENERATION
        placeholder = vocab.video_gen if is_video else vocab.image_gen
        self._silent.add(self.length)
        self.text([vocab.bov if is_video else vocab.boi])
        self._predict_bits(self.length - 1, first, is_video=is_video)
        placed: list[torch.Tensor] = []
        rows_of: dict[int, list[int]] = {}
        for block in blocks:
            if block.scale == 0:
                self._predict_bits(self.length - 1, block, is_video=is_video)
                continue
            rows = torch.arange(self.length, self.length + len(block.latents))
            rows_of.setdefault(block.frame, []).extend(rows.tolist())
            placed.append(self._cursor.cells(block.coordinates, frame=block.frame))
            self._append([placeholder] * len(rows), kind=kind, block=True)
            self._cells.append((rows, block))
            if block.bits is not None:
                self._bits.append((rows, block, is_video))
        self._positions += placed
        self._cursor.leave(torch.cat(placed) if placed else torch.zeros(0, 3))
        for frame, later in hide_after.items():
            if later in rows_of and frame in rows_of:
                for row in rows_of[frame]:
                    self._hidden[row] = rows_of[later][0]

    def expect(self, token: int) -> None:
        """Let the last position predict `token`, whatever kind it is, and even if the document ends here."""
        self._forced[self.length - 1] = token

    def finish_picture(self, *, is_video: bool) -> None:
        """Append EOI or EOV, predicted by the last cell of the finished picture."""
        end = self._vocab.eov if is_video else self._vocab.eoi
        self.expect(end)
        self.text([end])

    def audio(self, codes: torch.Tensor, *, generate: bool) -> None:
        """Append BOA, audio frames codes [n, Q] and EOA; with `generate`, BOA and frames predict the next frame and
        the last one the end code at every level."""
        start = self.length
        if generate:
            self.begin_audio()
        else:
            self.text([self._vocab.boa])
        self._audio.append((torch.arange(self.length, self.length + len(codes)), codes))
        self._positions.append(self._cursor.text(len(codes)))
        self._append([self._vocab.audio_frame] * len(codes), kind=TokenKind.AUDIO)
        if generate:
            end = torch.full((1, codes.shape[1]), self._vocab.audio_codes, dtype=torch.int64)
            self._audio_targets.append((torch.arange(start, self.length), torch.cat([codes, end])))
        self.text([self._vocab.eoa])

    def begin_audio(self) -> None:
        """Append BOA, whose hidden state predicts the first audio frame and no text."""
        self._silent.add(self.length)
        self.text([self._vocab.boa])

    def begin_picture(self, *, is_video: bool) -> None:
        """Append BOI or BOV as the end of a prompt."""
        self._silent.add(self.length)
        self.text([self._vocab.bov if is_video else self._vocab.boi])

    def build(self, *, is_text: bool = False) -> Document:
        """Close the document; every position's visible_until becomes its end."""
        length = self.length
        ids, kinds = torch.tensor(self._ids, dtype=torch.int64), torch.tensor(self._kinds, dtype=torch.int64)
        intervals = torch.zeros(length, 4, dtype=torch.int32)
        intervals[:, 0] = torch.tensor(self._starts, dtype=torch.int32)
        intervals[:, 3] = length
        for row, hidden_from in self._hidden.items():
            intervals[row, 1], intervals[row, 2] = hidden_from, length
        records = _Records(self._shapes)
        return Document(
            key=self._key,
            task=self._task,
            token_ids=ids,
            kinds=kinds,
            positions=torch.cat([torch.zeros(0, 3), *self._positions]),
            intervals=intervals,
            text_targets=self._text_targets(ids, kinds),
            image_patches=records.patches(self._patches[TokenKind.IMAGE_UNDERSTANDING], merge=self._shapes.image_merge),
            video_patches=records.patches(self._patches[TokenKind.VIDEO_UNDERSTANDING], merge=self._shapes.video_merge),
            visual_cells=records.cells(self._cells),
            bit_targets=records.bits(self._bits),
            audio_frames=records.audio(self._audio),
            audio_targets=records.audio(self._audio_targets),
            speakers=records.speakers(self._speakers),
            num_frames=self._num_frames,
            is_text=is_text,
        )

    def _append(self, ids: list[int], *, kind: TokenKind, block: bool = False) -> None:
        start = self.length
        self._ids += ids
        self._kinds += [int(kind)] * len(ids)
        self._starts += [start] * len(ids) if block else list(range(start, start + len(ids)))

    def _predict_bits(self, row: int, block: Block, *, is_video: bool) -> None:
        self._bits.append((torch.tensor([row]), block, is_video))

    def _text_targets(self, ids: torch.Tensor, kinds: torch.Tensor) -> TextTargets:
        is_text = kinds == TokenKind.TEXT
        learned = torch.zeros(len(ids), dtype=torch.bool)
        learned[:-1] = is_text[:-1] & is_text[1:]
        learned[sorted(self._silent)] = False
        following = ids.roll(-1)
        for row, token in self._forced.items():
            learned[row], following[row] = True, token
        rows = learned.nonzero().flatten()
        return TextTargets(rows=rows, ids=following[rows])


class _Records:
    """Joins the parts of a document into the records of records.py; empty lists give empty tensors of full width."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def patches(self, parts: list[tuple[torch.Tensor, Patches, int]], *, merge: int) -> VisualPatches:
        shapes = self._shapes
        return VisualPatches(
            rows=_join([rows for rows, _, _ in parts], torch.zeros(0, dtype=torch.int64)),
            pixels=_join([p.pixels for _, p, _ in parts], torch.zeros(0, merge, 3 * shapes.patch_pixels**2)),
            features=_join([p.features for _, p, _ in parts], torch.zeros(0, merge, shapes.feature_channels)),
            frame_ids=_join([p.frames + first for _, p, first in parts], torch.zeros(0, merge, dtype=torch.int64)),
            places=_join([p.places for _, p, _ in parts], torch.zeros(0, merge, 2, dtype=torch.int64)),
        )

    def cells(self, parts: list[tuple[torch.Tensor, Block]]) -> VisualCells:
        return VisualCells(
            rows=_join([rows for rows, _ in parts], torch.zeros(0, dtype=torch.int64)),
            latents=_join([block.latents for _, block in parts], torch.zeros(0, self._shapes.bits)),
            scales=_join([torch.full_like(rows, block.scale) for rows, block in parts], torch.zeros(0).long()),
        )

    def bits(self, parts: list[tuple[torch.Tensor, Block, bool]]) -> BitTargets:
        weights = [torch.full((len(rows),), block.weight) for rows, block, _ in parts]
        return BitTargets(
            rows=_join([rows for rows, _, _ in parts], torch.zeros(0, dtype=torch.int64)),
            bits=_join([block.bits for _, block, _ in parts], torch.zeros(0, self._shapes.bits)),
            weights=_join(weights, torch.zeros(0)),
            scales=_join([torch.full_like(rows, block.scale) for rows, block, _ in parts], torch.zeros(0).long()),
            is_video=_join([torch.full_like(rows, video).bool() for rows, _, video in parts], torch.zeros(0).bool()),
        )

    def audio(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> AudioFrames:
        return AudioFrames(
            rows=_join([rows for rows, _ in parts], torch.zeros(0, dtype=torch.int64)),
            codes=_join([codes for _, codes in parts], torch.zeros(0, self._shapes.audio_levels, dtype=torch.int64)),
        )

    def speakers(self, parts: list[tuple[int, torch.Tensor]]) -> SpeakerCells:
        return SpeakerCells(
            rows=torch.tensor([row for row, _ in parts], dtype=torch.int64),
            features=_join([features[None] for _, features in parts], torch.zeros(0, SPEAKER_FEATURES)),
        )


def _join(parts: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts) if parts else empty


def cut_text(document: Document, start: int, *, stop: int) -> Document:
    """Positions start..stop-1 of a text document as a document of its own: positions restart at 0, and the last
    position still predicts the token behind the cut, so that no target is lost."""
    rows = document.text_targets.rows
    inside = (rows >= start) & (rows < stop)
    count = stop - start
    intervals = document.intervals[start:stop] - start
    intervals[:, 1:3] = 0
    intervals[:, 3] = count
    return dataclasses.replace(
        document,
        token_ids=document.token_ids[start:stop],
        kinds=document.kinds[start:stop],
        positions=document.positions[:count],
        intervals=intervals,
        text_targets=TextTargets(rows=rows[inside] - start, ids=document.text_targets.ids[inside]),
    )
