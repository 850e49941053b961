"""One document as flat columns: what packing moves around and collating joins.

A document is a row of n positions with the sparse records of records.py; their `rows` count from the document's start
and its attention intervals as well. The builder appends text, patches, cells and audio frames in order and keeps the
rules of SPEC section 2 about who predicts what.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from ernie5.data.drawing import Drawing
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

    pixels [n, K, 3*s*s], features [n, K, A], frames [n, K] (0.. within the medium), patch_places [n, K, 2],
    places [n, 3] fp32 (group, h, w), starts [n] int64 (numpy): first position of the own group; groups see themselves.
    """

    pixels: torch.Tensor
    features: torch.Tensor
    frames: torch.Tensor
    patch_places: torch.Tensor
    places: torch.Tensor
    starts: np.ndarray
    num_frames: int


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
        self._starts: list[np.ndarray] = []
        self._running: list[int] = []
        self._placed: list[tuple[int, torch.Tensor]] = []
        self._hidden: list[tuple[int, int, int]] = []
        self._silent: list[int] = []
        self._forced: dict[int, int] = {}
        self._images: list[tuple[int, Patches, int]] = []
        self._videos: list[tuple[int, Patches, int]] = []
        self._drawings: list[tuple[int, Drawing, bool]] = []
        self._audio: list[tuple[int, torch.Tensor]] = []
        self._audio_targets: list[tuple[int, torch.Tensor]] = []
        self._speakers: list[tuple[int, torch.Tensor]] = []
        self._num_frames = 0

    @property
    def length(self) -> int:
        """Positions so far."""
        return len(self._ids)

    def text(self, ids: list[int]) -> None:
        """Append text ids and specials; each predicts the next one where that is text too."""
        self._append(ids, kind=TokenKind.TEXT)

    def speaker(self, features: torch.Tensor) -> None:
        """Append SPK with a speaker embedding [160]; it predicts nothing."""
        self._speakers.append((self.length, features))
        self._silent.append(self.length)
        self.text([self._vocab.spk])

    def patches(self, patches: Patches, *, is_video: bool) -> None:
        """Append the positions of a picture or clip to be understood; frames count on within the document."""
        kind = TokenKind.VIDEO_UNDERSTANDING if is_video else TokenKind.IMAGE_UNDERSTANDING
        placeholder = self._vocab.video_und if is_video else self._vocab.image_und
        (self._videos if is_video else self._images).append((self.length, patches, self._num_frames))
        self._append_cells(placeholder, kind=kind, places=patches.places, starts=patches.starts)
        self._num_frames += patches.num_frames

    def draw(self, drawing: Drawing, *, is_video: bool, hide_after: dict[int, int]) -> None:
        """Append BOI or BOV, which predicts scale 1 of frame 0, then the cells of `drawing`.

        hide_after: past frame -> first frame that does not see it; what follows the clip does not see it either, just
        as generation forgets it for good.
        """
        vocab, kind = self._vocab, TokenKind.VIDEO_GENERATION if is_video else TokenKind.IMAGE_GENERATION
        placeholder = vocab.video_gen if is_video else vocab.image_gen
        self.begin_picture(is_video=is_video)
        plan, start = drawing.plan, self.length
        self._drawings.append((start, drawing, is_video))
        self._append_cells(placeholder, kind=kind, places=plan.places, starts=plan.starts)
        for frame, later in hide_after.items():
            if later < plan.num_frames:
                first, last, until = (start + number * plan.cells_per_frame for number in (frame, frame + 1, later))
                self._hidden.append((first, last, until))

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
            end = torch.full((1, codes.shape[1]), self._vocab.audio_codes, dtype=torch.int64)
            self._audio_targets.append((start, torch.cat([codes, end])))
        else:
            self.text([self._vocab.boa])
        self._audio.append((self.length, codes))
        self._append([self._vocab.audio_frame] * len(codes), kind=TokenKind.AUDIO)
        self.text([self._vocab.eoa])

    def begin_audio(self) -> None:
        """Append BOA, whose hidden state predicts the first audio frame and no text."""
        self._silent.append(self.length)
        self.text([self._vocab.boa])

    def begin_picture(self, *, is_video: bool) -> None:
        """Append BOI or BOV as the end of a prompt."""
        self._silent.append(self.length)
        self.text([self._vocab.bov if is_video else self._vocab.boi])

    def build(self, *, is_text: bool = False) -> Document:
        """Close the document; every position's visible_until becomes its end."""
        ids = np.array(self._ids, dtype=np.int64)
        kinds = np.array(self._kinds, dtype=np.int64)
        return Document(
            key=self._key,
            task=self._task,
            token_ids=torch.from_numpy(ids),
            kinds=torch.from_numpy(kinds),
            positions=self._positions(),
            intervals=self._intervals(),
            text_targets=self._text_targets(ids, kinds),
            image_patches=_join_patches(self._images, blank=_blank(self._shapes).image_patches),
            video_patches=_join_patches(self._videos, blank=_blank(self._shapes).video_patches),
            visual_cells=_join_cells(self._drawings, blank=_blank(self._shapes).visual_cells),
            bit_targets=_join_bits(self._drawings, blank=_blank(self._shapes).bit_targets),
            audio_frames=_join_audio(self._audio, blank=_blank(self._shapes).audio_frames),
            audio_targets=_join_audio(self._audio_targets, blank=_blank(self._shapes).audio_frames),
            speakers=_join_speakers(self._speakers, blank=_blank(self._shapes).speakers),
            num_frames=self._num_frames,
            is_text=is_text,
        )

    def _append(self, ids: list[int], *, kind: TokenKind) -> None:
        """Append positions that each see what was before them and themselves, in running positions."""
        start, count = self.length, len(ids)
        self._ids += ids
        self._kinds += [int(kind)] * count
        self._starts.append(np.arange(start, start + count))
        self._running += self._cursor.text(count)

    def _append_cells(self, placeholder: int, *, kind: TokenKind, places: torch.Tensor, starts: np.ndarray) -> None:
        """Append cells at `places` [n, 3], each of which sees its block whole."""
        start, count = self.length, len(places)
        self._ids += [placeholder] * count
        self._kinds += [int(kind)] * count
        self._starts.append(starts + start)
        self._running += [0] * count
        placed = self._cursor.cells(places)
        self._placed.append((start, placed))
        self._cursor.leave(placed)

    def _positions(self) -> torch.Tensor:
        running = np.array(self._running, dtype=np.float32)
        positions = torch.from_numpy(np.repeat(running, 3).reshape(-1, 3))
        for start, placed in self._placed:
            positions[start : start + len(placed)] = placed
        return positions

    def _intervals(self) -> torch.Tensor:
        intervals = np.zeros((self.length, 4), dtype=np.int32)
        intervals[:, 3] = self.length
        if self._starts:
            intervals[:, 0] = np.concatenate(self._starts)
        for first, last, until in self._hidden:
            intervals[first:last, 1:3] = until, self.length
        return torch.from_numpy(intervals)

    def _text_targets(self, ids: np.ndarray, kinds: np.ndarray) -> TextTargets:
        is_text = kinds == int(TokenKind.TEXT)
        learned, following = np.zeros(len(ids), dtype=bool), np.zeros_like(ids)
        learned[:-1] = is_text[:-1] & is_text[1:]
        following[:-1] = ids[1:]
        for row in self._silent:
            learned[row] = False
        for row, token in self._forced.items():
            learned[row], following[row] = True, token
        rows = learned.nonzero()[0]
        return TextTargets(rows=torch.from_numpy(rows), ids=torch.from_numpy(following[rows]))


