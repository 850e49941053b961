"""Every initialisation in one table: parameter-name pattern -> rule (SPEC section 1, ERNIE 4.5's).

std = sqrt(0.3333 / width) of the stream that the parameter belongs to (the backbone's or the ViT's); projections that
write into the residual stream are scaled by 1/sqrt(2 * layers) of that stream.

Each parameter has its own random stream, seeded by (seed, name), so that values depend neither on the order of
construction nor on the layout. A parameter of more than WHOLE_STREAM_ELEMENTS has one stream for each index of its
first dim (an expert, a row of the vocabulary), seeded by (seed, name, index), so that a rank draws the experts that it
holds and no others. Every tensor of the configurations that were trained here is smaller than that.

torch seeds a CPU generator with the low 32 bits of a number alone. Of the 200,000 rows of a vocabulary two pairs would
have started equal by chance; the seeds of one parameter's indices are therefore a permutation of those 32 bits.

torch fills a CPU tensor of at least 16 elements 16 at a time, and draws the last 16 anew where their number is no
multiple of 16. A stream drawn in consecutive pieces of multiples of 16 elements is therefore that of one draw, if what
is left for the last piece is at least 16 elements too.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import math
from collections.abc import Iterator

import torch

from ernie5.model.config import ModelConfig
from ernie5.model.interfaces import InitialValues, KeptIndices

VARIANCE_WIDTH = 0.3333
WHOLE_STREAM_ELEMENTS = 1 << 25
PIECE_ELEMENTS = 1 << 20
MARK_ELEMENTS = 256  # bits of a digest
BLOCK_ELEMENTS = 16  # of torch's normal_ on a CPU
SEEDS = 1 << 32  # that a CPU generator tells apart


@dataclasses.dataclass(frozen=True)
class InitRule:
    """pattern: fnmatch over names; kind: ones | normal | residual; stream: backbone | vit."""

    pattern: str
    kind: str
    stream: str


INIT_TABLE = (
    InitRule("*norm.weight", "ones", "backbone"),
    InitRule("*.norms.*.weight", "ones", "backbone"),
    InitRule("embedding.vision.vit.layers.*.attention.output.weight", "residual", "vit"),
    InitRule("embedding.vision.vit.layers.*.mlp.down.weight", "residual", "vit"),
    InitRule("embedding.vision.*_merger.output.weight", "normal", "backbone"),
    InitRule("embedding.vision.*", "normal", "vit"),
    InitRule("*.attention.output.weight", "residual", "backbone"),
    InitRule("*.down", "residual", "backbone"),
    InitRule("*.down.weight", "residual", "backbone"),
    InitRule("*", "normal", "backbone"),
)


def rule_of(name: str) -> InitRule:
    """The first rule of the table that matches `name`."""
    return next(rule for rule in INIT_TABLE if fnmatch.fnmatchcase(name, rule.pattern))


def std_of(name: str, *, config: ModelConfig) -> float | None:
    """Standard deviation of a parameter's initial values; None where it starts at one."""
    rule = rule_of(name)
    if rule.kind == "ones":
        return None
    vit = rule.stream == "vit"
    std = math.sqrt(VARIANCE_WIDTH / (config.visual.vit_width if vit else config.width))
    layers = config.visual.vit_layers if vit else config.layers
    return std / math.sqrt(2 * layers) if rule.kind == "residual" else std


class SeededValues:
    """The InitialValues of a model of `config`: drawn by the table from `seed`, in pieces of PIECE_ELEMENTS or, where a
    row is longer, of some rows (16 at most)."""

    def __init__(self, config: ModelConfig, *, seed: int) -> None:
        self._config, self._seed = config, seed

    @torch.no_grad()
    def fill(self, part: torch.Tensor, *, name: str, shape: tuple[int, ...], kept: KeptIndices) -> None:
        """As InitialValues."""
        std = std_of(name, config=self._config)
        if std is None:
            part.fill_(1.0)
        elif math.prod(shape) <= WHOLE_STREAM_ELEMENTS or len(shape) == 1:
            _draw(part, stream=_stream(f"{self._seed}/{name}"), std=std, shape=shape, kept=kept)
        else:
            own = range(shape[0]) if kept[0] is None else kept[0].tolist()
            for values, index in zip(part, own, strict=True):
                stream = _stream(f"{self._seed}/{name}", index=index)
                _draw(values, stream=stream, std=std, shape=shape[1:], kept=kept[1:])


class MarkedValues:
    """The InitialValues of a model that reads all of them from a checkpoint before anything is computed: zeros, for to
    draw costs 5 ns an element (and what tp cuts is drawn whole by every rank).

    The first MARK_ELEMENTS are signs that follow from the name and the part, in any type exact, so that copies are
    still equal and parts still differ when ranks compare them at the start (`parallel/verify`). Smaller parts are
    drawn.
    """

    def __init__(self, drawn: InitialValues) -> None:
        self._drawn = drawn

    @torch.no_grad()
    def fill(self, part: torch.Tensor, *, name: str, shape: tuple[int, ...], kept: KeptIndices) -> None:
        """As InitialValues."""
        if part.numel() < MARK_ELEMENTS:
            self._drawn.fill(part, name=name, shape=shape, kept=kept)
            return
        digest = hashlib.sha256(name.encode())
        for own in kept:
            digest.update(b"/all" if own is None else b"/" + own.numpy().tobytes())
        bits = torch.tensor(list(digest.digest())).unsqueeze(1) >> torch.arange(8) & 1
        part.zero_().view(-1)[:MARK_ELEMENTS] = 2 * bits.flatten() - 1


def _stream(key: str, *, index: int | None = None) -> torch.Generator:
    """The stream of a parameter, or of one index of its first dim, which none of its other indices has."""
    digest = hashlib.sha256(key.encode()).digest()
    if index is None:
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    first, step = (int.from_bytes(digest[start : start + 4], "little") for start in (0, 4))
    return torch.Generator().manual_seed((first + index * (step | 1)) % SEEDS)


def _draw(
    part: torch.Tensor, *, stream: torch.Generator, std: float, shape: tuple[int, ...], kept: KeptIndices
) -> None:
    """Draw a tensor of `shape` piece by piece and write what is kept of it into `part`."""
    own, written = kept[0], 0
    for first, stop in _pieces(shape[0], row_elements=math.prod(shape[1:])):
        if written == part.shape[0]:
            return  # the rest belongs to others
        values = torch.empty(stop - first, *shape[1:], dtype=torch.float32).normal_(std=std, generator=stream)
        if own is not None:
            values = values.index_select(0, own[(own >= first) & (own < stop)] - first)
        for dim, indices in enumerate(kept[1:], start=1):
            values = values if indices is None else values.index_select(dim, indices)
        part[written : written + values.shape[0]] = values
        written += values.shape[0]


def _pieces(rows: int, *, row_elements: int) -> Iterator[tuple[int, int]]:
    """(first, stop) of runs of rows that give the stream of one draw."""
    fewest = BLOCK_ELEMENTS // math.gcd(BLOCK_ELEMENTS, row_elements)
    size = max(1, PIECE_ELEMENTS // (fewest * row_elements)) * fewest
    first = 0
    while first < rows:
        stop = first + size
        if (rows - stop) * row_elements < BLOCK_ELEMENTS:
            stop = rows
        yield first, stop
        first = stop
