"""Context parallelism: the tokens of every row are split over ranks (`token_split`), and a batch is cut accordingly.

Everything in a Batch belongs to a position and follows it, except a frame of pixels: the ViT attends within a frame. A
rank therefore gets every group of patches of each frame that one of its positions reads, and where a frame is read on
several ranks each rank's row ends in one padding position more, the sink, to which groups of foreign positions are
added. No loss depends on a padding position, hence on what it holds.
"""

from __future__ import annotations

import dataclasses

import torch

from ernie5.errors import LayoutError
from ernie5.parallel.collectives import all_gather, all_reduce
from ernie5.parallel.pools import ContextPool
from ernie5.parallel.ring import RingAttention, RingPlanner
from ernie5.parallel.seams import Install
from ernie5.parallel.state import Axis
from ernie5.parallel.token_split import Splitter, TokenSplit
from ernie5.parallel.ulysses import UlyssesAttention, UlyssesPlanner
from ernie5.records import Batch, TensorRecord, TextTargets, TokenKind, VisualPatches


def install_context(
    model: torch.nn.Module, *, axis: Axis, install: Install, mode: str, splitter: Splitter
) -> None:
    """Exchange the parts of a model in which positions meet: attention with its planner, the look-ahead of multi-token
    prediction, the statistics of routing. mode: ring | ulysses. On one rank nothing is changed.
    """
    if axis.size == 1:
        return
    is_ring = mode == "ring"
    planner = RingPlanner(axis, splitter=splitter) if is_ring else UlyssesPlanner(splitter)
    install(model, "plan_attention", planner)
    op = RingAttention(axis) if is_ring else UlyssesAttention(axis, backend=model.config.attention_backend)
    for block in (*model.layers, *(module.block for module in model.mtp)):
        install(block.attention, "op", op)
    for module in model.mtp:
        install(module, "look_ahead", ContextLookAhead(axis, splitter=splitter))
    for layer in model.moe_layers():
        install(layer, "pool", ContextPool(axis, inner=layer.pool))


def cut_batch(batch: Batch, *, rank: int, splitter: Splitter) -> Batch:
    """The part of `batch` that context rank `rank` works on; counts of all parts add up to the batch's.

    token_ids, kinds, positions and document_ids have the rank's positions [B, local_tokens]; intervals keeps all
    columns [B, all_tokens, 4], in the numbering of the whole row, because queries meet the keys of every rank.
    """
    if splitter.ranks == 1:
        return batch
    tokens = batch.token_ids.shape[1]
    split = splitter.of_row(tokens, has_sinks=False)
    owner = split.owners()[:tokens].to(batch.token_ids.device)
    seen = (batch.image_patches, batch.video_patches)
    if splitter.is_one_length or any(_has_shared_frame(patches, owner=owner) for patches in seen):
        split = dataclasses.replace(split, has_sinks=True)
    cut = _Cut(split, rank=rank, tokens=tokens, owner=owner)
    return dataclasses.replace(
        batch,
        token_ids=cut.columns(batch.token_ids, fill=batch.token_ids),
        kinds=cut.columns(batch.kinds, fill=torch.full_like(batch.kinds, int(TokenKind.PADDING))),
        positions=cut.columns(batch.positions, fill=torch.zeros_like(batch.positions)),
        document_ids=cut.columns(batch.document_ids, fill=torch.full_like(batch.document_ids, -1)),
        intervals=_pad_intervals(batch.intervals, all_tokens=split.all_tokens),
        text_targets=cut.record(batch.text_targets),
        mtp_targets=tuple(cut.record(targets) for targets in batch.mtp_targets),
        image_patches=cut.patches(batch.image_patches),
        video_patches=cut.patches(batch.video_patches),
        visual_cells=cut.record(batch.visual_cells),
        bit_targets=cut.record(batch.bit_targets),
        audio_frames=cut.record(batch.audio_frames),
        audio_targets=cut.record(batch.audio_targets),
        speakers=cut.record(batch.speakers),
    )