@dataclasses.dataclass(frozen=True)
class _Blank:
    """Empty records of full width, one set per Shapes: what a document without a medium holds."""

    image_patches: VisualPatches
    video_patches: VisualPatches
    visual_cells: VisualCells
    bit_targets: BitTargets
    audio_frames: AudioFrames
    speakers: SpeakerCells


@functools.lru_cache(maxsize=64)
def _blank(shapes: Shapes) -> _Blank:
    none = torch.zeros(0, dtype=torch.int64)

    def patches(merge: int) -> VisualPatches:
        pixels = torch.zeros(0, merge, 3 * shapes.patch_pixels**2)
        features = torch.zeros(0, merge, shapes.feature_channels)
        return VisualPatches(none, pixels, features, none.new_zeros(0, merge), none.new_zeros(0, merge, 2))

    bits, nothing = torch.zeros(0, shapes.bits), torch.zeros(0)
    return _Blank(
        image_patches=patches(shapes.image_merge),
        video_patches=patches(shapes.video_merge),
        visual_cells=VisualCells(none, bits, none),
        bit_targets=BitTargets(none, bits, nothing, none, none.bool()),
        audio_frames=AudioFrames(none, none.new_zeros(0, shapes.audio_levels)),
        speakers=SpeakerCells(none, torch.zeros(0, SPEAKER_FEATURES)),
    )


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _rows(start: int, values: torch.Tensor) -> torch.Tensor:
    return torch.arange(start, start + len(values))


def _join_patches(parts: list[tuple[int, Patches, int]], *, blank: VisualPatches) -> VisualPatches:
    if not parts:
        return blank
    return VisualPatches(
        rows=_join([_rows(start, patches.places) for start, patches, _ in parts]),
        pixels=_join([patches.pixels for _, patches, _ in parts]),
        features=_join([patches.features for _, patches, _ in parts]),
        frame_ids=_join([patches.frames + first for _, patches, first in parts]),
        places=_join([patches.patch_places for _, patches, _ in parts]),
    )


def _join_cells(parts: list[tuple[int, Drawing, bool]], *, blank: VisualCells) -> VisualCells:
    if not parts:
        return blank
    return VisualCells(
        rows=_join([_rows(start, drawing.latents) for start, drawing, _ in parts]),
        latents=_join([drawing.latents for _, drawing, _ in parts]),
        scales=_join([drawing.plan.scales for _, drawing, _ in parts]),
    )


def _join_bits(parts: list[tuple[int, Drawing, bool]], *, blank: BitTargets) -> BitTargets:
    if not parts:
        return blank
    return BitTargets(
        rows=_join([drawing.plan.bit_rows + start for start, drawing, _ in parts]),
        bits=_join([drawing.bits for _, drawing, _ in parts]),
        weights=_join([drawing.plan.weights for _, drawing, _ in parts]),
        scales=_join([drawing.plan.bit_scales for _, drawing, _ in parts]),
        is_video=_join([torch.full((len(drawing.bits),), is_video) for _, drawing, is_video in parts]),
    )


def _join_audio(parts: list[tuple[int, torch.Tensor]], *, blank: AudioFrames) -> AudioFrames:
    if not parts:
        return blank
    rows = _join([_rows(start, codes) for start, codes in parts])
    return AudioFrames(rows=rows, codes=_join([codes for _, codes in parts]))


def _join_speakers(parts: list[tuple[int, torch.Tensor]], *, blank: SpeakerCells) -> SpeakerCells:
    if not parts:
        return blank
    rows = torch.tensor([row for row, _ in parts], dtype=torch.int64)
    return SpeakerCells(rows=rows, features=torch.stack([features for _, features in parts]))


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
