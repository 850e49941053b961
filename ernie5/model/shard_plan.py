"""How every parameter is laid out over devices, as data: one table, read by parallel, checkpoint and planner.

A placement names the dim that an axis cuts, or None for a whole copy on every rank of the axis. tp cuts attention and
dense feed-forwards, ep cuts the pool of experts, pp assigns whole layers to stages. `fused` counts the equal parts
that a cut dim is made of: gate and up are one matrix, and each part is cut by itself.
"""

from __future__ import annotations

import dataclasses
import fnmatch


@dataclasses.dataclass(frozen=True)
class Section:
    """Decoder layers first .. stop-1, run by themselves; the first section embeds, the last one reads the heads. Levels
    of audio are read in the section of their layer.
    """

    first: int
    stop: int
    has_embedding: bool
    has_heads: bool


def whole_section(layers: int) -> Section:
    """All of a model of so many layers."""
    return Section(0, layers, has_embedding=True, has_heads=True)


@dataclasses.dataclass(frozen=True)
class Placement:
    """pattern: fnmatch over parameter names; tp_dim, ep_dim: the dim that is cut; pp: stage rule (embedding: first
    stage; ends: first stage, and last where a head or multi-token prediction reads it; layer: the stage of its layer;
    level: the stage of the layer that the audio level is read after; head: last stage); fused: parts of the tp dim;
    reason: why so; tp_axis: keys where tensor-parallel ranks share heads of which there may be fewer than ranks.
    """

    pattern: str
    tp_dim: int | None
    ep_dim: int | None
    pp: str
    fused: int
    reason: str
    tp_axis: str = "tp"


SHARD_PLAN = (
    Placement("embedding.text.weight", 0, None, "ends", 1, "vocabulary-parallel look-up and head"),
    Placement("embedding.vision.*", None, None, "embedding", 1, "small; frames are split over data parallel instead"),
    Placement("embedding.cells.*", None, None, "embedding", 1, "small, summed into the sequence before any cut"),
    Placement("embedding.audio.*", None, None, "embedding", 1, "small, summed into the sequence before any cut"),
    Placement("layers.*_norm.weight", None, None, "layer", 1, "norms are whole: D is not cut, nor is a head"),
    Placement("layers.*.attention.query.weight", 0, None, "layer", 1, "whole query heads"),
    Placement("layers.*.attention.key.weight", 0, None, "layer", 1, "whole key heads", "keys"),
    Placement("layers.*.attention.value.weight", 0, None, "layer", 1, "whole value heads", "keys"),
    Placement("layers.*.attention.output.weight", 1, None, "layer", 1, "rows of the same heads, then a sum"),
    Placement("layers.*.mlp.gate_up.weight", 0, None, "layer", 2, "columns of gate and of up"),
    Placement("layers.*.mlp.down.weight", 1, None, "layer", 1, "rows of the same columns, then a sum"),
    Placement("layers.*.moe.router.weight", None, None, "layer", 1, "every rank routes its own tokens among all"),
    Placement("layers.*.moe.experts.gate_up", 1, 0, "layer", 2, "whole experts per ep rank; tp cuts only under etp"),
    Placement("layers.*.moe.experts.down", 2, 0, "layer", 1, "whole experts per ep rank; tp cuts only under etp"),
    Placement("layers.*.moe.shared.gate_up.weight", 0, None, "layer", 2, "as a dense feed-forward"),
    Placement("layers.*.moe.shared.down.weight", 1, None, "layer", 1, "as a dense feed-forward"),
    Placement("final_norm.weight", None, None, "head", 1, "whole"),
    Placement("text_head.weight", 0, None, "head", 1, "vocabulary-parallel cross-entropy"),
    Placement("bit_head.weight", 0, None, "head", 1, "bits; their logits are gathered, d numbers per cell"),
    Placement("audio_head.heads.*.weight", 0, None, "level", 1, "classes; their logits are gathered"),
    Placement("audio_head.norms.*.weight", None, None, "level", 1, "norms are whole"),
    Placement("audio_head.targets.*.weight", None, None, "level", 1, "small, looked up and added between two layers"),
    Placement("mtp.*_norm.weight", None, None, "head", 1, "norms are whole"),
    Placement("mtp.*.project.weight", None, None, "head", 1, "one matrix of 2 D^2 that feeds a whole norm"),
    Placement("mtp.*.block.attention.query.weight", 0, None, "head", 1, "as in a layer"),
    Placement("mtp.*.block.attention.key.weight", 0, None, "head", 1, "as in a layer", "keys"),
    Placement("mtp.*.block.attention.value.weight", 0, None, "head", 1, "as in a layer", "keys"),
    Placement("mtp.*.block.attention.output.weight", 1, None, "head", 1, "as in a layer"),
    Placement("mtp.*.block.mlp.gate_up.weight", 0, None, "head", 2, "as in a layer"),
    Placement("mtp.*.block.mlp.down.weight", 1, None, "head", 1, "as in a layer"),
)


def placements_of(name: str) -> tuple[Placement, ...]:
    """Every placement whose pattern matches `name`; a correct plan gives exactly one."""
    return tuple(p for p in SHARD_PLAN if fnmatch.fnmatchcase(name, p.pattern))
