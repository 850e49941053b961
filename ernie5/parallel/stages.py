"""Which layers each pipeline stage runs: sections of the model, balanced by what they cost. Torch-free.

With pp stages and vpp virtual stages there are pp * vpp sections in order of execution, and section c runs on stage
c mod pp (arXiv:2104.04473). The first section has the embedding and the encoders, the last one the heads and
multi-token prediction, and each level of audio is read in the section of its layer.

Costs are multiply-adds of one position's forward pass (backward costs twice as many everywhere). The text head counts
at every position; of media, whose part of the data no model knows, MEDIA_SHARE of the positions each. Attention
scores are left out: they cost the same in every layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

from ernie5.model.config import ModelConfig, attention_params, vit_hidden
from ernie5.model.shard_plan import Placement, Section

MEDIA_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """sections in order of execution and what each costs in multiply-adds per position; section c runs on c mod pp.

    is_text_shared: whether the last stage reads the text embedding too; first_audio_layer: where level 0 is read.
    """

    pp: int
    sections: tuple[Section, ...]
    costs: tuple[float, ...]
    is_text_shared: bool
    first_audio_layer: int

    @property
    def vpp(self) -> int:
        """Sections per stage."""
        return len(self.sections) // self.pp

    def of_stage(self, stage: int) -> tuple[Section, ...]:
        """The sections that `stage` runs."""
        return self.sections[stage :: self.pp]

    def holders(self, name: str, *, placement: Placement) -> tuple[int, ...]:
        """The stages that hold the parameter called `name`, ascending; the first of them counts in norms."""
        last = self.pp - 1
        if placement.pp == "ends":
            return (0, last) if self.is_text_shared and last else (0,)
        if placement.pp == "embedding":
            return (0,)
        if placement.pp == "head":
            return (last,)
        number = int(next(part for part in name.split(".") if part.isdigit()))
        layer = self.first_audio_layer + number if placement.pp == "level" else number
        return (self._section_of(layer) % self.pp,)

    def describe(self) -> str:
        """One line per stage: layers, what else stands there, and its part of the cost in percent."""
        total = sum(self.costs)
        lines = [f"{self.pp} pipeline stages of {self.vpp} section(s) each; costs by multiply-adds"]
        for stage in range(self.pp):
            parts = " and ".join(_name(section) for section in self.of_stage(stage))
            lines.append(f"  stage {stage}: {parts} ({100 * sum(self.costs[stage :: self.pp]) / total:.1f} %)")
        return "\n".join(lines)

    def _section_of(self, layer: int) -> int:
        return next(c for c, section in enumerate(self.sections) if section.first <= layer < section.stop)


def plan_stages(model: ModelConfig, *, pp: int, vpp: int = 1, stage_layers: tuple[int, ...] = ()) -> StagePlan:
    """Cut the model into pp * vpp sections of `stage_layers` layers each, or where stages cost alike."""
    layers = layer_costs(model)
    first, last = embedding_cost(model), head_cost(model)
    units = [layers[0] + first, *layers[1:]] if model.layers > 1 else [layers[0] + first + last]
    if model.layers > 1:
        units[-1] += last
    sizes = stage_layers or balance_stages(units, pp=pp, sizes=balanced_sizes(units, parts=pp * vpp))
    ends = list(itertools.accumulate(sizes))
    starts = [0, *ends[:-1]]
    return StagePlan(
        pp=pp,
        sections=tuple(
            Section(start, stop, has_embedding=start == 0, has_heads=stop == model.layers)
            for start, stop in zip(starts, ends, strict=True)
        ),
        costs=tuple(sum(units[start:stop]) for start, stop in zip(starts, ends, strict=True)),
        is_text_shared=model.tie_embeddings or model.mtp.depth > 0,
        first_audio_layer=model.layers - model.audio.levels,
    )


def layer_costs(model: ModelConfig) -> list[float]:
    """Multiply-adds per position of every decoder layer, with the audio level read after it."""
    moe, width = model.moe, model.width
    dense = 3 * width * model.dense_width
    sparse = (moe.top_k + moe.shared_experts) * 3 * width * moe.expert_width + moe.num_experts * width
    costs = [
        float(attention_params(model) + (dense if index < model.dense_layers else sparse))
        for index in range(model.layers)
    ]
    if model.has_audio:
        for index in range(model.layers - model.audio.levels, model.layers):
            costs[index] += MEDIA_SHARE * (model.audio.codes + 1) * width
    return costs


def embedding_cost(model: ModelConfig) -> float:
    """Multiply-adds per position of the encoders; looking up costs nothing."""
    if not model.has_visual:
        return 0.0
    v = model.visual
    patch = v.vit_layers * v.vit_width * (4 * v.vit_width + 3 * vit_hidden(v))
    patch += v.vit_width * (3 * v.patch_pixels**2 + v.encoder_channels)
    merged = [k for kind, k in (("image", v.image_merge), ("video", v.video_merge)) if kind in model.modalities]
    seen = sum(k * (patch + 4 * v.vit_width**2) + v.vit_width * model.width for k in merged)
    return MEDIA_SHARE * (seen + v.bits * model.width)


def head_cost(model: ModelConfig) -> float:
    """Multiply-adds per position of text head, bit head and multi-token prediction, which uses the text head again."""
    text, width = model.vocab_size * model.width, model.width
    block = attention_params(model) + 3 * width * model.dense_width + 2 * width * width
    bits = MEDIA_SHARE * model.visual.bits * width if model.has_visual else 0.0
    return text + model.mtp.depth * (block + text) + bits


def balanced_sizes(costs: list[float], *, parts: int) -> tuple[int, ...]:
    """Cut `costs` into `parts` runs of at least one: the dearest as cheap as can be, then the sum of squares least."""
    bottleneck = _best_cut(costs, parts=parts, limit=math.inf, value=lambda cost: cost, join=max)[0]
    limit = bottleneck * (1 + 1e-9)  # sums of the same numbers in another order
    return _best_cut(costs, parts=parts, limit=limit, value=lambda cost: cost * cost, join=lambda a, b: a + b)[1]


def balance_stages(costs: list[float], *, pp: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Move single layers between neighbouring sections while that evens out the stages, each a sum of its sections."""

    def spread(cut: tuple[int, ...]) -> float:
        ends = list(itertools.accumulate(cut))
        sections = [sum(costs[end - size : end]) for end, size in zip(ends, cut, strict=True)]
        return sum(sum(sections[stage::pp]) ** 2 for stage in range(pp))

    best = spread(sizes)
    while True:
        moved = [
            tuple(size + (i == taker) - (i == giver) for i, size in enumerate(sizes))
            for left in range(len(sizes) - 1)
            for giver, taker in ((left, left + 1), (left + 1, left))
            if sizes[giver] > 1
        ]
        found = min(moved, key=spread, default=sizes)
        if len(sizes) == pp or spread(found) >= best * (1 - 1e-9):
            return sizes
        sizes, best = found, spread(found)


def _best_cut(
    costs: list[float],
    *,
    parts: int,
    limit: float,
    value: Callable[[float], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """(value, sizes) of the best cut, by dynamic programming over prefixes."""
    sums = [0.0, *itertools.accumulate(costs)]
    count = len(costs)
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * count]
    for part in range(parts):
        new: list[tuple[float, tuple[int, ...]] | None] = [None] * (count + 1)
        for stop in range(part + 1, count + 1):
            for start in range(part, stop):
                cost = sums[stop] - sums[start]
                if best[start] is None or cost > limit:
                    continue
                found = (join(best[start][0], value(cost)), (*best[start][1], stop - start))
                if new[stop] is None or found[0] < new[stop][0]:
                    new[stop] = found
        best = new
    return best[count]


def _name(section: Section) -> str:
    layers = f"layer {section.first}" if section.stop == section.first + 1 else (
        f"layers {section.first} to {section.stop - 1}"
    )
    return ("embedding, " if section.has_embedding else "") + layers + (", heads" if section.has_heads else "")
