"""Tensor parallelism: every rank holds some heads, some columns of each feed-forward and some rows of each head.

Hidden states are replicated over tp. A replicated tensor enters cut work through `copy_to` and leaves it through
`reduce_from`; what every rank computes alike needs neither, and its gradients are equal on all ranks by themselves.
The exceptions are parameters that meet only a part of the work of the ranks that hold them, such as the norms of query
and key heads, or a key head that several ranks hold, each with other query heads: their gradients are summed over those
ranks as autograd delivers them.

With sequence parallelism (arXiv:2205.05198) the decoder layers keep the tokens of every row split over tp: the sums
after cut work become reduce-scatters, the copies before it gatherings, and norms, routers and residuals work on
T / tp tokens. Every whole parameter of a layer then sees only some tokens, hence the same sums of gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from ernie5.errors import LayoutError
from ernie5.model.interfaces import LayerInputs
from ernie5.parallel.collectives import (
    all_gather,
    all_reduce,
    copy_to,
    even_sizes,
    gather,
    gather_for_work,
    own_part,
    reduce_from,
    reduce_scatter,
    split,
)
from ernie5.parallel.pools import SequencePool
from ernie5.parallel.seams import Install
from ernie5.parallel.state import Axis, ParallelState
from ernie5.records import AudioFrames
from ernie5_kernels.linear_cross_entropy import CHUNK_BYTES
from ernie5_kernels.linear_cross_entropy.vocabulary_parallel import VocabularyPart, vocabulary_parallel_cross_entropy

TOKEN_DIM = 1


def install_tensor(model: torch.nn.Module, *, state: ParallelState, install: Install, is_sequence: bool) -> None:
    """Wrap the parts of a model whose parameters are cut over tp; on one rank nothing is changed."""
    axis = state.tp
    if axis.size == 1:
        return
    region = SequenceRegion(model, axis=axis) if is_sequence else None
    _install_vocabulary(model, axis=axis, install=install)
    for block, its_region in _blocks(model, region=region):
        for part in _cut_parts(block):
            install(part, "forward", _CutWork(part.forward, axis=axis, at=its_region))
        for norm in (block.attention.query_norm, block.attention.key_norm):
            sum_gradients_over(norm, axis=axis)
        for shared in (block.attention.key, block.attention.value) if state.key_copies.size > 1 else ():
            sum_gradients_over(shared, axis=state.key_copies)
    for head in model.audio_head.heads if model.audio_head is not None else ():
        install(head, "forward", _GatheredHead(head.forward, axis=axis, width=model.audio_head.num_classes, at=region))
    if region is not None:
        install(model, "_layers", region)
        for layer in model.moe_layers():
            install(layer, "pool", SequencePool(axis))
        for module in region.partial_modules():
            sum_gradients_over(module, axis=axis)


def sum_gradients_over(module: torch.nn.Module, *, axis: Axis) -> None:
    """Sum the gradients of a module's own whole parameters over `axis`, once per backward pass and parameter."""
    for parameter in module.parameters(recurse=False):
        parameter.register_hook(lambda gradient: all_reduce(gradient, axis=axis))


