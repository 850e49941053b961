"""A hand-made batch with every kind of position, small enough to read: the model's tests build on it alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.config import (
    AudioModelConfig,
    BalanceConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    VisualModelConfig,
)
from ernie5.records import (
    AudioFrames,
    Batch,
    BitTargets,
    SpeakerCells,
    TextTargets,
    TokenKind,
    VisualCells,
    VisualPatches,
)

VOCAB, LEVELS, CODES, BITS, CHANNELS, SPEAKER = 61, 3, 11, 5, 6, 10
SCALE_CELLS = ((1, 1), (2, 2), (3, 3))


def tiny_config(**changes: object) -> ModelConfig:
    """Odd sizes everywhere they are allowed."""
    defaults = dict(
        layers=5, width=24, query_heads=4, kv_heads=2, head_width=16, vocab_size=VOCAB, dense_width=40,
        moe=MoEConfig(num_experts=7, top_k=3, expert_width=9, shared_experts=1,
                      balance=BalanceConfig(switch_loss=True, sequence_loss=True, z_loss=True)),
        mtp=MTPConfig(depth=2),
        visual=VisualModelConfig(bits=BITS, num_scales=len(SCALE_CELLS), patch_pixels=2, encoder_channels=CHANNELS,
                                 vit_width=16, vit_layers=1, vit_heads=2),
        audio=AudioModelConfig(levels=LEVELS, codes=CODES, speaker_features=SPEAKER),
    )
    return ModelConfig(**(defaults | changes))


@dataclasses.dataclass
class RowBuilder:
    """One packed row under construction; positions, intervals and records follow the layouts of SPEC section 2."""

    random: torch.Generator
    tokens: list[int] = dataclasses.field(default_factory=list)
    kinds: list[int] = dataclasses.field(default_factory=list)
    positions: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)
    documents: list[int] = dataclasses.field(default_factory=list)
    visible_from: list[int] = dataclasses.field(default_factory=list)
    text: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    patches: dict[int, list[tuple]] = dataclasses.field(default_factory=lambda: {4: [], 16: []})
    cells: list[tuple] = dataclasses.field(default_factory=list)
    bits: list[tuple] = dataclasses.field(default_factory=list)
    frames: list[tuple] = dataclasses.field(default_factory=list)
    frame_targets: list[tuple] = dataclasses.field(default_factory=list)
    speakers: list[tuple] = dataclasses.field(default_factory=list)
    next_frame: int = 0

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def code(self, *shape: int, high: int = CODES) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.random)

    def add(
        self, token: int, kind: TokenKind, *, at: tuple[float, float, float] | None = None, block: int | None = None
    ) -> int:
        """Append one position and return its index in the row."""
        index = len(self.tokens)
        own = [max(p) for p, d in zip(self.positions, self.documents) if d == self.document]
        running = 1 + max(own, default=-1.0)
        self.tokens.append(token)
        self.kinds.append(int(kind))
        self.positions.append(at or (running,) * 3)
        self.documents.append(self.document)
        self.visible_from.append(index if block is None else block)
        return index

    document: int = -1

    def text_tokens(self, count: int) -> None:
        for _ in range(count):
            self.add(int(self.code(1, high=40)), TokenKind.TEXT)

    def begin(self) -> int:
        self.document += 1
        return self.add(1, TokenKind.TEXT)

    def understanding(self, *, side: int, merge: int) -> None:
        kind = TokenKind.IMAGE_UNDERSTANDING if merge == 4 else TokenKind.VIDEO_UNDERSTANDING
        start, frames = len(self.tokens), merge // 4
        origin = 1 + max(p[0] for p, d in zip(self.positions, self.documents) if d == self.document)
        for y in range(side):
            for x in range(side):
                row = self.add(50, kind, at=(origin, origin + 2 * y + 0.5, origin + 2 * x + 0.5), block=start)
                ids = [self.next_frame + f for f in range(frames) for _ in range(4)]
                places = [(2 * y + dy, 2 * x + dx) for _ in range(frames) for dy in (0, 1) for dx in (0, 1)]
                self.patches[merge].append((row, self.draw(merge, 12), self.draw(merge, CHANNELS), ids, places))
        self.next_frame += frames

    def image_generation(self) -> None:
        begin = self.add(52, TokenKind.TEXT)
        self.bits.append((begin, self.code(BITS, high=2), 2.0, 0, False))
        origin = self.positions[begin][0] + 1
        for scale, (height, width) in enumerate((*SCALE_CELLS[1:], SCALE_CELLS[-1]), start=1):
            start, finished = len(self.tokens), scale == len(SCALE_CELLS)
            for y in range(height):
                for x in range(width):
                    at = (origin, origin + (y + 0.5) * 3 / height - 0.5, origin + (x + 0.5) * 3 / width - 0.5)
                    row = self.add(51, TokenKind.IMAGE_GENERATION, at=at, block=start)
                    self.cells.append((row, self.draw(BITS), scale))
                    if not finished:
                        self.bits.append((row, self.code(BITS, high=2), 0.5, scale, False))
        self.add(53, TokenKind.TEXT)
        self.text.append((len(self.tokens) - 2, 53))

    def audio_generation(self, frames: int) -> None:
        self.speakers.append((self.add(54, TokenKind.TEXT), self.draw(SPEAKER)))
        row, codes = self.add(55, TokenKind.TEXT), self.code(frames, LEVELS)
        for frame in codes:
            self.frame_targets.append((row, frame))
            row = self.add(56, TokenKind.AUDIO)
            self.frames.append((row, frame))
        self.frame_targets.append((row, torch.full((LEVELS,), CODES)))
        self.add(57, TokenKind.TEXT)

    def finish_text(self, first: int) -> None:
        """Make every text token that follows a text token of this document, from `first` on, a target."""
        for row in range(first, len(self.tokens) - 1):
            if self.kinds[row] == TokenKind.TEXT == self.kinds[row + 1]:
                self.text.append((row, self.tokens[row + 1]))


def collate(rows: list[RowBuilder], *, tokens: int, depth: int = 2) -> Batch:
    """Pad the rows to `tokens` and join their records."""
    shape = (len(rows), tokens)
    ids, kinds = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    positions, documents = torch.zeros(*shape, 3), torch.full(shape, -1, dtype=torch.int32)
    intervals = torch.zeros(*shape, 4, dtype=torch.int32)
    intervals[..., 0] = torch.arange(tokens)
    intervals[..., 3] = torch.arange(tokens) + 1
    for b, row in enumerate(rows):
        n = len(row.tokens)
        ids[b, :n], kinds[b, :n] = torch.tensor(row.tokens), torch.tensor(row.kinds)
        positions[b, :n], documents[b, :n] = torch.tensor(row.positions), torch.tensor(row.documents)
        ends = [1 + max(j for j in range(n) if row.documents[j] == row.documents[i]) for i in range(n)]
        intervals[b, :n, 0], intervals[b, :n, 3] = torch.tensor(row.visible_from), torch.tensor(ends)

    def rows_of(lists: list[list[tuple]]) -> torch.Tensor:
        flat = [b * tokens + item[0] for b, items in enumerate(lists) for item in items]
        return torch.tensor(flat, dtype=torch.int64)

    def stack(lists: list[list[tuple]], place: int, *empty: int) -> torch.Tensor:
        values = [torch.as_tensor(item[place]) for items in lists for item in items]
        return torch.stack(values) if values else torch.zeros(0, *empty)

    def patches_of(merge: int) -> VisualPatches:
        lists = [[(i, p, f, torch.tensor(ids) + 1000 * b, torch.tensor(at)) for i, p, f, ids, at in r.patches[merge]]
                 for b, r in enumerate(rows)]
        return VisualPatches(rows_of(lists), stack(lists, 1, merge, 12), stack(lists, 2, merge, CHANNELS),
                             stack(lists, 3, merge).long(), stack(lists, 4, merge, 2).long())

    def mtp_of(d: int) -> TextTargets:
        ok = [(b, t) for b, r in enumerate(rows) for t in range(len(r.tokens) - d - 2)
              if len({r.documents[t], r.documents[t + d + 2]}) == 1
              and all(r.kinds[i] == TokenKind.TEXT for i in range(t + 1, t + d + 3))]
        return TextTargets(torch.tensor([b * tokens + t for b, t in ok], dtype=torch.int64),
                           torch.tensor([rows[b].tokens[t + d + 2] for b, t in ok], dtype=torch.int64))

    text, bits = [r.text for r in rows], [r.bits for r in rows]
    cells, frames = [r.cells for r in rows], [r.frames for r in rows]
    targets, speakers = [r.frame_targets for r in rows], [r.speakers for r in rows]
    return Batch(
        token_ids=ids, kinds=kinds, positions=positions, document_ids=documents, intervals=intervals,
        text_targets=TextTargets(rows_of(text), stack(text, 1).long()),
        mtp_targets=tuple(mtp_of(d) for d in range(depth)),
        image_patches=patches_of(4), video_patches=patches_of(16),
        visual_cells=VisualCells(rows_of(cells), stack(cells, 1, BITS), stack(cells, 2).long()),
        bit_targets=BitTargets(rows_of(bits), stack(bits, 1, BITS).float(), stack(bits, 2).float(),
                               stack(bits, 3).long(), stack(bits, 4).bool()),
        audio_frames=AudioFrames(rows_of(frames), stack(frames, 1, LEVELS).long()),
        audio_targets=AudioFrames(rows_of(targets), stack(targets, 1, LEVELS).long()),
        speakers=SpeakerCells(rows_of(speakers), stack(speakers, 1, SPEAKER)),
        sample_keys=tuple(() for _ in rows),
    )


def write_document(row: RowBuilder, name: str) -> None:
    """Append one document of the named task."""
    first = row.begin()
    row.text_tokens(4)
    if name == "image_understanding":
        row.understanding(side=2, merge=4)
    if name == "video_understanding":
        row.understanding(side=1, merge=16)
    if name == "image_generation":
        row.image_generation()
    if name == "speech":
        row.audio_generation(3)
    row.text_tokens(5)
    row.finish_text(first)


def make_batch(*layouts: tuple[str, ...], tokens: int = 97, seed: int = 0, depth: int = 2) -> Batch:
    """One packed row per tuple of task names."""
    rows = []
    for b, names in enumerate(layouts):
        row = RowBuilder(torch.Generator().manual_seed(seed + b))
        for name in names:
            write_document(row, name)
        rows.append(row)
    return collate(rows, tokens=tokens, depth=depth)


FULL = (("text", "image_understanding", "speech", "image_generation"), ("video_understanding", "speech", "text"))


@pytest.fixture
def batch() -> Batch:
    """Two rows with every task."""
    return make_batch(*FULL)


@pytest.fixture
def batches():
    """The batch factory itself."""
    return make_batch


@pytest.fixture
def config() -> ModelConfig:
    return tiny_config()


@pytest.fixture
def configs():
    """The configuration factory itself."""
    return tiny_config


@pytest.fixture
def model(config: ModelConfig) -> UnifiedModel:
    """fp64, so that comparisons need no allowance for rounding; weights large enough that every path matters."""
    built = build_model(config, seed=3).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.mul_(1.5 if "norm" not in name else 1.0)
    return built