class _Cut:
    """Index arithmetic of one cut."""

    def __init__(self, split: TokenSplit, *, rank: int, tokens: int, owner: torch.Tensor) -> None:
        self._split, self._rank, self._tokens, self._owner = split, rank, tokens, owner
        self._order = split.order(rank).to(owner.device)
        self._local = torch.zeros(split.all_tokens, dtype=torch.int64, device=owner.device)
        self._local[self._order] = torch.arange(split.local_tokens, device=owner.device)

    def columns(self, x: torch.Tensor, *, fill: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [B, local_tokens, ...]; positions past the end take values of `fill`, of the same shape.

        Token ids continue with the row's first ones there: multi-token prediction reads around the end.
        """
        inside = self._order < self._tokens
        index = self._order % self._tokens
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return torch.where(inside.view(shape), x.index_select(1, index), fill.index_select(1, index))

    def record(self, record: TextTargets) -> TextTargets:
        """The entries whose position is here, with rows b * local_tokens + t."""
        return self._moved(record, chosen=self._owner[record.rows % self._tokens] == self._rank)

    def patches(self, patches: VisualPatches) -> VisualPatches:
        """The groups of every frame that a position here reads; those of other positions go to the sink."""
        own = self._owner[patches.rows % self._tokens] == self._rank
        seen = torch.isin(patches.frame_ids, patches.frame_ids[own])
        return self._moved(patches, chosen=seen.any(1))

    def _moved(self, record: TextTargets, *, chosen: torch.Tensor) -> TextTargets:
        kept = chosen.nonzero().flatten()
        moved: TensorRecord = record.map_tensors(lambda tensor: tensor.index_select(0, kept))
        row, token = moved.rows // self._tokens, moved.rows % self._tokens
        local = torch.where(self._owner[token] == self._rank, self._local[token], self._split.local_tokens - 1)
        return dataclasses.replace(moved, rows=row * self._split.local_tokens + local)


def _has_shared_frame(patches: VisualPatches, *, owner: torch.Tensor) -> bool:
    """Whether patches of one frame belong to positions of different ranks."""
    if not patches.rows.numel():
        return False
    _, frames = torch.unique(patches.frame_ids, return_inverse=True)
    owners = owner[patches.rows % owner.numel()].unsqueeze(1).expand_as(frames).flatten()
    low = torch.full((int(frames.max()) + 1,), owner.numel(), dtype=owners.dtype, device=owners.device)
    low.scatter_reduce_(0, frames.flatten(), owners, "amin")
    return bool((low[frames.flatten()] != owners).any())


def _pad_intervals(intervals: torch.Tensor, *, all_tokens: int) -> torch.Tensor:
    """[B, T, 4] -> [B, all_tokens, 4]: columns past the end are seen by themselves alone."""
    rows, tokens = intervals.shape[:2]
    column = torch.arange(tokens, all_tokens, dtype=intervals.dtype, device=intervals.device)
    zero = torch.zeros_like(column)
    alone = torch.stack((column, zero, zero, column + 1), dim=-1).expand(rows, -1, -1)
    return torch.cat((intervals, alone), dim=1)


class ContextLookAhead:
    """The LookAhead of a rank that holds a part of each row."""

    def __init__(self, axis: Axis, *, splitter: Splitter) -> None:
        self._axis, self._splitter = axis, splitter

    def __call__(self, x: torch.Tensor, *, by: int) -> torch.Tensor:
        """x [B, local_tokens, D] -> [B, local_tokens, D]; collective."""
        return ShiftAhead.apply(x, by, self._axis, self._splitter.of_part(x.shape[1]))


class ShiftAhead(torch.autograd.Function):
    """out[:, t] = x[:, t'] where t' stands `by` positions later in the whole row (the last ones read its start).

    Each rank publishes the first `by` positions of its chunks; a chunk's end continues with those of the next chunk.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, by: int, axis: Axis, split: TokenSplit) -> torch.Tensor:
        if by > split.chunk:
            raise LayoutError(
                f"parallel.cp = {split.ranks} cuts rows into chunks of {split.chunk} tokens, and multi-token "
                f"prediction reads {by} tokens ahead. A chunk must hold at least as many. Lower parallel.cp or "
                "model.mtp.depth, or raise parallel.context_chunk"
            )
        ctx.rest = by, axis, split
        chunks, sink = _in_chunks(x, split=split)
        published = chunks[:, :, :by].transpose(0, 1).contiguous()
        found = all_gather(published, axis=axis, sizes=[len(published)] * split.ranks)
        places = {number: place for place, number in enumerate(_numbers(split))}
        after = [places[(number + 1) % split.chunks] for number in split.own_chunks(axis.coordinate)]
        following = found[after].transpose(0, 1)
        return torch.cat((torch.cat((chunks[:, :, by:], following), dim=2).flatten(1, 2), sink), dim=1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _ShiftBack.apply(grad, *ctx.rest), None, None, None


class _ShiftBack(torch.autograd.Function):
    """The adjoint of ShiftAhead: it takes `by` positions from every chunk's end to the next one's beginning."""

    @staticmethod
    def forward(ctx, grad: torch.Tensor, by: int, axis: Axis, split: TokenSplit) -> torch.Tensor:
        ctx.rest = by, axis, split
        own = list(split.own_chunks(axis.coordinate))
        chunks, sink = _in_chunks(grad, split=split)
        heads = grad.new_zeros(split.chunks, grad.shape[0], by, *grad.shape[2:])
        heads[[(number + 1) % split.chunks for number in own]] = chunks[:, :, split.chunk - by :].transpose(0, 1)
        heads = all_reduce(heads, axis=axis)[own].transpose(0, 1)
        by_chunk = torch.cat((heads, chunks[:, :, : split.chunk - by]), dim=2)
        return torch.cat((by_chunk.flatten(1, 2), sink), dim=1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ShiftAhead.apply(grad, *ctx.rest), None, None, None


def _in_chunks(x: torch.Tensor, *, split: TokenSplit) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, local_tokens, ...] -> its chunks [B, 2 rounds, chunk, ...] and what is left, the sink [B, 0 or 1, ...]."""
    whole = 2 * split.rounds * split.chunk
    return x[:, :whole].unflatten(1, (2 * split.rounds, split.chunk)), x[:, whole:]


def _numbers(split: TokenSplit) -> list[int]:
    """The number of each chunk, one rank's after another's."""
    return [number for rank in range(split.ranks) for number in split.own_chunks(rank)]