class VocabularyParallelLoss:
    """The TextLoss of a rank that holds some rows of the text head."""

    def __init__(self, *, vocab_size: int, axis: Axis) -> None:
        sizes = even_sizes(vocab_size, axis=axis)
        self._rows = max(64, CHUNK_BYTES // (4 * max(sizes)))
        self._part = VocabularyPart(
            first=sum(sizes[: axis.coordinate]),
            vocab_size=vocab_size,
            parts=axis.size,
            gather=lambda x: all_gather(x.unsqueeze(0), axis=axis, sizes=[1] * axis.size),
            total=lambda x: all_reduce(x, axis=axis),
        )

    def __call__(self, hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden [N, D] and targets [N] equal on all ranks, weight [v, D] this rank's rows -> sum of nats."""
        return vocabulary_parallel_cross_entropy(
            hidden, weight=weight, targets=targets, part=self._part, chunk_rows=self._rows
        )


class SequenceRegion:
    """The decoder layers with the tokens of every row split over the ranks of an axis.

    Takes the place of the model's loop over layers: hidden states are split before and gathered after it, and audio
    levels are read and written at this rank's tokens.
    """

    def __init__(self, model: torch.nn.Module, *, axis: Axis) -> None:
        self._model, self._axis, self._plain = model, axis, model._layers
        self.token_sizes: tuple[int, ...] = ()
        self.audio_sizes: tuple[int, ...] = ()

    def __call__(
        self, hidden: torch.Tensor, *, inputs: LayerInputs, audio: AudioFrames, layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """As the model's loop: replicated hidden [B, T, D] in and out; audio logits in the order of `audio`."""
        axis, tokens = self._axis, hidden.shape[TOKEN_DIM]
        sizes = even_sizes(tokens, axis=axis)
        self.token_sizes = tuple(sizes)
        ends = torch.tensor(sizes, device=hidden.device).cumsum(0)
        owner = torch.bucketize(audio.rows % tokens, ends, right=True)
        self.audio_sizes = tuple(torch.bincount(owner, minlength=axis.size).tolist())
        mine = (owner == axis.coordinate).nonzero().flatten()
        first = sum(sizes[: axis.coordinate])
        rows = audio.rows[mine]
        local = AudioFrames(
            rows=rows // tokens * sizes[axis.coordinate] + rows % tokens - first, codes=audio.codes[mine]
        )
        kinds = own_part(inputs.kinds, axis=axis, sizes=sizes, dim=TOKEN_DIM).contiguous()
        out, logits, routings = self._plain(
            split(hidden, axis=axis, sizes=sizes, dim=TOKEN_DIM),
            inputs=dataclasses.replace(inputs, kinds=kinds),
            audio=local,
            layers=layers,
        )
        order = torch.argsort(torch.argsort(owner, stable=True))
        if logits.shape[1]:
            logits = logits.index_select(0, order)
        else:  # these layers read no level, so nothing was gathered
            logits = logits.new_zeros(owner.numel(), *logits.shape[1:])
        return gather(out, axis=axis, sizes=sizes, dim=TOKEN_DIM), logits, routings

    def partial_modules(self) -> Iterator[torch.nn.Module]:
        """Modules inside the region whose parameters are whole and see this rank's tokens alone."""
        for layer in self._model.layers:
            yield layer.attention_norm
            yield layer.mlp_norm
        for layer in self._model.moe_layers():
            yield layer.router
        if self._model.audio_head is not None:
            yield from self._model.audio_head.norms
            yield from self._model.audio_head.targets


class _CutWork:
    """A sub-module with cut parameters, between hidden states [B, T, D] that are replicated or split by tokens."""

    def __init__(self, plain: Callable[..., torch.Tensor], *, axis: Axis, at: SequenceRegion | None) -> None:
        self._plain, self._axis, self._region = plain, axis, at

    def __call__(self, hidden: torch.Tensor, **inputs: LayerInputs) -> torch.Tensor:
        if self._region is None:
            return reduce_from(self._plain(copy_to(hidden, axis=self._axis), **inputs), axis=self._axis)
        sizes = self._region.token_sizes
        if hidden.shape[TOKEN_DIM] != sizes[self._axis.coordinate]:
            raise LayoutError(
                f"{hidden.shape[TOKEN_DIM]} tokens came back to a layer that has gone on to micro-batches of "
                f"{sizes[self._axis.coordinate]} per rank: rows of different lengths are under way. Set "
                "engine.recompute: none, parallel.sequence: false or parallel.pp: 1"
            )
        whole = gather_for_work(hidden, axis=self._axis, sizes=sizes, dim=TOKEN_DIM)
        return reduce_scatter(self._plain(whole, **inputs), axis=self._axis, sizes=sizes, dim=TOKEN_DIM)


class _GatheredHead:
    """A small output head with cut rows whose logits every rank needs."""

    def __init__(
        self, plain: Callable[[torch.Tensor], torch.Tensor], *, axis: Axis, width: int, at: SequenceRegion | None
    ) -> None:
        self._plain, self._axis, self._region = plain, axis, at
        self._sizes = even_sizes(width, axis=axis)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, D], equal on all ranks or this rank's part of a sequence region -> logits [N, width] of all."""
        if self._region is None:
            hidden = copy_to(hidden, axis=self._axis)
        else:
            hidden = gather_for_work(hidden, axis=self._axis, sizes=self._region.audio_sizes)
        return gather(self._plain(hidden), axis=self._axis, sizes=self._sizes, dim=-1)


class _VocabularyEmbedding:
    """Look-up in this rank's rows of the text embedding; ids of other ranks give zero here and their row there."""

    def __init__(self, table: torch.nn.Embedding, *, vocab_size: int, axis: Axis) -> None:
        sizes = even_sizes(vocab_size, axis=axis)
        self._plain, self._axis = table.forward, axis
        self._first, self._rows = sum(sizes[: axis.coordinate]), sizes[axis.coordinate]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self._first
        is_here = (local >= 0) & (local < self._rows)
        found = self._plain(local.clamp(0, self._rows - 1)) * is_here.unsqueeze(-1)
        return reduce_from(found, axis=self._axis)


def _install_vocabulary(model: torch.nn.Module, *, axis: Axis, install: Install) -> None:
    table = model.embedding.text
    install(table, "forward", _VocabularyEmbedding(table, vocab_size=model.config.vocab_size, axis=axis))
    if model.bit_head is not None:
        head = model.bit_head
        install(head, "forward", _GatheredHead(head.forward, axis=axis, width=model.config.visual.bits, at=None))


def _blocks(
    model: torch.nn.Module, *, region: SequenceRegion | None
) -> Iterator[tuple[torch.nn.Module, SequenceRegion | None]]:
    """Decoder blocks, and the region that splits their tokens; those of multi-token prediction stand outside."""
    yield from ((layer, region) for layer in model.layers)
    yield from ((module.block, None) for module in model.mtp)


def _cut_parts(block: torch.nn.Module) -> list[torch.nn.Module]:
    """Attention and dense feed-forward (of the layer, or its shared experts)."""
    children = dict(block.named_children())
    dense = children["mlp"] if "mlp" in children else block.moe.shared
    return [block.attention] + ([dense] if dense is not None else [])
