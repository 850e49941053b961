"""Which layers stand where: balanced by cost, every parameter on the stages that use it."""

from __future__ import annotations

import itertools

import pytest
import torch

from ernie5.model.backbone import UnifiedModel
from ernie5.model.config import AudioModelConfig, ModelConfig, MTPConfig
from ernie5.model.shard_plan import placements_of
from ernie5.parallel.stages import balance_stages, balanced_sizes, head_cost, layer_costs, plan_stages

MODEL = ModelConfig(layers=7, dense_layers=1, audio=AudioModelConfig(levels=4))


@pytest.mark.parametrize("count,parts", [(1, 1), (5, 2), (7, 3), (9, 4), (6, 6)])
def test_the_dearest_part_is_as_cheap_as_any_cut_makes_it(count: int, parts: int) -> None:
    costs = [float((7 * index * index + 3) % 11 + 1) for index in range(count)]
    sizes = balanced_sizes(costs, parts=parts)
    assert sum(sizes) == count and min(sizes) >= 1 and len(sizes) == parts

    def dearest(cut: tuple[int, ...]) -> float:
        ends = list(itertools.accumulate(cut))
        return max(sum(costs[end - size : end]) for end, size in zip(ends, cut, strict=True))

    every = [cut for cut in itertools.product(range(1, count + 1), repeat=parts) if sum(cut) == count]
    assert dearest(sizes) == pytest.approx(min(map(dearest, every)))


def test_equal_layers_are_dealt_out_evenly() -> None:
    assert sorted(balanced_sizes([1.0] * 10, parts=4)) == [2, 2, 3, 3]


@pytest.mark.parametrize("pp,vpp", [(1, 1), (2, 1), (3, 1), (2, 2), (2, 3), (7, 1)])
def test_sections_cover_the_layers_in_order(pp: int, vpp: int) -> None:
    plan = plan_stages(MODEL, pp=pp, vpp=vpp)
    assert [layer for section in plan.sections for layer in range(section.first, section.stop)] == list(range(7))
    assert [section.has_embedding for section in plan.sections] == [True] + [False] * (pp * vpp - 1)
    assert [section.has_heads for section in plan.sections] == [False] * (pp * vpp - 1) + [True]
    assert plan.vpp == vpp and sum(map(len, map(plan.of_stage, range(pp)))) == pp * vpp


def test_a_large_head_stands_with_fewer_layers() -> None:
    large = ModelConfig(layers=8, vocab_size=60_000, modalities=("text",))
    assert head_cost(large) > 3 * layer_costs(large)[0]
    first, last = plan_stages(large, pp=2).sections
    assert last.stop - last.first < first.stop - first.first


def test_stages_of_several_sections_are_evened_out_as_sums() -> None:
    costs = [4.0, *[1.0] * 10, 6.0]
    sections = balanced_sizes(costs, parts=4)
    sizes = balance_stages(costs, pp=2, sizes=sections)

    def stages(cut: tuple[int, ...]) -> list[float]:
        ends = list(itertools.accumulate(cut))
        sums = [sum(costs[end - size : end]) for end, size in zip(ends, cut, strict=True)]
        return [sum(sums[0::2]), sum(sums[1::2])]

    assert sum(sizes) == 12 and min(sizes) >= 1 and max(stages(sizes)) == 10.0 <= max(stages(sections))


def test_explicit_layers_are_taken_as_they_are() -> None:
    plan = plan_stages(MODEL, pp=2, vpp=2, stage_layers=(3, 1, 1, 2))
    assert [(s.first, s.stop) for s in plan.sections] == [(0, 3), (3, 4), (4, 5), (5, 7)]
    assert "stage 1: layer 3 and layers 5 to 6, heads" in plan.describe()


@pytest.mark.parametrize("tied,depth", [(True, 0), (True, 1), (False, 1), (False, 0)])
def test_every_parameter_is_held_where_it_is_used(tied: bool, depth: int) -> None:
    config = ModelConfig(layers=7, tie_embeddings=tied, mtp=MTPConfig(depth=depth), audio=AudioModelConfig(levels=4))
    plan = plan_stages(config, pp=3)
    with torch.device("meta"):
        names = [name for name, _ in UnifiedModel(config).named_parameters()]
    held = {name: plan.holders(name, placement=placements_of(name)[0]) for name in names}
    stage_of = {layer: c % 3 for c, s in enumerate(plan.sections) for layer in range(s.first, s.stop)}
    assert held["embedding.text.weight"] == ((0, 2) if tied or depth else (0,))
    assert held["final_norm.weight"] == held["bit_head.weight"] == (2,)
    assert all(stages == (stage_of[int(name.split(".")[1])],) for name, stages in held.items() if name[:6] == "layers")
    for level in range(4):
        assert held[f"audio_head.heads.{level}.weight"] == (stage_of[3 + level],)
    assert {stage for stages in held.values() for stage in stages} == {0, 1, 2}
    one = plan_stages(config, pp=1)
    assert all(one.holders(name, placement=placements_of(name)[0]) == (0,) for name in names)
